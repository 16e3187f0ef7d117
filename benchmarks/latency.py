"""One task after another: how long an author waits for each, with us and with the engine below."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from benchmarks import side
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend, DaskExecutionBackend

#: Runs the task of this number, and returns what it computed.
RunOne = Callable[[int], Awaitable[int]]


async def _measure(run_one: RunOne, answer: Callable[[int], int], tasks: int) -> dict[str, Any]:
    """Return as `seconds` the median of the times of tasks that follow one another.

    `answer(number)` is what each must compute.
    """
    for number in range(side.WARM_UP):
        await run_one(number)
    times: list[float] = []
    right = 0
    for number in range(tasks):
        begun = time.perf_counter()
        computed = await run_one(number)
        times.append(time.perf_counter() - begun)
        right += computed == answer(number)
    return {
        "seconds": statistics.median(times),
        "p99": statistics.quantiles(times, n=100)[98],
        "result": right,
    }


async def _raw(pool: Executor, function: Callable[[int], int], tasks: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    with pool:
        return await _measure(
            lambda number: loop.run_in_executor(pool, function, number),
            _succeed if function is side.run_true else side.increment,
            tasks,
        )


async def _raw_dask(tasks: int) -> dict[str, Any]:
    from distributed import Client, LocalCluster

    async with (
        LocalCluster(
            n_workers=side.cores(),
            threads_per_worker=1,
            asynchronous=True,
            dashboard_address=None,
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        return await _measure(
            lambda number: client.submit(side.increment, number, pure=False).result(),
            side.increment,
            tasks,
        )


async def _ours(backend: Any, tasks: int, *, executable: bool = False) -> dict[str, Any]:
    async with Session(backends=[await backend]) as session:

        async def run_one(number: int) -> int:
            if executable:
                task = ComputeTask(executable=side.TRUE)
            else:
                task = ComputeTask(function=side.increment, args=(number,))
            await session.submit_tasks([task])
            await task
            return int(task.exit_code == 0) if executable else int(task.return_value)

        return await _measure(run_one, _succeed if executable else side.increment, tasks)


def _succeed(_: int) -> int:
    """What `side.run_true` returns where all is well."""
    return 1


def _threads() -> Executor:
    return ThreadPoolExecutor(side.cores())


def _processes() -> Executor:
    return ProcessPoolExecutor(side.cores())


def _on_dask() -> DaskExecutionBackend:
    return DaskExecutionBackend({"n_workers": side.cores(), "threads_per_worker": 1})


if __name__ == "__main__":
    side.main(
        {
            "raw-threads": lambda n: asyncio.run(_raw(_threads(), side.increment, n)),
            "raw-processes": lambda n: asyncio.run(_raw(_processes(), side.increment, n)),
            "raw-executables": lambda n: asyncio.run(_raw(_threads(), side.run_true, n)),
            "raw-dask": lambda n: asyncio.run(_raw_dask(n)),
            "threads": lambda n: asyncio.run(_ours(ConcurrentExecutionBackend(_threads()), n)),
            "processes": lambda n: asyncio.run(_ours(ConcurrentExecutionBackend(_processes()), n)),
            "executables": lambda n: asyncio.run(
                _ours(ConcurrentExecutionBackend(_threads()), n, executable=True)
            ),
            "dask": lambda n: asyncio.run(_ours(_on_dask(), n)),
        }
    )
