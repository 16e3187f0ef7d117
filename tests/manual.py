"""A backend whose engine is the test: it reports what the test tells it to, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

from rhapsody.backends import BaseExecutionBackend


class ManualBackend(BaseExecutionBackend):
    """Keeps what it is given. `stoppable`: what it answers when it is told to stop a task."""

    kinds = frozenset({"function", "executable", "ai"})
    option_keys = frozenset({"speed", "colour"})

    def __init__(self, name: str = "manual", *, stoppable: bool = True) -> None:
        super().__init__(name)
        self.stoppable = stoppable
        self.given: list[Any] = []  # every task that was handed over, once per attempt
        self.asked_to_stop: list[str] = []
        self.starts = 0
        self.stops = 0
        self._news = asyncio.Event()

    async def _start(self) -> None:
        self.starts += 1

    async def _submit(self, tasks: list[Any]) -> None:
        self.given.extend(tasks)
        self._news.set()

    async def _cancel(self, task: Any) -> bool:
        self.asked_to_stop.append(task["uid"])
        self._news.set()
        if self.stoppable:
            self.deliver(task, "CANCELED")
        return self.stoppable

    async def _stop(self) -> None:
        self.stops += 1

    async def handed(self, number: int) -> list[Any]:
        """Wait until so many tasks were handed over, in all."""
        await self._until(lambda: len(self.given) >= number)
        return self.given

    async def stopping(self, uid: str) -> None:
        """Wait until it was told to stop a task."""
        await self._until(lambda: uid in self.asked_to_stop)

    async def _until(self, holds: Any) -> None:
        while not holds():
            self._news.clear()
            await self._news.wait()

    async def heard(self) -> None:
        """Let the loop take in what was reported, and what follows from it."""
        for _ in range(8):  # turns: the wake, a burst's end, a release, a hand-over
            await asyncio.sleep(0)


class SlowToStart(ManualBackend):
    """Starts when `may_start` is set; `begun` says that its start was asked for."""

    def __init__(self, name: str = "slow") -> None:
        super().__init__(name)
        self.begun = asyncio.Event()
        self.may_start = asyncio.Event()

    async def _start(self) -> None:
        self.begun.set()
        await self.may_start.wait()
