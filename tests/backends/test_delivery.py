"""What an engine reports: callbacks, bursts from any thread, duplicates; engines with a graph."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from functions import double, noop
from manual import ManualBackend
from rhapsody.api import (
    BackendError,
    ComputeTask,
    DependencyError,
    Session,
)
from rhapsody.backends import (
    ConcurrentExecutionBackend,
)

# ---------------------------------------------------------------------- callbacks


async def test_a_callback_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def callback(task: Any, state: str) -> None:
        heard.append(task["uid"])
        raise RuntimeError("a bug of the callback's author")

    tasks = [ComputeTask(function=noop, uid=f"t{n}") for n in range(5)]
    backend = ManualBackend()
    backend.register_callback(callback)
    async with Session([backend]) as session:
        await session.submit_tasks(tasks)
        with caplog.at_level(logging.ERROR, "rhapsody"):
            backend.deliver_burst([(task, "DONE", None) for task in tasks])
            await session.wait_tasks(tasks)
            await backend.heard()
    assert heard == [task.uid for task in tasks]
    assert {task.state for task in tasks} == {"DONE"}
    for task in tasks:
        assert f"callback of backend 'manual' failed for {task.uid}" in caplog.text
    assert "a bug of the callback's author" in caplog.text


async def test_a_callback_is_called_after_the_task_has_its_results() -> None:
    seen: list[tuple[str, Any]] = []
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    backend.register_callback(lambda task, state: seen.append((task.state, task.return_value)))
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await backend.heard()
        backend.deliver(task, "DONE", return_value=3)
        await task
    assert seen == [("RUNNING", None), ("DONE", 3)]


async def test_a_later_callback_takes_the_place_of_an_earlier() -> None:
    heard: list[str] = []
    async with ManualBackend() as backend:
        backend.register_callback(lambda task, state: heard.append("first"))
        backend.register_callback(lambda task, state: heard.append("second"))
        task = {"uid": "t", "function": noop}
        await backend.submit_tasks([task])
        backend.deliver(task, "DONE")
        await backend.heard()
    assert heard == ["second"]


# ---------------------------------------------------------------------- delivery


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often other threads wake it."""

    def __init__(self) -> None:
        super().__init__()
        self.wakes = 0

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.wakes += threading.current_thread() is not threading.main_thread()
        return super().call_soon_threadsafe(*args, **kwargs)


def in_threads(number: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_burst_from_many_threads_wakes_the_loop_once() -> None:
    async def main() -> None:
        tasks = [ComputeTask(function=noop) for _ in range(8000)]
        backend = ManualBackend()
        async with Session([backend]) as session:
            await session.submit_tasks(tasks)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, CountingLoop)
            loop.wakes = 0

            def report(number: int) -> None:
                for task in tasks[number::8]:
                    backend.deliver(task, "RUNNING")
                    backend.deliver(task, "DONE", return_value=number)

            in_threads(8, report)  # the loop stands still meanwhile
            # One, and where two threads come first at the same instant, one for each of these.
            assert 1 <= loop.wakes <= 8
            await session.wait_tasks(tasks, timeout=60)
            assert session.get_statistics()["counts"] == {"DONE": 8000}
        assert [task.return_value for task in tasks] == [n % 8 for n in range(8000)]
        assert backend.dropped_events == 0

    loop = CountingLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_a_burst_of_any_size_costs_one_wake() -> None:
    async def main() -> None:
        tasks = [ComputeTask(function=noop) for _ in range(5000)]
        backend = ManualBackend()
        async with Session([backend]) as session:
            await session.submit_tasks(tasks)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, CountingLoop)
            loop.wakes = 0
            burst = [(task, "DONE", None) for task in tasks]
            in_threads(1, lambda _: backend.deliver_burst(burst))
            assert loop.wakes == 1
            await session.wait_tasks(tasks)
            assert loop.wakes == 1

    loop = CountingLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


async def test_delivery_while_the_loop_is_at_work_loses_nothing() -> None:
    """Threads report while the loop takes in: no event is lost between two wakes."""
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        tasks = [ComputeTask(function=noop) for _ in range(6000)]
        backend = ManualBackend()
        async with Session([backend]) as session:
            await session.submit_tasks(tasks)

            def report(number: int) -> None:
                for task in tasks[number::6]:
                    backend.deliver(task, "RUNNING")
                    backend.deliver(task, "DONE")

            await asyncio.gather(*(asyncio.to_thread(report, n) for n in range(6)))
            await session.wait_tasks(tasks, timeout=60)
            assert session.get_statistics()["counts"] == {"DONE": 6000}
        assert (backend.dropped_events, session.dropped_events) == (0, 0)
    finally:
        sys.setswitchinterval(old)


async def test_a_large_burst_leaves_the_loop_to_others_in_between() -> None:
    tasks = [ComputeTask(function=noop) for _ in range(50_000)]
    backend = ManualBackend()
    turns = 0

    def turn() -> None:
        nonlocal turns
        if not tasks[-1].done():
            turns += 1
            asyncio.get_running_loop().call_soon(turn)

    async with Session([backend]) as session:
        await session.submit_tasks(tasks)
        backend.deliver_burst([(task, "DONE", None) for task in tasks])
        turn()
        await session.wait_tasks(tasks)
    assert turns >= 20


async def test_events_of_one_task_keep_their_order() -> None:
    heard: list[str] = []
    task = {"uid": "t", "function": noop}
    async with ManualBackend() as backend:
        backend.register_callback(lambda task, state: heard.append(state))
        await backend.submit_tasks([task])
        backend.deliver_burst([(task, "RUNNING", None), ("t", "DONE", {"return_value": 1})])
        await backend.heard()
    assert heard == ["RUNNING", "DONE"]


async def test_events_by_uid() -> None:
    task = ComputeTask(function=noop, uid="t")
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver("t", "RUNNING")
        backend.deliver("t", "DONE", return_value=5)
        assert (await task).return_value == 5


async def test_late_duplicate_and_unknown_events_are_dropped_and_counted() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    heard: list[str] = []
    backend.register_callback(lambda task, state: heard.append(state))
    async with Session([backend]) as session:
        (future,) = await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        backend.deliver(task, "DONE", return_value="first")
        backend.deliver(task, "DONE", return_value="second")  # duplicate
        backend.deliver(task, "FAILED", exception=KeyError())  # contradicts
        backend.deliver(task, "RUNNING")  # late
        backend.deliver("nobody", "DONE")  # unknown
        backend.deliver(ComputeTask(function=noop), "DONE")  # never submitted
        await backend.heard()
        assert await future is task
        assert session.get_statistics()["counts"] == {"DONE": 1}
    assert (task.state, task.return_value, task.exception) == ("DONE", "first", None)
    assert backend.dropped_events == 5
    assert heard == ["RUNNING", "DONE"]


async def test_a_second_running_is_dropped_and_counted() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        for _ in range(3):
            backend.deliver(task, "RUNNING")
        await backend.heard()
        assert session.get_statistics()["counts"] == {"RUNNING": 1}
        assert session.dropped_events + backend.dropped_events == 2
        backend.deliver(task, "DONE")
        await task


@pytest.mark.parametrize("state", ["NEW", "WAITING", "SUBMITTED", "DANCING", ""])
async def test_states_that_a_running_task_cannot_take_are_dropped(state: str) -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        backend.deliver(task, state)
        await backend.heard()
        assert task.state == "RUNNING"
        assert session.dropped_events + backend.dropped_events == 1
        backend.deliver(task, "DONE")
        await task


async def test_a_copy_of_a_task_stands_for_the_task() -> None:
    """As engines have it that send tasks away and get them back."""
    tasks = [ComputeTask(function=noop, uid=f"t{n}") for n in range(3)]
    copies = [ComputeTask(function=noop, uid=f"t{n}") for n in range(3)]
    backend = ManualBackend()
    async with Session([backend]) as session:
        futures = await session.submit_tasks(tasks)
        backend.deliver(copies[0], "DONE", return_value=1)
        backend.deliver_all(copies[1:], "DONE")
        await session.wait_tasks(tasks, timeout=60)
        assert await asyncio.gather(*futures) == tasks
    assert tasks[0].return_value == 1
    assert {copy.state for copy in copies} == {"NEW"}


async def test_an_engine_that_reports_too_early_and_then_rightly() -> None:
    backend = ManualBackend()
    task = ComputeTask(function=noop)
    with pytest.raises(BackendError, match="reports before it is started"):
        backend.deliver(task, "DONE")
    assert backend.dropped_events == 1
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        assert task.state == "SUBMITTED"
        backend.deliver(task, "DONE")
        await session.wait_tasks([task], timeout=60)
    assert backend.dropped_events == 1


def test_an_engine_that_reports_when_the_loop_is_gone() -> None:
    backend = ManualBackend()
    task = ComputeTask(function=noop)

    async def main() -> None:
        await backend
        await backend.submit_tasks([task])

    asyncio.run(main())
    for number in range(1, 4):
        backend.deliver(task, "DONE")
        assert backend.dropped_events == number


async def test_results_in_an_event_of_an_engine_that_raised_are_not_believed() -> None:
    class Confused(ManualBackend):
        async def _submit(self, tasks: list[Any]) -> None:
            self.deliver(tasks[0], "DONE", return_value="done?")
            raise OSError("or not")

    tasks = [ComputeTask(function=noop) for _ in range(2)]
    backend = Confused()
    async with Session([backend]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=60)
        await backend.heard()
        assert session.get_statistics()["counts"] == {"FAILED": 2}
    assert backend.dropped_events == 1
    assert tasks[0].return_value is None


# ---------------------------------------------------------------------- engines with a graph


class Knowing(ManualBackend):
    native_dependencies = True


async def test_an_engine_that_knows_dependencies_gets_children_at_once() -> None:
    backend = Knowing()
    parent = ComputeTask(function=noop)
    child = ComputeTask(function=double, args=(parent,))
    async with Session([backend, ConcurrentExecutionBackend()]) as session:
        elsewhere = ComputeTask(function=double, args=(parent,), backend="concurrent")
        await session.submit_tasks([parent, child, elsewhere])
        assert backend.given == [parent, child]
        assert (child.state, elsewhere.state) == ("SUBMITTED", "WAITING")
        assert backend.inputs_of(child) == ((parent,), {})  # for the engine to resolve
        backend.deliver_burst([(parent, "DONE", {"return_value": 2}), (child, "DONE", None)])
        await session.wait_tasks([child, elsewhere])
        assert elsewhere.return_value == 4
        later = ComputeTask(function=double, args=(parent,))
        await session.submit_tasks([later])
        assert backend.inputs_of(later) == ((2,), {})
        backend.deliver(later, "DONE")
        await later


async def test_a_parent_with_retries_is_waited_for_here() -> None:
    """The engine would not know that its first failure is not its last word."""
    backend = Knowing()
    parent = ComputeTask(function=noop, retries=1)
    child = ComputeTask(function=double, args=(parent,))
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child])
        backend.deliver(parent, "FAILED", exception=OSError())
        await backend.handed(2)
        assert backend.given == [parent, parent]
        backend.deliver(parent, "DONE", return_value=1)
        await backend.handed(3)
        backend.deliver(child, "DONE")
        await child


async def test_a_failed_parent_of_a_knowing_engine() -> None:
    backend = Knowing()
    parent = ComputeTask(function=noop)
    child = ComputeTask(function=double, args=(parent,), retries=3)
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child])
        cause = KeyError("x")
        backend.deliver(parent, "FAILED", exception=cause)
        backend.deliver(child, "FAILED", exception=DependencyError(child.uid, parent.uid, cause))
        await session.wait_tasks([child])
        assert len(backend.given) == 2
    assert isinstance(child.exception, DependencyError)
