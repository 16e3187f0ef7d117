"""``rhapsody bench``: times this installation and, beside it, the same work in plain Python.

A workload is a pair of callables: ``ours`` and ``raw`` run the same number of tasks and return
the seconds that this took, without starting and stopping pools. Both sides are measured in one
process, in turn, so that a busy machine disturbs both alike. The repository's ``benchmarks/``
measures more, with memory and beside other libraries.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend
from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.runtime.machine.hardware import granted_cores

BURST = 1024  # tasks that `floor` settles in one iteration of the event loop
WARM_UP = 64  # tasks before the clock starts, on either side


@dataclass(frozen=True)
class Workload:
    """The same tasks run by us and by raw Python; both callables map a count to seconds."""

    name: str
    title: str
    against: str
    tasks: int
    ours: Callable[[int], float]
    raw: Callable[[int], float]


@dataclass(frozen=True)
class Measurement:
    """Medians of the interleaved repetitions of one workload, in seconds for all its tasks."""

    workload: Workload
    tasks: int
    ours_seconds: float
    raw_seconds: float
    ratios: list[float]  # ours over raw of each repetition, ascending

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    def as_dict(self) -> dict[str, object]:
        """The measurement as ``--json`` prints it."""
        return {
            "workload": self.workload.name,
            "title": self.workload.title,
            "against": self.workload.against,
            "tasks": self.tasks,
            "ours_seconds": self.ours_seconds,
            "raw_seconds": self.raw_seconds,
            "ratio": self.ratio,
            "ratios": self.ratios,
        }


def measure(workload: Workload, *, repeat: int = 5, scale: float = 1.0) -> Measurement:
    """Measure both sides ``repeat`` times each, after one unmeasured run of a tenth of the size."""
    tasks = max(1, round(workload.tasks * scale))
    for side in (workload.raw, workload.ours):
        side(max(1, tasks // 10))
    ours: list[float] = []
    raw: list[float] = []
    for repetition in range(repeat):
        sides = [(workload.raw, raw), (workload.ours, ours)]
        # Each side goes first as often as the other: the second finds warmer caches.
        for side, seconds in sides if repetition % 2 == 0 else reversed(sides):
            gc.collect()
            seconds.append(side(tasks))
    ratios = sorted(our / their for our, their in zip(ours, raw, strict=True))
    return Measurement(workload, tasks, statistics.median(ours), statistics.median(raw), ratios)


# --- no-ops: what the session itself costs -----------------------------------------------------


class _Record:
    """The fields that any task needs."""

    __slots__ = ("function", "future", "result", "state", "uid")

    def __init__(self, uid: str, future: asyncio.Future[_Record]) -> None:
        self.uid = uid
        self.state = "NEW"
        self.function = _nothing
        self.result: object = None
        self.future = future


def floor(tasks: int) -> float:
    """A lower bound with asyncio: an object and a future per task, settled and then gathered."""
    return asyncio.run(_floor(tasks))


async def _floor(tasks: int) -> float:
    create = asyncio.get_running_loop().create_future
    start = time.perf_counter()
    records = [_Record(f"task.{number:06d}", create()) for number in range(tasks)]
    for first in range(0, tasks, BURST):
        for record in records[first : first + BURST]:
            record.state = "DONE"
            record.future.set_result(record)
        await asyncio.sleep(0)
    await asyncio.gather(*[record.future for record in records])
    return time.perf_counter() - start


def noop_gather(tasks: int) -> float:
    """Make, submit and gather tasks that do nothing."""
    return asyncio.run(_session(NoopExecutionBackend(), _no_ops, tasks, gather=True))


def noop_wait(tasks: int) -> float:
    """Make, submit and wait for tasks that do nothing."""
    return asyncio.run(_session(NoopExecutionBackend(), _no_ops, tasks, gather=False))


async def _session(
    backend: BaseExecutionBackend,
    make: Callable[[int], list[ComputeTask]],
    number: int,
    *,
    gather: bool,
) -> float:
    async with Session(backends=[await backend]) as session:
        # Pools start their workers with their first tasks; on both sides that is not timed.
        await session.wait_tasks(await _submitted(session, make(WARM_UP)))
        start = time.perf_counter()
        tasks = make(number)
        futures = await session.submit_tasks(tasks)
        if gather:
            await asyncio.gather(*futures)
        else:
            await session.wait_tasks(tasks)
        seconds = time.perf_counter() - start
        if any(task.state != "DONE" for task in tasks):
            raise RuntimeError(f"not every task of {make.__name__} is DONE")
        return seconds


async def _submitted(session: Session, tasks: list[ComputeTask]) -> list[ComputeTask]:
    await session.submit_tasks(tasks)
    return tasks


def _no_ops(number: int) -> list[ComputeTask]:
    return [ComputeTask(function=_nothing) for _ in range(number)]


def _nothing() -> None:
    """The smallest function task."""


# --- functions on pools ------------------------------------------------------------------------


def _increment(value: int) -> int:
    return value + 1


def _increments(number: int) -> list[ComputeTask]:
    return [ComputeTask(function=_increment, args=(value,)) for value in range(number)]


def thread_tasks(tasks: int) -> float:
    """Function tasks on a thread pool that is as large as the raw one."""
    with ThreadPoolExecutor(_cores()) as pool:
        return asyncio.run(
            _session(ConcurrentExecutionBackend(pool), _increments, tasks, gather=True)
        )


def raw_threads(tasks: int) -> float:
    """The same functions, submitted to a ``ThreadPoolExecutor`` one by one."""
    with ThreadPoolExecutor(_cores()) as pool:
        return _raw_pool(pool, tasks)


def process_tasks(tasks: int) -> float:
    """Function tasks on a process pool that is as large as the raw one."""
    pool = ProcessPoolExecutor(_cores())
    return asyncio.run(_session(ConcurrentExecutionBackend(pool), _increments, tasks, gather=True))


def raw_processes(tasks: int) -> float:
    """The same functions, submitted to a ``ProcessPoolExecutor`` one by one."""
    with ProcessPoolExecutor(_cores()) as pool:
        return _raw_pool(pool, tasks)


def _raw_pool(pool: Executor, tasks: int) -> float:
    for future in [pool.submit(_increment, value) for value in range(WARM_UP)]:
        future.result()
    start = time.perf_counter()
    for future in [pool.submit(_increment, value) for value in range(tasks)]:
        future.result()
    return time.perf_counter() - start


# --- executables -------------------------------------------------------------------------------


def executable_tasks(tasks: int) -> float:
    """``true`` as executable tasks, as many at once as there are cores."""
    backend = ConcurrentExecutionBackend(slots=_cores())
    return asyncio.run(_session(backend, _trues, tasks, gather=True))


def _trues(number: int) -> list[ComputeTask]:
    return [ComputeTask(executable=_true()) for _ in range(number)]


def raw_executables(tasks: int) -> float:
    """``subprocess.run`` of ``true`` with its output captured, on a pool of the same size."""
    with ThreadPoolExecutor(_cores()) as pool:
        for _ in pool.map(_run_true, range(WARM_UP)):
            pass
        start = time.perf_counter()
        for _ in pool.map(_run_true, range(tasks)):
            pass
        return time.perf_counter() - start


def _run_true(_: int) -> None:
    subprocess.run([_true()], check=True, capture_output=True)


def _true() -> str:
    path = shutil.which("true")
    if path is None:
        raise RuntimeError("the benchmark of executables needs the command `true` on PATH")
    return path


def _cores() -> int:
    return len(granted_cores())


WORKLOADS: tuple[Workload, ...] = (
    Workload("noop-gather", "no-op, gather", "bare asyncio", 100_000, noop_gather, floor),
    Workload("noop-wait", "no-op, wait_tasks", "bare asyncio", 100_000, noop_wait, floor),
    Workload(
        "threads", "thread functions", "ThreadPoolExecutor", 20_000, thread_tasks, raw_threads
    ),
    Workload(
        "processes", "process functions", "ProcessPoolExecutor", 5_000, process_tasks, raw_processes
    ),
    Workload(
        "executables",
        "executables",
        "threads of subprocess.run",
        400,
        executable_tasks,
        raw_executables,
    ),
)
