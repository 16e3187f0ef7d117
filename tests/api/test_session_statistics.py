"""get_statistics: counts of states by backend, and latencies in seconds."""

from __future__ import annotations

import threading
from collections import Counter

from functions import double, noop
from manual import ManualBackend
from rhapsody.api import (
    ComputeTask,
    Session,
)
from rhapsody.backends import ConcurrentExecutionBackend


async def test_statistics_count_states_by_backend() -> None:
    one, two = ManualBackend("one"), ManualBackend("two")
    tasks = [ComputeTask(function=noop, uid=uid, backend="one") for uid in "abcde"]
    other = ComputeTask(function=noop, backend="two")
    child = ComputeTask(function=noop, after=[other], backend="two")
    async with Session([one, two]) as session:
        assert session.get_statistics()["counts"] == Counter()
        await session.submit_tasks([*tasks, other, child])
        assert session.get_statistics()["counts"] == {"PENDING": 7}
        for task, state in zip(tasks, ["RUNNING", "DONE", "FAILED", "CANCELED"], strict=False):
            one.deliver(task, state)
        two.deliver(other, "RUNNING")
        await one.heard()
        stats = session.get_statistics()
        assert isinstance(stats["counts"], Counter)
        assert stats["counts"] == {
            "PENDING": 2,
            "RUNNING": 2,
            "DONE": 1,
            "FAILED": 1,
            "CANCELED": 1,
        }
        assert stats["backends"] == {
            "one": {"RUNNING": 1, "DONE": 1, "FAILED": 1, "CANCELED": 1},
            "two": {"RUNNING": 1},
        }
        one.deliver(tasks[0], "DONE")
        one.deliver(tasks[4], "DONE")
        two.deliver(other, "DONE")
        await two.handed(2)
        two.deliver(child, "DONE")
        await session.wait_tasks([*tasks, child])
        session.forget(tasks)
        assert session.get_statistics()["counts"] == {"DONE": 5, "FAILED": 1, "CANCELED": 1}


async def test_statistics_measure_seconds() -> None:
    task = ComputeTask(executable="/bin/sleep", arguments=[0.2])
    async with Session([ConcurrentExecutionBackend()]) as session:
        assert session.get_statistics()["summary"] == {
            "avg_total": 0.0,
            "avg_queue": 0.0,
            "avg_execution": 0.0,
        }
        await session.submit_tasks([task])
        await task
        summary = session.get_statistics()["summary"]
    assert 0.2 <= summary["avg_execution"] <= summary["avg_total"] < 60
    assert summary["avg_queue"] >= 0
    assert summary["avg_total"] >= summary["avg_queue"]


async def test_the_queue_is_what_a_task_waits_for() -> None:
    tasks = [ComputeTask(executable="/bin/sleep", arguments=[0.2]) for _ in range(2)]
    async with Session([ConcurrentExecutionBackend(slots=1)]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        assert session.get_statistics()["summary"]["avg_queue"] >= 0.1


async def test_statistics_may_be_read_from_any_thread() -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        stop = threading.Event()
        seen: list[int] = []

        def read() -> None:
            while not stop.is_set():
                seen.append(session.get_statistics()["counts"]["DONE"])

        reader = threading.Thread(target=read)
        reader.start()
        try:
            await session.map(double, range(2000))
        finally:
            stop.set()
            reader.join()
    assert seen == sorted(seen)
