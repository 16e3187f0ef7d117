"""A backend that completes tasks without running them, to measure everything around it."""

from __future__ import annotations

from rhapsody.backends.base import BaseExecutionBackend, Task

__all__ = ["NoopExecutionBackend"]


class NoopExecutionBackend(BaseExecutionBackend):
    """Complete every task at once, DONE, with None for its result."""

    kinds = frozenset({"function", "executable", "ai"})
    takes_plain_functions = True

    def __init__(self, name: str = "noop") -> None:
        super().__init__(name)

    def check(self, task: Task) -> None:
        """Accept every task, with the options of any other backend: a dry run needs that."""

    async def _submit(self, tasks: list[Task]) -> None:
        self.deliver_all(tasks, "DONE")
