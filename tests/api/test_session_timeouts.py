"""`timeout` and `walltime`: a task that takes too long is stopped, or said to run on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from functions import noop, outcome
from manual import ManualBackend
from rhapsody.api import (
    ComputeTask,
    Resources,
    Session,
    TaskTimeoutError,
)
from rhapsody.backends import ConcurrentExecutionBackend


@pytest.mark.parametrize(
    "limit",
    [
        {"timeout": 0.05},
        {"resources": Resources(walltime=0.05)},
        {"timeout": 0.05, "resources": Resources(walltime="1h")},
    ],
)
async def test_a_task_that_takes_too_long_is_stopped(limit: dict[str, Any]) -> None:
    task = ComputeTask(executable="/bin/sleep", arguments=[1000], **limit)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=60)
        with pytest.raises(TaskTimeoutError, match=r"0\.05 s") as caught:
            await task
    assert task.state == "FAILED"
    assert caught.value.stopped
    assert caught.value.timeout == 0.05
    assert task.exit_code != 0


async def test_an_async_function_that_takes_too_long_is_stopped() -> None:
    async def for_ever() -> None:
        await asyncio.Event().wait()

    task = ComputeTask(function=for_ever, timeout=0.05)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        with pytest.raises(TaskTimeoutError) as caught:
            await asyncio.wait_for(outcome(task), 60)
    assert caught.value.stopped


async def test_a_thread_that_takes_too_long_is_said_to_run_on() -> None:
    release = threading.Event()
    task = ComputeTask(function=release.wait, timeout=0.05, retries=5)
    try:
        async with Session([ConcurrentExecutionBackend()]) as session:
            await session.submit_tasks([task])
            with pytest.raises(TaskTimeoutError, match="still runs") as caught:
                await asyncio.wait_for(outcome(task), 60)
            release.set()
    finally:
        release.set()
    assert not caught.value.stopped


async def test_the_clock_starts_when_the_task_does() -> None:
    task = ComputeTask(function=noop, timeout=0.01)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        await asyncio.sleep(0.05)  # time itself is what is tested
        assert task.state == "SUBMITTED"
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
    assert isinstance(task.exception, TaskTimeoutError)
    assert backend.asked_to_stop == [task.uid]


async def test_what_an_engine_says_of_an_abandoned_task_is_dropped() -> None:
    task = ComputeTask(function=noop, timeout=0.01)
    backend = ManualBackend(stoppable=False)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
        assert isinstance(task.exception, TaskTimeoutError)
        assert not task.exception.stopped
        backend.deliver(task, "DONE", return_value="too late")
        await backend.heard()
        assert backend.dropped_events == 1
    assert (task.state, task.return_value) == ("FAILED", None)


async def test_a_task_that_ends_while_it_is_stopped_for_its_timeout_has_ended() -> None:
    class InTheLastMoment(ManualBackend):
        async def _cancel(self, task: Any) -> bool:
            self.deliver(task, "DONE", return_value="just so")
            return False

    task = ComputeTask(function=noop, timeout=0.01)
    backend = InTheLastMoment()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
    assert (task.state, task.return_value) == ("DONE", "just so")


async def test_a_timeout_is_retried_with_a_new_clock() -> None:
    task = ComputeTask(function=noop, timeout=0.01, retries=1)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await backend.handed(2)
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
    assert backend.asked_to_stop == [task.uid] * 2
    assert isinstance(task.exception, TaskTimeoutError)


async def test_what_could_not_be_stopped_is_not_run_beside_itself() -> None:
    task = ComputeTask(function=noop, timeout=0.01, retries=3)
    backend = ManualBackend(stoppable=False)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
        await backend.heard()
        assert len(backend.given) == 1
    assert isinstance(task.exception, TaskTimeoutError)


async def test_a_task_that_fails_when_it_is_stopped_for_its_timeout_is_run_again() -> None:
    class Dies(ManualBackend):
        async def _cancel(self, task: Any) -> bool:
            self.deliver(task, "FAILED", exception=OSError("of the signal"))
            return False

    task = ComputeTask(function=noop, timeout=0.01, retries=1)
    backend = Dies()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await backend.handed(2)
        await backend.heard()
        backend.deliver(task, "DONE", return_value="second")
        await session.wait_tasks([task], timeout=60)
    assert (task.state, task.return_value) == ("DONE", "second")


async def test_a_timeout_of_the_first_run_is_not_one_of_the_second() -> None:
    task = ComputeTask(function=noop, timeout=0.01, retries=1)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await backend.handed(2)
        backend.deliver(task, "CANCELED")  # by the engine's own decision
        await session.wait_tasks([task], timeout=60)
    assert (task.state, task.exception) == ("CANCELED", None)


async def test_an_engine_that_raises_when_it_should_stop_a_task_hangs_nobody() -> None:
    class Angry(ManualBackend):
        async def _cancel(self, task: Any) -> bool:
            raise OSError("no answer")

    late, canceled = ComputeTask(function=noop, timeout=0.01), ComputeTask(function=noop, retries=1)
    backend = Angry()
    async with Session([backend]) as session:
        await session.submit_tasks([late, canceled])
        backend.deliver(late, "RUNNING")
        await session.wait_tasks([late], timeout=60)
        with pytest.raises(OSError, match="no answer"):
            await session.cancel(canceled)
        # It runs on, as if nobody had asked: its retry is still its own.
        backend.deliver(canceled, "FAILED", exception=KeyError())
        await backend.handed(3)
        backend.deliver(canceled, "DONE")
        await session.wait_tasks([canceled], timeout=60)
    assert isinstance(late.exception, TaskTimeoutError)
    assert not late.exception.stopped
    assert canceled.state == "DONE"
