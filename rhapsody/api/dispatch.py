"""Handing tasks over to their backends: in order, and none held up by another."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.runtime.errors import BackendError, RhapsodyError
from rhapsody.runtime.text import describe_error

from .task import BaseTask

if TYPE_CHECKING:
    from .task_manager import TaskManager

__all__ = ["Dispatcher"]


class _Queue:
    """Through it tasks go to a backend, in the order in which they came."""

    __slots__ = ("lock", "pending")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.pending = 0  # errands that are before it, or in it


class Dispatcher:
    """The dispatcher of the backends of a session."""

    def __init__(self, flow: TaskManager) -> None:
        self._manager = flow
        self._queues: defaultdict[str, _Queue] = defaultdict(_Queue)

    async def dispatch(
        self, groups: dict[str, list[BaseTask]], under_way: list[asyncio.Task[None]]
    ) -> None:
        """Give each backend its tasks; where it takes none of them, they FAILED for its reason.

        None waits for another. What a backend that is not up yet shall have goes to `under_way`,
        with all that is not waited for here; where that is canceled, the tasks are CANCELED.
        """
        work = [(self._manager.backends[name], group) for name, group in groups.items() if group]
        if len(work) == 1:
            ((backend, group),) = work
            queue = self._queues[backend.name]
            if backend.state() == "RUNNING" and not queue.pending and not queue.lock.locked():
                async with queue.lock:
                    await self._submit_to(backend, group)
                return
        errands = [(backend, self._submission(backend, group)) for backend, group in work]
        under_way += [submission for _, submission in errands]
        soon = [submission for backend, submission in errands if backend.state() == "RUNNING"]
        if soon:
            await asyncio.wait(soon)

    def _submission(
        self, backend: BaseExecutionBackend, group: list[BaseTask]
    ) -> asyncio.Task[None]:
        """Give a backend its tasks in the background."""
        queue = self._queues[backend.name]

        async def go() -> None:
            async with queue.lock:
                await self._submit_to(backend, group, waited=True)

        def back(submission: asyncio.Task[None]) -> None:
            queue.pending -= 1
            if submission.cancelled():  # before it was its turn
                self._cancel_left(group)

        queue.pending += 1
        submission = self._manager.spawn(go())
        submission.add_done_callback(back)
        return submission

    def _cancel_left(self, group: list[BaseTask]) -> None:
        self._manager.settle([(task, "CANCELED", None) for task in group if not task.done()])

    async def take_back(self, under_way: list[asyncio.Task[None]]) -> None:
        """Hand over no more of what is under way; its tasks are CANCELED."""
        for submission in under_way:
            submission.cancel()
        if under_way:
            await asyncio.wait(under_way)

    async def _submit_to(
        self, backend: BaseExecutionBackend, group: list[BaseTask], *, waited: bool = False
    ) -> None:
        try:
            if waited:
                if backend.state() != "RUNNING":
                    await backend
                group = [task for task in group if not task.done()]  # canceled meanwhile
                if not group:
                    return
            # Another session may have had it in between.
            backend.attach(self._manager.owner, self._manager.settle, self._manager.folder)
            await backend.submit_tasks(group)
        except Exception as error:
            cause = error
            if not isinstance(error, RhapsodyError):
                cause = BackendError(
                    f"backend '{backend.name}' failed: {describe_error(error)}",
                    backend=backend.name,
                )
                cause.__cause__ = error
            self._manager.settle(
                [(task, "FAILED", {"exception": cause}) for task in group if not task.done()]
            )
        except BaseException:  # canceled, or what no engine should raise: nobody else will end them
            self._cancel_left(group)
            raise
