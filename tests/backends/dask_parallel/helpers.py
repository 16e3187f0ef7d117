"""What several of these tests use; workers import it too, for the functions."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

from rhapsody.api import ComputeTask, Session

# Typed in some releases of distributed and untyped in others.
distributed: Any = importlib.import_module("distributed")
Client, LocalCluster, Security = distributed.Client, distributed.LocalCluster, distributed.Security


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something outside that has no event."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.02)


async def ended(session: Session, *tasks: ComputeTask) -> tuple[ComputeTask, ...]:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=60)
    return tasks


def options(**values: Any) -> dict[str, Any]:
    return {"task_backend_specific_kwargs": values}


def add(a: Any, b: Any = 1) -> Any:
    return a + b


async def add_later(a: int, b: int = 1) -> int:
    await asyncio.sleep(0.01)
    return a + b


class OnlyThere:
    """Comes to life on a worker, and nowhere else."""

    def __init__(self, pid: int, value: int) -> None:
        self.pid = pid
        self.value = value

    def __reduce__(self) -> Any:
        return _only_there, (self.pid, self.value)


def _only_there(pid: int, value: int) -> OnlyThere:
    if os.getpid() == pid:
        raise RuntimeError("this was not to come here")
    return OnlyThere(pid, value)
