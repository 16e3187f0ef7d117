"""as_completed, map and forget."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import Any

import pytest

from functions import double, noop
from manual import ManualBackend
from rhapsody.api import (
    ComputeTask,
    Session,
    SessionError,
    TaskValidationError,
)
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend


async def test_as_completed_gives_tasks_in_the_order_of_their_ends() -> None:
    a, b, c = tasks = [ComputeTask(function=noop, uid=uid) for uid in "abc"]
    backend = ManualBackend()
    async with Session([backend]) as session:
        futures = await session.submit_tasks(tasks)
        backend.deliver(b, "DONE")
        await session.wait_tasks([b])
        futures[2].cancel()  # gives up that future, and nothing else
        seen = []
        follow = {"b": (a, "FAILED"), "a": (c, "CANCELED")}
        async for task in session.as_completed(tasks):
            seen.append((task.uid, task.state))
            if task.uid in follow:
                backend.deliver(*follow[task.uid])
    assert seen == [("b", "DONE"), ("a", "FAILED"), ("c", "CANCELED")]


async def test_as_completed_waits_for_tasks_not_for_futures() -> None:
    first, second = ComputeTask(function=noop), ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        futures = await session.submit_tasks([first, second])
        seen: list[tuple[Any, str]] = []

        async def follow() -> None:
            async for task in session.as_completed([first, second]):
                seen.append((task, task.state))

        following = asyncio.create_task(follow())
        await asyncio.sleep(0)
        futures[0].cancel()  # somebody else gives up on it meanwhile
        await backend.heard()
        assert seen == []
        backend.deliver(second, "DONE")
        await backend.heard()
        backend.deliver(first, "DONE")
        await following
    assert seen == [(second, "DONE"), (first, "DONE")]


async def test_as_completed_may_be_left_early() -> None:
    tasks = [ComputeTask(function=double, args=(n,)) for n in range(20)]
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks(tasks)
        async for _ in session.as_completed(tasks):
            break
        await session.wait_tasks(tasks)
    assert {task.state for task in tasks} == {"DONE"}


async def test_as_completed_ends_when_the_session_does() -> None:
    tasks = [ComputeTask(function=noop) for _ in range(3)]
    session = Session([ManualBackend()])
    await session.submit_tasks(tasks)

    async def count() -> int:
        return len([task async for task in session.as_completed(tasks)])

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    await session.close()
    assert await counting == 3


async def test_map_gives_values_in_order() -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        assert await session.map(double, range(50)) == [2 * n for n in range(50)]
        assert await session.map(double, []) == []
        assert await session.map(double, iter("ab"), retries=1) == ["aa", "bb"]


async def test_map_raises_what_the_first_failed_call_raised() -> None:
    def picky(x: int) -> int:
        if x in (3, 5):
            raise ValueError(f"not {x}")
        return x

    async with Session([ConcurrentExecutionBackend()]) as session:
        with pytest.raises(ValueError, match="not 3"):
            await session.map(picky, range(8))
        # All of them have ended, and nothing is left behind.
        assert session.get_statistics()["counts"] == {"DONE": 6, "FAILED": 2}


async def test_map_gives_its_fields_to_each_task() -> None:
    backend = ManualBackend("second")
    async with Session([NoopExecutionBackend(), backend]) as session:
        mapping = asyncio.create_task(session.map(double, [1, 2], backend="second", timeout=50))
        for task in list(await backend.handed(2)):
            assert task.timeout == 50
            backend.deliver(task, "DONE", return_value=task.args)
        assert await mapping == [(1,), (2,)]
        with pytest.raises(TaskValidationError, match="unknown argument"):
            await session.map(double, [1], speed=3)


async def test_forget_lets_go_of_tasks() -> None:
    class Value:
        pass

    async with Session([ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=Value, uid="again")
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        value = weakref.ref(task.return_value)
        gone = weakref.ref(task)
        session.forget([task])
        del task
        gc.collect()
        # The thread that made the value may still be in the call that reported it.
        until = time.monotonic() + 10
        while value() or gone():
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
            gc.collect()
        # The statistics remember, and the uid is free again.
        assert session.get_statistics()["counts"] == {"DONE": 1}
        await session.submit_tasks([ComputeTask(function=Value, uid="again")])


async def test_a_forgotten_task_keeps_its_results_for_who_holds_it() -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=double, args=(4,))
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        session.forget([task])
        assert task.return_value == 8
        assert await task is task
        with pytest.raises(SessionError, match="forgotten"):
            session.forget([task])


async def test_forget_takes_all_or_none() -> None:
    ended, running = ComputeTask(function=noop), ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([ended, running])
        backend.deliver(ended, "DONE")
        await session.wait_tasks([ended])
        with pytest.raises(SessionError, match="cannot be forgotten yet"):
            session.forget([ended, running])
        session.forget([ended])
