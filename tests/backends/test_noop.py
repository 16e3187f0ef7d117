"""The no-op backend, and with it the session's own cost: memory per task, and a loop kept free.

How fast it is, the benchmarks say; here are bounds that hold on any machine.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from rhapsody.api import AITask, ComputeTask, Resources, Session
from rhapsody.backends import NoopExecutionBackend


def never() -> None:
    raise AssertionError("a no-op backend runs nothing")


TASKS: list[Callable[[], Any]] = [
    lambda: ComputeTask(function=never),
    lambda: ComputeTask(function=never, args=(1,), kwargs={"x": 2}),
    lambda: ComputeTask(executable="/there/is/no/such/program", arguments=["x"]),
    lambda: AITask("why?", model="m"),
    lambda: {"function": never},
    lambda: {"executable": "x"},
    lambda: {"prompt": "why?", "model": "m"},
    lambda: ComputeTask(function=never, retries=3, timeout=5),
    lambda: ComputeTask(executable="x", resources=Resources(ranks=10_000)),
    lambda: ComputeTask(executable="x", task_backend_specific_kwargs={"of": "any backend"}),
]


@pytest.mark.parametrize("make", TASKS)
async def test_every_task_is_done_at_once_and_not_run(make: Callable[[], Any]) -> None:
    task = make()
    async with Session([NoopExecutionBackend()]) as session:
        (future,) = await session.submit_tasks([task])
        assert await future is task
    assert (task["state"], task["backend"]) == ("DONE", "noop")
    assert task["return_value"] is task["exception"] is task["response"] is None


async def test_dry_run_of_a_graph() -> None:
    first = ComputeTask(function=never)
    second = ComputeTask(executable="x", arguments=[first])
    third = ComputeTask(function=never, args=(second,), after=[first])
    async with Session([NoopExecutionBackend()]) as session:
        await session.submit_tasks([third, second, first])
        await session.wait_tasks([third], timeout=60)
    assert {task.state for task in (first, second, third)} == {"DONE"}


async def test_a_submit_of_a_hundred_thousand_leaves_the_loop_to_others() -> None:
    """No single stall of half a second: a generous bound, the benchmark has the real one."""
    tasks = [ComputeTask(function=never) for _ in range(100_000)]
    longest = 0.0
    last = time.perf_counter()
    turns = 0
    over = False

    def tick() -> None:
        nonlocal longest, last, turns
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        turns += 1
        if not over:
            asyncio.get_running_loop().call_soon(tick)

    async with Session([NoopExecutionBackend()]) as session:
        tick()
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        over = True
        assert session.get_statistics()["counts"] == {"DONE": 100_000}
    assert turns > 20
    assert longest < 0.5


async def test_a_submit_of_many_children_leaves_the_loop_to_others() -> None:
    tasks = [ComputeTask(function=never)]
    for _ in range(20_000):
        tasks.append(ComputeTask(function=never, after=[tasks[len(tasks) // 2]]))
    turns = 0
    over = False

    def tick() -> None:
        nonlocal turns
        turns += 1
        if not over:
            asyncio.get_running_loop().call_soon(tick)

    async with Session([NoopExecutionBackend()]) as session:
        tick()
        await session.submit_tasks(tasks)
        over = True
        await session.wait_tasks(tasks, timeout=60)
    assert turns > 5
    assert {task.state for task in tasks} == {"DONE"}


# ---------------------------------------------------------------------- memory

MILLION = """
import asyncio, re
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import NoopExecutionBackend

def noop(): pass

def peak():
    # KiB; of this program's memory, where ru_maxrss would have that of the one that forked it too
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1])

async def main():
    async with Session([NoopExecutionBackend()]) as session:
        base = peak()
        tasks = [ComputeTask(function=noop) for _ in range(1_000_000)]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        assert session.get_statistics()["counts"] == {"DONE": 1_000_000}
        assert all(task.state == "DONE" for task in tasks)
        print(base, peak())

asyncio.run(main())
"""

FORGETFUL = """
import asyncio, gc
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import NoopExecutionBackend

def noop(): pass

def now():
    gc.collect()  # when the collector runs by itself differs between versions of Python
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4  # KiB

async def main():
    async with Session([NoopExecutionBackend()]) as session:
        for turn in range(40):
            tasks = [ComputeTask(function=noop, retries=turn % 2) for _ in range(5_000)]
            tasks += [ComputeTask(function=noop, after=tasks[:1]) for _ in range(500)]
            await session.submit_tasks(tasks)
            await session.wait_tasks(tasks)
            session.forget(tasks)
            tasks.clear()
            if turn == 9:
                settled = now()
        assert session.get_statistics()["counts"] == {"DONE": 40 * 5_500}
        print(settled, now())

asyncio.run(main())
"""


def kib(script: str) -> tuple[int, int]:
    """The two numbers that a script prints, in KiB."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    return first, second


def test_a_million_tasks_in_bounded_memory() -> None:
    base, peak = kib(MILLION)
    assert base < 100 * 1024
    assert (peak - base) * 1024 / 1_000_000 < 1200  # bytes each


def test_a_session_that_forgets_does_not_grow() -> None:
    """Thirty rounds of 5,500 tasks after the tenth: kept, they would be 150 MB."""
    settled, end = kib(FORGETFUL)
    assert end - settled < 10 * 1024
