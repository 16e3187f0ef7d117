"""What the tests of the Dragon backend run inside Dragon; imported there, and in its workers."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from rhapsody import ComputeTask, Session
from rhapsody.backends import DragonExecutionBackendV1, DragonExecutionBackendV3

_session: Session | None = None
_backend: DragonExecutionBackendV3 | None = None


def session() -> Session:
    assert _session is not None
    return _session


def backend() -> DragonExecutionBackendV3:
    assert _backend is not None
    return _backend


async def open_session(**settings: Any) -> None:
    global _session, _backend
    _backend = DragonExecutionBackendV3(**settings)
    _session = Session(backends=[_backend])
    await _backend


async def open_both() -> None:
    """A session with V3, and with V1 by the name v1."""
    await open_session()
    v1 = DragonExecutionBackendV1(name="v1")
    session().add_backend(v1)
    await v1


async def close_session() -> float:
    began = time.monotonic()
    await session().close()
    return time.monotonic() - began


async def run(*tasks: ComputeTask, timeout: float = 60.0) -> list[ComputeTask]:
    """Submit tasks, and return them when they have ended."""
    await session().submit_tasks(tasks)
    await session().wait_tasks(tasks, timeout=timeout)
    return list(tasks)


async def start(task: ComputeTask) -> ComputeTask:
    """Submit a task, and return when it runs."""
    await session().submit_tasks([task])
    while task.state != "RUNNING":
        assert not task.done(), task
        await asyncio.sleep(0.02)
    return task


def add(a: int, b: int) -> int:
    return a + b


async def later(value: str) -> str:
    await asyncio.sleep(0.05)
    return value


def die() -> None:
    os._exit(3)


def spin(seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return "spun"


def blind(seconds: float) -> str:
    """Sleep where no exception reaches it."""
    time.sleep(seconds)
    return "woke"


class Odd(Exception):
    """An exception whose class wants other arguments than it passes on."""

    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"{code}: {hint}")
        self.code = code


def raise_odd() -> None:
    raise Odd(7, hint="look up")


def unpicklable() -> Any:
    return sys._getframe()


def large(megabytes: int) -> bytes:
    return bytes(megabytes << 20)


def host() -> str:
    import socket

    return socket.gethostname()


def affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0))
