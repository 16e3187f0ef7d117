"""Waiting for tasks: wait_tasks, the futures of a submit, await; and what giving up on one does."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from functions import double, fail, noop, outcome
from manual import ManualBackend
from rhapsody.api import (
    ComputeTask,
    Session,
    SessionError,
    TaskExecutionError,
)
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend


async def test_the_three_ways_of_waiting_give_the_task_itself() -> None:
    tasks = [ComputeTask(function=double, args=(n,)) for n in range(6)]
    async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
        futures = await session.submit_tasks(tasks)
        assert all(isinstance(future, asyncio.Future) for future in futures)
        assert await asyncio.gather(*futures) == tasks
        assert await asyncio.gather(*tasks) == tasks
        assert await tasks[0] is tasks[0]
        assert await session.wait_tasks(tasks) == tasks
    assert [task.return_value for task in tasks] == [0, 2, 4, 6, 8, 10]


async def test_futures_come_in_the_order_of_the_tasks() -> None:
    tasks = [ComputeTask(function=double, uid=f"t{n}") for n in range(3000)]
    async with Session([NoopExecutionBackend()]) as session:
        futures = await session.submit_tasks(iter(tasks))  # any iterable
        assert [task.uid for task in await asyncio.gather(*futures)] == [t.uid for t in tasks]


async def test_wait_tasks_never_raises_for_a_task() -> None:
    tasks = [
        ComputeTask(function=fail),
        ComputeTask(executable="/bin/false"),
        ComputeTask(executable="/there/is/no/such/program"),
        ComputeTask(function=double, args=(1,)),
    ]
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks(tasks)
        assert await session.wait_tasks(tasks) == tasks
    assert [task.state for task in tasks] == ["FAILED", "FAILED", "FAILED", "DONE"]
    assert [type(task.exception) for task in tasks[:3]] == [
        KeyError,
        TaskExecutionError,
        TaskExecutionError,
    ]
    assert [task.exit_code for task in tasks] == [1, 1, 127, 0]


async def test_wait_tasks_takes_one_task_and_none() -> None:
    task = ComputeTask(function=noop)
    async with Session([NoopExecutionBackend()]) as session:
        assert await session.submit_tasks([]) == []
        assert await session.wait_tasks([]) == []
        await session.submit_tasks([task])
        assert await session.wait_tasks(task) == [task]


async def test_one_task_stands_for_a_list_of_it() -> None:
    async with Session([NoopExecutionBackend()]) as session:
        task = ComputeTask(function=noop)
        other: Any = {"function": noop}
        await session.submit_tasks([task, other])
        assert [ended async for ended in session.as_completed(task)] == [task]
        assert [ended async for ended in session.as_completed(other)] == [other]
        session.forget(task)
        session.forget(other)
        with pytest.raises(SessionError, match="was forgotten"):
            await session.cancel(task)


async def test_wrong_arguments_are_session_errors() -> None:
    wrong: Any = 5
    with pytest.raises(SessionError, match="work_dir must be the path of a folder, not 5"):
        Session(work_dir=wrong)
    async with Session([NoopExecutionBackend()]) as session:
        text: Any = "task.000001"
        for given in (wrong, text):
            with pytest.raises(SessionError, match="a task or a list of tasks is needed"):
                await session.wait_tasks(given)
        with pytest.raises(SessionError, match="a task or a list of tasks is needed"):
            await anext(session.as_completed(wrong))
        with pytest.raises(SessionError, match="a task or a list of tasks is needed, not 5"):
            session.forget(wrong)
        limits: list[Any] = ["x", float("nan")]
        for limit in limits:
            with pytest.raises(SessionError, match="timeout must be seconds"):
                await session.wait_tasks([], timeout=limit)
        with pytest.raises(SessionError, match="map takes a list of items, not 5"):
            await session.map(noop, wrong)
        own: list[dict[str, Any]] = [{"args": (1,)}, {"executable": "x"}]
        for fields in own:
            with pytest.raises(SessionError, match="= is not accepted"):
                await session.map(noop, [1], **fields)


async def test_a_timeout_of_the_wait_leaves_the_tasks_alone() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        with pytest.raises(asyncio.TimeoutError):
            await session.wait_tasks([task], timeout=0.01)
        assert task.state == "SUBMITTED"
        assert not backend.asked_to_stop
        backend.deliver(task, "RUNNING")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(outcome(task), 0.01)
        assert task.state == "RUNNING"
        backend.deliver(task, "DONE", return_value=1)
        await session.wait_tasks([task], timeout=60)
    assert (task.state, task.return_value) == ("DONE", 1)


async def test_giving_up_on_a_future_leaves_the_task_alone() -> None:
    first, second = ComputeTask(function=noop), ComputeTask(function=fail)
    backend = ManualBackend()
    async with Session([backend]) as session:
        futures = await session.submit_tasks([first, second])
        for future in futures:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(future, 0.01)
            assert future.cancelled()
        waiting = asyncio.create_task(session.wait_tasks([first, second]))
        backend.deliver(first, "DONE", return_value=7)
        backend.deliver(second, "FAILED", exception=KeyError("x"))
        await waiting
        assert await first is first
        with pytest.raises(KeyError):
            await second
    assert (first.state, second.state) == ("DONE", "FAILED")
    assert not backend.asked_to_stop


async def test_a_canceled_waiter_cancels_no_task() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        (future,) = await session.submit_tasks([task])
        waiters = [
            asyncio.create_task(outcome(task)),
            asyncio.create_task(session.wait_tasks([task])),
        ]
        await asyncio.sleep(0)
        for waiter in waiters:
            waiter.cancel()
        assert [type(e) for e in await asyncio.gather(*waiters, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 2
        assert not future.done()
        backend.deliver(task, "DONE")
        assert await future is task


async def test_a_failure_that_nobody_looks_at_warns_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=fail)
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        session.forget([task])
        del task
    gc.collect()
    assert not [record for record in caplog.records if "never retrieved" in record.message]


@pytest.mark.parametrize("wait", ["wait_tasks", "as_completed", "forget", "cancel"])
async def test_a_task_of_another_session_is_refused(wait: str) -> None:
    async with (
        Session([NoopExecutionBackend()]) as here,
        Session([NoopExecutionBackend()]) as there,
    ):
        task = ComputeTask(function=noop)
        same_uid = ComputeTask(function=noop, uid=task.uid)
        never = ComputeTask(function=noop)
        await there.submit_tasks([task])
        await here.submit_tasks([same_uid])
        backend = ManualBackend("later")
        here.add_backend(backend)
        for wrong in (task if wait != "wait_tasks" else never, never):
            with pytest.raises(SessionError, match="not submitted to session"):
                if wait == "wait_tasks":
                    await here.wait_tasks([wrong])
                elif wait == "as_completed":
                    _ = [ended async for ended in here.as_completed([wrong])]
                elif wait == "forget":
                    here.forget([wrong])
                else:
                    await here.cancel(wrong)
