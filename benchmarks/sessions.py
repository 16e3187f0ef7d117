"""A session of `rhapsody`: ours, and in an environment of its own upstream's 0.6.0.

Both run this one source, which uses only what both have. `rhapsody bench` has quick versions of
these workloads, without results and memory.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from benchmarks import side
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend
from rhapsody.backends.execution.noop import NoopExecutionBackend

Make = Callable[[int], list[ComputeTask]]


def _no_ops(number: int) -> list[ComputeTask]:
    return [ComputeTask(function=side.nothing) for _ in range(number)]


def increments(number: int) -> list[ComputeTask]:
    return [ComputeTask(function=side.increment, args=(value,)) for value in range(number)]


def _trues(number: int) -> list[ComputeTask]:
    return [ComputeTask(executable=side.TRUE) for _ in range(number)]


async def _round_trip(
    backend: Any, make: Make, number: int, *, gather: bool, warm_up: int = side.WARM_UP
) -> dict[str, Any]:
    """Make, submit and await tasks."""
    async with Session(backends=[await backend]) as session:
        warm = make(warm_up)
        await session.submit_tasks(warm)
        await session.wait_tasks(warm)
        gauge = side.Gauge()
        gauge.start()
        tasks = make(number)
        futures = await session.submit_tasks(tasks)
        if gather:
            await asyncio.gather(*futures)
        else:
            await session.wait_tasks(tasks)
        gauge.stop()
        return gauge.reading(number, sum(map(worth, tasks)))


def worth(task: ComputeTask) -> int:
    """What a task adds to the sum that every side must arrive at."""
    if task.state != "DONE":
        raise RuntimeError(f"task {task.uid} is {task.state}: {task.exception!r}")
    # Of an executable, 0.6.0 has the exit code there.
    counted = task.get("function") is None or task.return_value is None
    return 1 if counted else int(task.return_value)


async def stall(backend: Any, make: Make, number: int) -> dict[str, Any]:
    """Return as `seconds` the longest time for which nobody else ran while tasks were submitted.

    From before `submit_tasks` until the last task is DONE, the pauses of the garbage collector
    among it; `gc` is the longest of these.
    """
    pauses = [0.0]
    longest = 0.0

    def note_pause(phase: str, _: Any) -> None:
        now = time.perf_counter()
        if phase == "start":
            pauses.append(-now)
        else:
            pauses[-1] += now

    async def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now

    async with Session(backends=[await backend]) as session:
        tasks = make(number)
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0)
        gc.callbacks.append(note_pause)
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        await asyncio.sleep(0)
        gc.callbacks.remove(note_pause)
        ticking.cancel()
    return {"seconds": longest, "gc": max(pauses), "result": sum(map(worth, tasks))}


def _on_pool(pool: Executor, make: Make, number: int) -> dict[str, Any]:
    with pool:
        return asyncio.run(_round_trip(ConcurrentExecutionBackend(pool), make, number, gather=True))


def _on_dragon(make: Make, number: int) -> dict[str, Any]:
    from rhapsody.backends import DragonExecutionBackend

    backend = DragonExecutionBackend({"workers_per_node": side.cores()})
    trip = _round_trip(backend, make, number, gather=True, warm_up=side.FEW)
    return asyncio.run(trip)


def _threads() -> Executor:
    return ThreadPoolExecutor(side.cores())


def _noop(number: int, *, gather: bool) -> dict[str, Any]:
    return asyncio.run(_round_trip(NoopExecutionBackend(), _no_ops, number, gather=gather))


if __name__ == "__main__":
    side.main(
        {
            "gather": lambda number: _noop(number, gather=True),
            "wait": lambda number: _noop(number, gather=False),
            "stall": lambda number: asyncio.run(stall(NoopExecutionBackend(), _no_ops, number)),
            "threads": lambda number: _on_pool(_threads(), increments, number),
            "processes": lambda number: _on_pool(
                ProcessPoolExecutor(side.cores()), increments, number
            ),
            "dragon-functions": lambda number: _on_dragon(increments, number),
            "dragon-executables": lambda number: _on_dragon(_trues, number),
            "executables": lambda number: _on_pool(_threads(), _trues, number),
        }
    )
