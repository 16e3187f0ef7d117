"""What a task or its author does to the local backend keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fifos import PATIENCE
from rhapsody.api import BackendError, ComputeTask, Session, TaskTimeoutError
from rhapsody.backends import ConcurrentExecutionBackend


async def test_an_executor_that_its_owner_shuts_down_ends_what_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the jobs behind ours had their turns, so that we would have queued again."""
    monkeypatch.setattr("rhapsody.runtime.local.thread_pool._TURN", 0.0)
    executor = ThreadPoolExecutor(1)
    begun, go = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go.wait(PATIENCE)

    async with Session([await ConcurrentExecutionBackend(executor)]) as session:
        tasks = [ComputeTask(function=first), *(ComputeTask(function=os.getpid) for _ in range(5))]
        await session.submit_tasks(tasks)
        await asyncio.to_thread(begun.wait, PATIENCE)
        executor.shutdown(wait=False)
        go.set()
        await session.wait_tasks(tasks, timeout=PATIENCE)
        assert {task.state for task in tasks} == {"DONE"}
        late = ComputeTask(function=os.getpid)
        await session.submit_tasks([late])
        await session.wait_tasks([late], timeout=PATIENCE)
    assert late.state == "FAILED"
    assert isinstance(late.exception, BackendError)
    assert "shutdown" in str(late.exception)


async def test_a_coroutine_that_will_not_be_canceled_keeps_nobody_waiting() -> None:
    go = threading.Event()

    async def stubborn() -> None:
        while not go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    try:
        async with Session([await ConcurrentExecutionBackend(grace=0.2)]) as session:
            canceled, closed = ComputeTask(function=stubborn), ComputeTask(function=stubborn)
            timed = ComputeTask(function=stubborn, timeout=0.1)
            await session.submit_tasks([canceled, closed, timed])
            await session.wait_tasks([timed], timeout=PATIENCE)
            assert isinstance(timed.exception, TaskTimeoutError)
            assert not timed.exception.stopped
            assert not await asyncio.wait_for(session.cancel(canceled), PATIENCE)
            assert canceled.state == "RUNNING"
            await asyncio.wait_for(session.close(), PATIENCE)
        assert (canceled.state, closed.state) == ("FAILED", "FAILED")
        assert "could not stop it" in str(closed.exception)
    finally:
        go.set()


async def test_a_named_pipe_as_stdin_keeps_no_other_task_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with Session([await ConcurrentExecutionBackend(slots=2)]) as session:
        reads, other = (
            ComputeTask(executable="cat", task_backend_specific_kwargs={"stdin": pipe}),
            ComputeTask(executable="true"),
        )
        await session.submit_tasks([reads, other])
        await session.wait_tasks([reads, other], timeout=PATIENCE)
        # Nobody writes to it: it is at its end.
        assert (reads.state, reads.stdout, other.state) == ("DONE", "", "DONE")
        writer = os.open(pipe, os.O_RDWR)
        os.write(writer, b"said\n")
        heard = ComputeTask(
            executable="head", arguments=["-n", 1], task_backend_specific_kwargs={"stdin": pipe}
        )
        await session.submit_tasks([heard])
        await session.wait_tasks([heard], timeout=PATIENCE)
        os.close(writer)
    assert heard.stdout == "said\n"


async def test_a_program_that_never_stops_writing_can_be_canceled() -> None:
    async with Session([await ConcurrentExecutionBackend(slots=2)]) as session:
        writers = [
            ComputeTask(executable="dd", arguments=["if=/dev/zero", "bs=1M", "count=100000"])
            for _ in range(2)
        ]
        await session.submit_tasks(writers)
        assert await asyncio.wait_for(asyncio.gather(*map(session.cancel, writers)), PATIENCE) == [
            True,
            True,
        ]
