"""Starting and ending a backend: await, `async with`, shutdown, and what comes between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from functions import noop
from manual import ManualBackend
from rhapsody.api import (
    BackendError,
    ComputeTask,
)
from rhapsody.backends import (
    BaseExecutionBackend,
    ConcurrentExecutionBackend,
    NoopExecutionBackend,
)


@pytest.mark.parametrize("make", [NoopExecutionBackend, ConcurrentExecutionBackend, ManualBackend])
async def test_the_ways_to_start_a_backend(make: Callable[..., BaseExecutionBackend]) -> None:
    backend = make(name="mine")
    assert (backend.name, backend.state()) == ("mine", "INITIALIZED")
    assert await backend is backend
    assert backend.state() == "RUNNING"
    assert await backend is backend
    await backend.shutdown()
    await backend.shutdown()
    assert backend.state() == "SHUTDOWN"

    async with make() as backend:
        assert backend.state() == "RUNNING"
    assert backend.state() == "SHUTDOWN"

    one, other = await asyncio.gather(make(name="one"), make(name="other"))
    assert (one.state(), other.state()) == ("RUNNING", "RUNNING")
    await asyncio.gather(one.shutdown(), other.shutdown())

    never = make()
    await never.shutdown()
    assert never.state() == "SHUTDOWN"


@pytest.mark.parametrize("cls", [NoopExecutionBackend, ConcurrentExecutionBackend, ManualBackend])
async def test_create_gives_a_started_backend(cls: type[BaseExecutionBackend]) -> None:
    backend = await cls.create(name="made")
    assert (type(backend), backend.name, backend.state()) == (cls, "made", "RUNNING")
    await backend.shutdown()


@pytest.mark.parametrize("cls", [NoopExecutionBackend, ConcurrentExecutionBackend, ManualBackend])
async def test_a_backend_that_is_down_stays_down(cls: type[BaseExecutionBackend]) -> None:
    backend = await cls.create()
    await backend.shutdown()
    with pytest.raises(BackendError, match="is shut down") as caught:
        await backend
    assert caught.value.backend == backend.name
    with pytest.raises(BackendError, match="is shut down"):
        await backend.submit_tasks([ComputeTask(function=noop)])
    assert await backend.cancel_task("task") is False
    assert await backend.cancel_all_tasks() == 0


async def test_a_backend_shuts_down_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError):
        async with ManualBackend() as backend:
            raise ZeroDivisionError
    assert backend.stops == 1


async def test_a_canceled_start_is_begun_once() -> None:
    class Slow(ManualBackend):
        def __init__(self) -> None:
            super().__init__()
            self.may_start = asyncio.Event()

        async def _start(self) -> None:
            await super()._start()
            await self.may_start.wait()

    backend = Slow()

    async def start() -> None:
        await backend

    impatient = asyncio.create_task(start())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    backend.may_start.set()
    await backend
    assert (backend.starts, backend.state()) == (1, "RUNNING")
    await backend.shutdown()


async def test_shutdown_settles_what_an_engine_leaves_behind() -> None:
    backend = await ManualBackend()
    heard: list[tuple[str, str]] = []
    backend.register_callback(lambda task, state: heard.append((task["uid"], state)))
    tasks: list[dict[str, Any]] = [{"uid": uid, "function": noop} for uid in "ab"]
    await backend.submit_tasks(tasks)
    backend.deliver(tasks[0], "DONE")  # reported, not yet taken in
    await backend.shutdown()
    assert heard == [("a", "DONE"), ("b", "FAILED")]
    assert isinstance(tasks[1]["exception"], BackendError)
    backend.deliver(tasks[1], "DONE")
    await backend.heard()
    assert (tasks[1]["state"], backend.dropped_events) == ("FAILED", 1)


@pytest.mark.parametrize(
    "given",
    [
        {"executor": 5},
        {"executor": ProcessPoolExecutor},
        {"slots": 0},
        {"slots": -1},
        {"slots": True},
        {"slots": 1.0},
        {"slots": "2"},
        {"grace": "x"},
        {"grace": None},
        {"grace": True},
        {"grace": -1},
        {"grace": float("nan")},
        {"grace": float("inf")},
        {"name": None},
        {"name": ""},
        {"name": 5},
    ],
)
def test_the_local_backend_refuses_what_it_cannot_use(given: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match="must be"):
        ConcurrentExecutionBackend(**given)
