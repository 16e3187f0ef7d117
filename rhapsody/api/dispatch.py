"""Handing tasks over to their backends: in order, and none held up by another."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.runtime.errors import BackendError, RhapsodyError
from rhapsody.runtime.text import said

from .task import BaseTask

if TYPE_CHECKING:
    from .task_manager import Flow

__all__ = ["Doors"]


class _Door:
    """Through it tasks go to a backend, in the order in which they came."""

    __slots__ = ("lock", "queue")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.queue = 0  # errands that are before it, or in it


class Doors:
    """The doors of the backends of a session."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._doors: defaultdict[str, _Door] = defaultdict(_Door)

    async def hand_over(
        self, groups: dict[str, list[BaseTask]], under_way: list[asyncio.Task[None]]
    ) -> None:
        """Give each backend its tasks; where it takes none of them, they FAILED for its reason.

        None waits for another. What a backend that is not up yet shall have goes to `under_way`,
        with all that is not waited for here; where that is canceled, the tasks are CANCELED.
        """
        work = [(self._flow.backends[name], group) for name, group in groups.items() if group]
        if len(work) == 1:
            ((backend, group),) = work
            door = self._doors[backend.name]
            if backend.state() == "RUNNING" and not door.queue and not door.lock.locked():
                async with door.lock:
                    await self._hand_to(backend, group)
                return
        errands = [(backend, self._errand(backend, group)) for backend, group in work]
        under_way += [errand for _, errand in errands]
        soon = [errand for backend, errand in errands if backend.state() == "RUNNING"]
        if soon:
            await asyncio.wait(soon)

    def _errand(self, backend: BaseExecutionBackend, group: list[BaseTask]) -> asyncio.Task[None]:
        """Give a backend its tasks in the background."""
        door = self._doors[backend.name]

        async def go() -> None:
            async with door.lock:
                await self._hand_to(backend, group, waited=True)

        def back(errand: asyncio.Task[None]) -> None:
            door.queue -= 1
            if errand.cancelled():  # before it was its turn
                self._cancel_left(group)

        door.queue += 1
        errand = self._flow.spawn(go())
        errand.add_done_callback(back)
        return errand

    def _cancel_left(self, group: list[BaseTask]) -> None:
        self._flow.settle([(task, "CANCELED", None) for task in group if not task.done()])

    async def take_back(self, under_way: list[asyncio.Task[None]]) -> None:
        """Hand over no more of what is under way; its tasks are CANCELED."""
        for errand in under_way:
            errand.cancel()
        if under_way:
            await asyncio.wait(under_way)

    async def _hand_to(
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
            backend.attach(self._flow.owner, self._flow.settle, self._flow.folder)
            await backend.submit_tasks(group)
        except Exception as error:
            cause = error
            if not isinstance(error, RhapsodyError):
                cause = BackendError(
                    f"backend '{backend.name}' failed: {said(error)}", backend=backend.name
                )
                cause.__cause__ = error
            self._flow.settle(
                [(task, "FAILED", {"exception": cause}) for task in group if not task.done()]
            )
        except BaseException:  # canceled, or what no engine should raise: nobody else will end them
            self._cancel_left(group)
            raise
