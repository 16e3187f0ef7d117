"""Canceling a task: before its backend has it, while it waits there, while it runs."""

from __future__ import annotations

import asyncio
import threading

import pytest

from functions import noop
from manual import ManualBackend, SlowToStart
from rhapsody.api import (
    ComputeTask,
    Session,
)
from rhapsody.backends import ConcurrentExecutionBackend


async def test_cancel_stops_a_task() -> None:
    running = ComputeTask(executable="/bin/sleep", arguments=[1000])
    queued = ComputeTask(executable="/bin/sleep", arguments=[1000])
    done = ComputeTask(function=noop)
    async with Session([ConcurrentExecutionBackend(slots=1)]) as session:
        futures = await session.submit_tasks([running, queued, done])
        await done
        assert await session.cancel(queued) is True
        assert await session.cancel(running) is True
        assert await session.cancel(running) is False  # it has ended already
        assert await session.cancel(done) is False
        with pytest.raises(asyncio.CancelledError):
            await futures[0]
        with pytest.raises(asyncio.CancelledError):
            await queued
        await session.wait_tasks([running, queued])
        assert session.get_statistics()["counts"] == {"CANCELED": 2, "DONE": 1}
    assert (running.state, queued.state, done.state) == ("CANCELED", "CANCELED", "DONE")


async def test_cancel_never_claims() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend(stoppable=False)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        assert await session.cancel(task) is False
        assert task.state == "RUNNING"
        backend.deliver(task, "DONE", return_value=1)
        await task
    assert (task.state, task.return_value) == ("DONE", 1)


async def test_a_running_thread_cannot_be_canceled_and_cancel_says_so() -> None:
    begun, release = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        release.wait()
        return "worked on"

    task = ComputeTask(function=work)
    try:
        async with Session([ConcurrentExecutionBackend()]) as session:
            await session.submit_tasks([task])
            await asyncio.to_thread(begun.wait)
            assert await session.cancel(task) is False
            release.set()
            await task
    finally:
        release.set()
    assert task.return_value == "worked on"


async def test_a_task_can_be_canceled_before_its_backend_is_up() -> None:
    task = ComputeTask(function=noop)
    backend = SlowToStart()
    async with Session([backend]) as session:
        submit = asyncio.create_task(session.submit_tasks([task]))
        await backend.begun.wait()
        assert await session.cancel(task) is True
        backend.may_start.set()
        await submit
        await backend.heard()
        assert backend.given == []
    assert task.state == "CANCELED"


async def test_a_task_can_be_canceled_while_others_wait_for_its_backend() -> None:
    """What no backend has been given yet is canceled at once, and never run."""
    backend = SlowToStart()
    first, second, third = (ComputeTask(function=noop) for _ in range(3))
    async with Session([backend]) as session:
        submits = [
            asyncio.create_task(session.submit_tasks(tasks)) for tasks in ([first], [second, third])
        ]
        await backend.begun.wait()
        assert await session.cancel(second) is True
        backend.may_start.set()
        while backend.state() != "RUNNING":
            await asyncio.sleep(0)
        assert await session.cancel(third) is True
        await asyncio.gather(*submits)
        await backend.heard()
        assert third not in backend.given
        assert second not in backend.given
    assert (second.state, third.state) == ("CANCELED", "CANCELED")


async def test_cancel_of_one_task_twice_at_once() -> None:
    task = ComputeTask(executable="/bin/sleep", arguments=[1000])
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        assert all(await asyncio.gather(session.cancel(task), session.cancel(task)))


async def test_a_submit_that_is_canceled_leaves_no_task_behind() -> None:
    """Whatever was reached: each of the tasks has ended when the submit has."""
    slow, fast = SlowToStart(), ManualBackend("fast")
    first = ComputeTask(function=noop, backend="slow")
    second = ComputeTask(function=noop, backend="fast")
    child = ComputeTask(function=noop, backend="fast", after=[second])
    async with Session([slow, fast]) as session:
        submit = asyncio.create_task(session.submit_tasks([first, second, child]))
        await slow.begun.wait()
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        for task in fast.given:
            fast.deliver(task, "DONE")
        await session.wait_tasks([first, second, child], timeout=60)
        slow.may_start.set()
    assert slow.given == []
