"""A backend that completes tasks without running them, to measure the cost of everything else."""

from __future__ import annotations

from rhapsody.backends.base import BaseExecutionBackend, Task

__all__ = ["NoopExecutionBackend"]


class NoopExecutionBackend(BaseExecutionBackend):
    """Completes every task at once: DONE, with the result None.

    Args:
        name: the backend's name.
    """

    kinds = frozenset({"function", "executable", "ai"})
    takes_plain_functions = True

    def __init__(self, name: str = "noop") -> None:
        super().__init__(name)

    def check(self, task: Task) -> None:
        """Accept every task, with any options: a dry run of a workflow has those of its backend."""

    async def _submit(self, tasks: list[Task]) -> None:
        self.deliver_all(tasks, "DONE")
