"""What is measured: the figures, their sides, what is aimed at, and what is known of a miss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_UPSTREAM = ("rhapsody-py==0.6.0", "cloudpickle==3.1.2")  # its process pools want the second
_EXECUTORLIB = ("executorlib==1.11.0",)
_PARSL = ("parsl==2026.10.26",)
_DASK = ("distributed==2026.8.0",)
_HYPERQUEUE = ("hyperqueue==0.27.0",)
_RAY = ("ray==2.60.0",)

_OURS = "benchmarks.sessions"
_RAW = "benchmarks.raw"


@dataclass(frozen=True)
class Side:
    """A workload of a module, run in the environment that `requirements` describe.

    Without requirements that is the environment of the benchmark itself. A side that takes long
    for a task has fewer `tasks`; what is compared is the time per task, with that of the side
    that `base` names, or of the figure's first. Some start as programs of Dragon's do.
    """

    name: str
    module: str
    workload: str
    tasks: int
    requirements: tuple[str, ...] = ()
    base: str = ""
    under_dragon: bool = False


@dataclass(frozen=True)
class Target:
    """At most `limit`: times the base's time or CPU, bytes per task, or seconds."""

    side: str
    of: Literal["ratio", "cpu ratio", "bytes", "seconds", "p99"]
    limit: float


@dataclass(frozen=True)
class Figure:
    """A comparison. Every ratio is of two sides in the same repetition."""

    name: str
    title: str
    text: str
    sides: tuple[Side, ...]
    targets: tuple[Target, ...]
    expected: Callable[[int], int]  # what all the tasks compute together
    quick_divisor: int
    falls_short: str = ""  # what is known of it, for where a target is missed
    unit: Literal["task", "cpu", "stall", "latency"] = "task"
    base_of_each: str = ""  # what the ratios are over, where the sides have several bases

    @property
    def base(self) -> str:
        """What the ratios are over, in words."""
        return self.base_of_each or self.sides[0].name


def count(tasks: int) -> int:
    """Each task adds 1."""
    return tasks


def increments(tasks: int) -> int:
    """Task number n adds n + 1."""
    return tasks * (tasks + 1) // 2


FIGURES = (
    Figure(
        "noop",
        "No-op round trip",
        "Make 100,000 tasks that do nothing, submit them, and await them all. The floor is the"
        " least that asyncio can do: per task an object with the fields that any task needs (uid,"
        " state, function, result, future) and an asyncio future, settled in bursts of 1,024 on"
        " the loop, then gathered: as by an author who gathers what a submit of tasks that end at"
        " once has returned. Gathered before anything is settled, the same costs something else"
        " (the second line): less up to Python 3.11, and more from 3.12 on, whose `gather` takes"
        " futures that are done without a callback.",
        (
            Side("bare asyncio (the floor)", _RAW, "floor", 100_000),
            Side("bare asyncio, gathered first", _RAW, "floor-pending", 100_000),
            Side("rhapsody, gather", _OURS, "gather", 100_000),
            Side("rhapsody, wait_tasks", _OURS, "wait", 100_000),
            Side("rhapsody-py 0.6.0, gather", _OURS, "gather", 100_000, _UPSTREAM),
            Side("rhapsody-py 0.6.0, wait_tasks", _OURS, "wait", 100_000, _UPSTREAM),
        ),
        (
            Target("rhapsody, gather", "ratio", 1.6),
            Target("rhapsody, wait_tasks", "ratio", 1.0),
            Target("rhapsody, gather", "bytes", 1200),
            Target("rhapsody, wait_tasks", "bytes", 1200),
        ),
        count,
        20,
        "Most of what `gather` costs beyond `wait_tasks` is Python's garbage collector: a gather of"
        " futures that are done makes a callback for each of them at once, and full collections"
        " visit them all (up to Python 3.11). Tried: longer slices of a submit, so that more"
        " futures are still pending when they are gathered: a fifth faster on 3.11, but a half"
        " slower on 3.13. Tried: to settle nothing before the submit is over, which is no better:"
        " then it is the waiting events that are visited.",
    ),
    Figure(
        "linear",
        "Linear to 1,000,000 tasks",
        "The same round trip, with `wait_tasks`, of three sizes, each against the floor of its"
        " size. Time per task grows on both sides with the objects that are alive: full passes of"
        " Python's garbage collector visit them all, and the processor's caches hold fewer of"
        " them. What would not be linear in ours is more than that, and shows in the ratio.",
        tuple(
            one
            for size in (10_000, 100_000, 1_000_000)
            for one in (
                Side(
                    f"bare asyncio, {size:,}", _RAW, "floor", size, base=f"bare asyncio, {size:,}"
                ),
                Side(f"rhapsody, {size:,}", _OURS, "wait", size, base=f"bare asyncio, {size:,}"),
            )
        ),
        (
            Target("rhapsody, 1,000,000", "ratio", 1.0),
            Target("rhapsody, 1,000,000", "bytes", 1200),
        ),
        count,
        20,
        base_of_each="the floor of its size",
    ),
    Figure(
        "threads",
        "Functions on threads",
        "A function that adds 1 to its argument, on as many threads as there are cores.",
        (
            Side("ThreadPoolExecutor.submit", _RAW, "threads", 20_000),
            Side("rhapsody", _OURS, "threads", 20_000),
            Side("rhapsody-py 0.6.0", _OURS, "threads", 20_000, _UPSTREAM),
            Side("Parsl, threads", "benchmarks.peers.parsl", "threads", 10_000, _PARSL),
            Side("Dask, threads", "benchmarks.peers.dask", "threads", 5_000, _DASK),
        ),
        (Target("rhapsody", "ratio", 1.0),),
        increments,
        20,
    ),
    Figure(
        "processes",
        "Functions in processes",
        "The same function, in as many worker processes as there are cores. `map` with a"
        " `chunksize` of 64 is what somebody writes who knows all the calls beforehand and wants"
        " no future of each.",
        (
            Side("ProcessPoolExecutor.submit", _RAW, "processes", 10_000),
            Side("rhapsody", _OURS, "processes", 10_000),
            Side("ProcessPoolExecutor.map, chunks", _RAW, "process-map", 10_000),
            Side("rhapsody-py 0.6.0", _OURS, "processes", 10_000, _UPSTREAM),
            Side("executorlib", "benchmarks.peers.executorlib", "processes", 5_000, _EXECUTORLIB),
            Side("Parsl, HTEX", "benchmarks.peers.parsl", "processes", 5_000, _PARSL),
            Side("Dask, processes", "benchmarks.peers.dask", "processes", 5_000, _DASK),
            Side("Ray", "benchmarks.peers.ray", "processes", 5_000, _RAY),
        ),
        (Target("rhapsody", "ratio", 0.5),),
        increments,
        20,
    ),
    Figure(
        "executables",
        "Executables",
        "`true`, with its output captured, as many at once as there are cores. executorlib, Dask"
        " and Ray have no tasks of this kind: they run a function that calls `subprocess.run`.",
        (
            Side("subprocess.run on threads", _RAW, "executables", 1_000),
            Side("rhapsody", _OURS, "executables", 1_000),
            Side("rhapsody-py 0.6.0", _OURS, "executables", 1_000, _UPSTREAM),
            Side("executorlib", "benchmarks.peers.executorlib", "executables", 1_000, _EXECUTORLIB),
            Side("Parsl, HTEX", "benchmarks.peers.parsl", "executables", 500, _PARSL),
            Side("Dask, threads", "benchmarks.peers.dask", "executables", 500, _DASK),
            Side("HyperQueue", "benchmarks.peers.hyperqueue", "executables", 2_000, _HYPERQUEUE),
            Side("Ray", "benchmarks.peers.ray", "executables", 500, _RAY),
        ),
        (Target("rhapsody", "ratio", 1.0), Target("rhapsody", "cpu ratio", 1.1)),
        count,
        10,
        "On the 2 cores of the machine where this was looked at, `true` itself takes 58 per cent of"
        " all processor time, with us and without us, so that little is left to win. Our children"
        " are started by another process, which also ends them when the driver is killed; each"
        " message between the two costs a turn on a core that a child could have had. Tried, and"
        " kept: a line of tasks at that process, so that the next starts without a round trip (from"
        " 2.5 times to 1.1), and news in bursts. Tried, and not worth it: an environment encoded"
        " beforehand (4 microseconds of about 700).",
    ),
    Figure(
        "latency",
        "Latency of one task",
        "One task after another: from before `submit_tasks` until its result is there, while"
        " nothing else runs. The raw engine is `loop.run_in_executor` with a pool of threads or of"
        " processes, for an executable `subprocess.run` on a thread, and for Dask the await of"
        " `Client.submit` on a local cluster. Given are the median and the 99th percentile of a"
        " run; the ratio is of medians.",
        tuple(
            one
            for words, workload, tasks in (
                ("thread", "threads", 5_000),
                ("process", "processes", 5_000),
                ("executable", "executables", 1_000),
                ("Dask", "dask", 500),
            )
            for one in (
                Side(
                    f"{words}, raw",
                    "benchmarks.latency",
                    f"raw-{workload}",
                    tasks,
                    base=f"{words}, raw",
                ),
                Side(
                    f"{words}, rhapsody",
                    "benchmarks.latency",
                    workload,
                    tasks,
                    base=f"{words}, raw",
                ),
            )
        ),
        (),
        count,
        10,
        unit="latency",
        base_of_each="the raw engine",
    ),
    Figure(
        "graphs",
        "Graphs of 100,000 tasks",
        "Tasks that do nothing and wait for their parents (`after=`), on the no-op backend: 1,000"
        " chains of 100; ten fans, each of one task, its 9,998 children, and one that waits for"
        " all of these; and a random graph in which each task has up to three parents among the"
        " 1,000 before it. The floor is an asyncio task for each, which awaits those of its"
        " parents.",
        tuple(
            one
            for shape in ("chains", "fans", "random")
            for one in (
                Side(
                    f"{shape}, asyncio",
                    "benchmarks.graphs",
                    f"bare-{shape}",
                    100_000,
                    base=f"{shape}, asyncio",
                ),
                Side(
                    f"{shape}, rhapsody",
                    "benchmarks.graphs",
                    shape,
                    100_000,
                    base=f"{shape}, asyncio",
                ),
            )
        ),
        (),
        count,
        20,
        base_of_each="asyncio's tasks",
    ),
    Figure(
        "stall",
        "The event loop while 100,000 tasks are submitted",
        "A coroutine that does nothing but `await asyncio.sleep(0)` notes the longest time for"
        " which it was not called, from before `submit_tasks` until all of 100,000 no-op tasks"
        " are DONE. Pauses of Python's garbage collector count.",
        (
            Side("rhapsody", _OURS, "stall", 100_000),
            Side("rhapsody-py 0.6.0", _OURS, "stall", 100_000, _UPSTREAM),
        ),
        (Target("rhapsody", "seconds", 0.050),),
        count,
        20,
        "Most of it is one full pass of Python's garbage collector over the tasks and futures that"
        " are alive; the rest is one slice of the submit. A pass could be avoided by `gc.freeze()`"
        " or `gc.disable()`, but the process is the author's, not ours; keeping fewer objects for"
        " each task is what shortens it.",
        unit="stall",
    ),
)
