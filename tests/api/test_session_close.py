"""The end of a session: every task is settled, whatever its backends do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from functions import double, noop, outcome
from manual import ManualBackend, SlowToStart
from rhapsody.api import (
    BackendError,
    ComputeTask,
    Session,
    SessionError,
)
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend


async def test_close_settles_everything() -> None:
    running, queued, function, stuck = (
        ComputeTask(executable="/bin/sleep", arguments=[1000]),
        ComputeTask(executable="/bin/sleep", arguments=[1000]),
        ComputeTask(function=asyncio.sleep, args=(1000,)),
        ComputeTask(function=noop, backend="manual"),
    )
    child = ComputeTask(function=noop, after=[running])
    tasks = [running, queued, function, stuck, child]
    session = Session([ConcurrentExecutionBackend(slots=1), ManualBackend()])
    futures = await session.submit_tasks(tasks)
    await session.close()
    assert all(future.done() for future in futures)
    assert [task.state for task in tasks] == ["CANCELED"] * 3 + ["FAILED", "CANCELED"]
    assert isinstance(stuck.exception, BackendError)  # nobody knows whether it was stopped
    assert "shut down" in str(stuck.exception)


async def test_close_retries_nothing() -> None:
    task = ComputeTask(function=noop, retries=5)
    backend = ManualBackend()
    session = Session([backend])
    await session.submit_tasks([task])
    await session.close()
    assert (task.state, len(backend.given)) == ("FAILED", 1)


async def test_a_wait_ends_when_the_session_does() -> None:
    task = ComputeTask(function=noop)
    session = Session([ManualBackend()])
    await session.submit_tasks([task])
    waits = [asyncio.create_task(session.wait_tasks([task])), asyncio.create_task(outcome(task))]
    await asyncio.sleep(0)
    await session.close()
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert results[0] == [task]
    assert isinstance(results[1], BackendError)


async def test_close_may_be_called_again_and_at_once() -> None:
    backend = ManualBackend()
    session = Session([backend])
    await session.submit_tasks([ComputeTask(function=noop)])
    await asyncio.gather(session.close(), session.close(), backend.shutdown())
    await session.close()
    await backend.shutdown()
    assert backend.stops == 1


async def test_a_closed_session_takes_nothing_more() -> None:
    task = ComputeTask(function=noop)
    session = Session([NoopExecutionBackend()])
    await session.submit_tasks([task])
    await task
    was_closed = session.closed
    await session.close()
    assert (was_closed, session.closed) == (False, True)
    with pytest.raises(SessionError, match="is closed"):
        await session.submit_tasks([ComputeTask(function=noop)])
    with pytest.raises(SessionError, match="is closed"):
        await session.map(double, [1])
    with pytest.raises(SessionError, match="is closed"):
        session.add_backend(ManualBackend())
    # What it knows can still be asked for.
    assert session.get_statistics()["counts"] == {"DONE": 1}
    assert await session.wait_tasks([task]) == [task]
    assert await session.cancel(task) is False
    session.forget([task])


async def test_a_session_closes_when_its_block_raises() -> None:
    backend = ManualBackend()
    task = ComputeTask(function=noop)
    with pytest.raises(ZeroDivisionError):
        async with Session([backend]) as session:
            (future,) = await session.submit_tasks([task])
            raise ZeroDivisionError
    assert future.done()
    assert backend.state() == "SHUTDOWN"


async def test_a_backend_that_cannot_stop_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(ManualBackend):
        async def _stop(self) -> None:
            raise OSError("the scheduler does not answer")

    stuck, fine = Stuck("stuck"), ManualBackend("fine")
    tasks = [ComputeTask(function=noop, backend=name) for name in ("stuck", "fine")]
    session = Session([stuck, fine])
    futures = await session.submit_tasks(tasks)
    with caplog.at_level(logging.ERROR, "rhapsody"):
        await session.close()
    assert all(future.done() for future in futures)
    assert fine.stops == 1
    assert "'stuck' did not shut down cleanly" in caplog.text
    assert "the scheduler does not answer" in caplog.text


async def test_close_while_a_backend_starts() -> None:
    backend = SlowToStart()
    tasks = [ComputeTask(function=noop) for _ in range(3)]
    session = Session([backend])
    submit = asyncio.create_task(session.submit_tasks(tasks))
    await backend.begun.wait()
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0)
    backend.may_start.set()
    await closing
    await asyncio.gather(submit, return_exceptions=True)
    assert all(task.done() for task in tasks)
    assert backend.given == []  # an engine that is down is given nothing


async def test_close_during_a_large_submit_settles_all_of_it() -> None:
    """After it every task that the session has taken has ended, and the others were refused."""
    backend = ManualBackend()
    session = Session([backend])
    tasks: list[ComputeTask] = []

    def described() -> Iterator[ComputeTask]:
        for number in range(20_000):
            child = number % 100 == 99
            task = ComputeTask(function=noop, after=tasks[-1:] if child else None)
            tasks.append(task)
            yield task

    submit = asyncio.create_task(session.submit_tasks(described()))
    await backend.handed(1)
    await session.close()
    left = [task.state for task in tasks]
    assert set(left) <= {"NEW", "CANCELED", "FAILED"}
    with pytest.raises(SessionError, match="closed during a submit"):
        await submit
    assert [task.state for task in tasks] == left
    for task in tasks:
        if task.state == "NEW":
            with pytest.raises(RuntimeError, match="not submitted"):
                await task


async def test_shutting_a_backend_down_fails_what_is_submitted_to_it_later() -> None:
    backend = ManualBackend()
    task = ComputeTask(function=noop)
    async with Session([backend]) as session:
        await backend.shutdown()
        await session.submit_tasks([task])
        with pytest.raises(BackendError, match="'manual' is shut down"):
            await task
