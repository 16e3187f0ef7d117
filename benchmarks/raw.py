"""The raw engines: bare asyncio, the pools of `concurrent.futures`, and `subprocess`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from benchmarks import side

BURST = 1024  # tasks that the floor settles in one turn of the event loop


class _Record:
    """The fields that any task needs."""

    __slots__ = ("function", "future", "result", "state", "uid")

    def __init__(
        self, uid: str, function: Callable[[], Any], future: asyncio.Future[_Record]
    ) -> None:
        self.uid = uid
        self.state = "NEW"
        self.function = function
        self.result: Any = None
        self.future = future


def _records(tasks: int) -> list[_Record]:
    create = asyncio.get_running_loop().create_future
    return [_Record(f"task.{number:06d}", side.nothing, create()) for number in range(tasks)]


async def _settle(records: list[_Record]) -> None:
    """Settle records, a burst per turn of the loop."""
    for first in range(0, len(records), BURST):
        for record in records[first : first + BURST]:
            record.state = "DONE"
            record.future.set_result(record)
        await asyncio.sleep(0)


async def _floor(tasks: int) -> dict[str, Any]:
    """The least that asyncio can do: per task an object and a future, settled, then gathered.

    So it is for an author whose tasks have ended by the time that `submit_tasks` returns.
    """
    gauge = side.Gauge()
    gauge.start()
    records = _records(tasks)
    await _settle(records)
    await asyncio.gather(*[record.future for record in records])
    gauge.stop()
    return gauge.reading(tasks, sum(record.state == "DONE" for record in records))


async def _floor_pending(tasks: int) -> dict[str, Any]:
    """The same, gathered before it is settled: fewer of gather's callbacks are alive at once."""
    gauge = side.Gauge()
    gauge.start()
    records = _records(tasks)
    settling = asyncio.create_task(_settle(records))
    await asyncio.gather(*[record.future for record in records])
    gauge.stop()
    await settling
    return gauge.reading(tasks, sum(record.state == "DONE" for record in records))


def threads(tasks: int) -> dict[str, Any]:
    with ThreadPoolExecutor(side.cores()) as pool:
        return side.submitted(pool.submit, side.increment, tasks)


def processes(tasks: int) -> dict[str, Any]:
    with ProcessPoolExecutor(side.cores()) as pool:
        return side.submitted(pool.submit, side.increment, tasks)


def process_map(tasks: int) -> dict[str, Any]:
    """`map` with chunks: what somebody who knows all the calls beforehand would write."""
    with ProcessPoolExecutor(side.cores()) as pool:
        sum(pool.map(side.increment, range(side.WARM_UP)))
        gauge = side.Gauge()
        gauge.start()
        result = sum(pool.map(side.increment, range(tasks), chunksize=64))
        gauge.stop()
        return gauge.reading(tasks, result)


def executables(tasks: int) -> dict[str, Any]:
    with ThreadPoolExecutor(side.cores()) as pool:
        return side.submitted(pool.submit, side.run_true, tasks)


if __name__ == "__main__":
    side.main(
        {
            "floor": lambda tasks: asyncio.run(_floor(tasks)),
            "floor-pending": lambda tasks: asyncio.run(_floor_pending(tasks)),
            "threads": threads,
            "processes": processes,
            "process-map": process_map,
            "executables": executables,
        }
    )
