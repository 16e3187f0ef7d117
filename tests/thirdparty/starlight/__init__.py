"""A backend that somebody else wrote: all that it knows of RHAPSODY is the base class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rhapsody.api.errors import TaskValidationError
from rhapsody.backends.base import BaseExecutionBackend


class StarlightBackend(BaseExecutionBackend):
    """Runs functions on an engine of its own, as many at once as there are telescopes."""

    kinds = frozenset({"function"})
    option_keys = frozenset({"distance"})

    def __init__(self, name: str = "starlight", telescopes: int = 2) -> None:
        super().__init__(name)
        self._telescopes = telescopes
        self._jobs: dict[str, Any] = {}

    async def _start(self) -> None:
        self._engine = ThreadPoolExecutor(self._telescopes)

    def _check(self, task: Any, options: Any) -> None:
        if getattr(task["function"], "__name__", "") == "<lambda>":
            raise TaskValidationError(f"task '{task['uid']}': a star has a name, a lambda none")

    async def _submit(self, tasks: list[Any]) -> None:
        for task in tasks:
            self._jobs[task["uid"]] = self._engine.submit(self._observe, task)

    def _observe(self, task: Any) -> None:
        args, kwargs = self.inputs_of(task)
        self.deliver(task, "RUNNING")
        try:
            value = task["function"](*args, **kwargs)
        except Exception as error:  # whatever it is, it is the task's own
            self.deliver(task, "FAILED", exception=error)
        else:
            self.deliver(task, "DONE", return_value=value)

    async def _cancel(self, task: Any) -> bool:
        if not self._jobs[task["uid"]].cancel():
            return False
        self.deliver(task, "CANCELED")
        return True

    async def _stop(self) -> None:
        await self.cancel_all_tasks()
        self._engine.shutdown()
