"""Backends that cannot start, are slow to, or raise when they are given tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from functions import noop
from manual import ManualBackend, SlowToStart
from rhapsody.api import (
    BackendError,
    ComputeTask,
    Session,
)
from rhapsody.backends import NoopExecutionBackend


class Broken(ManualBackend):
    """Cannot be started, as often as it is told."""

    def __init__(self, name: str = "broken", failures: int = 1_000_000) -> None:
        super().__init__(name)
        self.failures = failures

    async def _start(self) -> None:
        await super()._start()
        if self.starts <= self.failures:
            raise BackendError("no scheduler answers", backend=self.name, host="node1")


class Refusing(ManualBackend):
    """Its engine raises when it is given tasks."""

    def __init__(self, error: Exception) -> None:
        super().__init__("refusing")
        self.error = error

    async def _submit(self, tasks: list[Any]) -> None:
        await super()._submit(tasks)
        raise self.error


async def test_tasks_of_a_backend_that_cannot_start_fail_with_its_error() -> None:
    broken, fine = Broken(), NoopExecutionBackend()
    tasks = [ComputeTask(function=noop, backend="broken") for _ in range(3)]
    other = ComputeTask(function=noop, backend="noop")
    async with Session([broken, fine]) as session:
        await session.submit_tasks([*tasks, other])
        await session.wait_tasks([*tasks, other], timeout=60)
        with pytest.raises(BackendError, match="no scheduler answers") as caught:
            await tasks[0]
        assert session.get_statistics()["counts"] == {"FAILED": 3, "DONE": 1}
    assert (caught.value.backend, caught.value.host) == ("broken", "node1")
    assert other.state == "DONE"
    assert broken.state() == "SHUTDOWN"


async def test_awaiting_a_backend_that_cannot_start_raises_and_may_be_tried_again() -> None:
    backend = Broken(failures=2)
    for _ in range(2):
        with pytest.raises(BackendError, match="no scheduler answers"):
            await backend
    assert backend.state() == "INITIALIZED"
    assert await backend is backend
    assert (backend.state(), backend.starts) == ("RUNNING", 3)
    await backend.shutdown()


async def test_a_retry_starts_a_backend_that_could_not_start() -> None:
    task = ComputeTask(function=noop, retries=2)
    backend = Broken(failures=2)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        await backend.handed(1)
        backend.deliver(task, "DONE")
        await session.wait_tasks([task])
    assert (task.state, backend.starts) == ("DONE", 3)


@pytest.mark.parametrize(
    "error", [BackendError("full", transient=True), OSError("full"), KeyError(3)]
)
async def test_an_engine_that_raises_fails_its_tasks_with_a_typed_error(error: Exception) -> None:
    tasks = [ComputeTask(function=noop) for _ in range(3)]
    async with Session([Refusing(error)]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=60)
    for task in tasks:
        assert task.state == "FAILED"
        assert isinstance(task.exception, BackendError)
        assert task.exception is error or task.exception.__cause__ is error


class Exit(BaseException):
    """As some libraries have them: no error, and not asyncio's either."""


async def test_what_no_engine_should_raise_leaves_no_task_behind() -> None:
    """Neither in the author's submit, nor in the background, where a child is handed over."""

    class Leaving(ManualBackend):
        async def _submit(self, tasks: list[Any]) -> None:
            await super()._submit(tasks)
            if len(self.given) > 1:
                raise Exit

    backend = await Leaving()
    parent, late = ComputeTask(function=noop), ComputeTask(function=noop)
    child = ComputeTask(function=noop, after=[parent])
    async with Session([backend]) as session:
        heard: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: heard.append(what))
        await session.submit_tasks([parent, child])
        backend.deliver(parent, "DONE")
        await session.wait_tasks([child], timeout=30)
        with pytest.raises(Exit):
            await session.submit_tasks([late])
        await session.wait_tasks([late], timeout=30)
    assert (child.state, late.state) == ("CANCELED", "CANCELED")


async def test_two_waits_for_a_start_make_one_start() -> None:
    backend = SlowToStart()
    tasks = [ComputeTask(function=noop) for _ in range(2)]
    async with Session([backend]) as session:
        submits = [asyncio.create_task(session.submit_tasks([task])) for task in tasks]
        await backend.begun.wait()
        backend.may_start.set()
        await asyncio.gather(*submits, _started(backend))
        await backend.handed(2)
        for task in tasks:
            backend.deliver(task, "DONE")
        await session.wait_tasks(tasks)


async def _started(backend: ManualBackend) -> ManualBackend:
    return await backend


async def test_a_backend_that_is_slow_to_start_holds_up_no_other() -> None:
    """Neither the tasks of another one behind it in a large submit, nor their children."""
    slow, fast = SlowToStart(), ManualBackend("fast")
    late = [ComputeTask(function=noop, backend="slow") for _ in range(3000)]
    soon = [ComputeTask(function=noop, backend="fast") for _ in range(2)]
    child = ComputeTask(function=noop, backend="fast", after=[soon[0]])
    async with Session([slow, fast]) as session:
        submit = asyncio.create_task(session.submit_tasks([soon[0], *late, soon[1], child]))
        assert await asyncio.wait_for(fast.handed(2), 30) == soon
        fast.deliver_burst([(task, "DONE", None) for task in soon])
        assert await asyncio.wait_for(fast.handed(3), 30) == [*soon, child]
        assert not submit.done()  # it ends when all has been handed over
        slow.may_start.set()
        await submit
        assert slow.given == late  # in the order of the submit
