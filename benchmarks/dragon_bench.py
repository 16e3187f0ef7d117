"""The Dragon backend against Dragon's Batch driven directly, and its own cost in the driver.

    python -m benchmarks.dragon_bench [--write docs/dragon-benchmarks.md]

Needs the extra `dragon`. As root, all runs in namespaces of its own, as the tests on Dragon do, so
that nothing is left behind, and with the patches for small machines on for every side. Otherwise,
or with --bare, it runs on the machine as it is, which is then to be one that Dragon is made for:
with cores to spare, and more than 1 GiB of shared memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import command, side
from benchmarks.figures import Figure, Side, Target, count, increments

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for the namespaces of on_dragon

_RAW = "benchmarks.dragon_raw"
_OURS = "benchmarks.sessions"
_DRIVER = "benchmarks.dragon_driver"
# The last three are what the wheel of dragonhpc 0.15.0 needs and does not name.
_UPSTREAM = ("rhapsody-py==0.6.0", "dragonhpc==0.15.0", "requests", "flask", "gunicorn")
_INSIDE = "RHAPSODY_BENCH_INSIDE"  # set where it runs in namespaces

HEAD = """\
# Figures of the Dragon backend

This page was written by `{command}` on {date}; do not edit it.

{facts}

Every side of the first two figures is a whole process that starts a Dragon runtime on one node,
makes one Batch there, with the same arguments, and runs one workload. The sides of a figure take
turns, {repeat} times (A B C, C B A, ...), and a ratio compares two sides within one turn. Given are
medians, and in brackets the least and the most. 8 tasks run before the clock starts; it stops when
the last result is in. Memory is the growth of the peak of the driver's resident memory, per task.
Each side's results are checked. A load above the number of cores says that other work ran on the
machine meanwhile. rhapsody-py runs in an environment of its own, from PyPI, on the
same dragonhpc.
"""

FIGURES = (
    Figure(
        "functions",
        "Functions",
        "A function that adds 1 to its argument. Driven directly, it is given to `Batch.function`,"
        " and `poll` says what has ended, whose result is then taken with `get`. The second line"
        " has the results too, but takes them when the clock has stopped.",
        (
            Side("Batch.function", _RAW, "functions", 2000, under_dragon=True),
            Side("Batch.function, poll only", _RAW, "functions-poll", 2000, under_dragon=True),
            Side("rhapsody", _OURS, "dragon-functions", 2000, under_dragon=True),
            Side(
                "rhapsody-py 0.6.0", _OURS, "dragon-functions", 2000, _UPSTREAM, under_dragon=True
            ),
        ),
        (Target("rhapsody", "ratio", 1.02),),
        increments,
        20,
        "A turn compares whole processes one after another, so that what else a machine does"
        " in between is in the ratio: where the least and the most are far from 1 on either"
        " side, as between the two lines of Batch itself, the run does not decide. Run it on a"
        " machine that does nothing else.",
    ),
    Figure(
        "executables",
        "Executables",
        "`true`, with its output captured. We run it as a child of one of Batch's workers, so what"
        " is compared is a function that calls `subprocess.run`. `Batch.process`, Dragon's own way"
        " to run a program, starts a process of Dragon's for each, which takes longer.",
        (
            Side("subprocess.run in Batch.function", _RAW, "executables", 100, under_dragon=True),
            Side("rhapsody", _OURS, "dragon-executables", 100, under_dragon=True),
            Side("Batch.process", _RAW, "processes", 8, under_dragon=True),
            Side("rhapsody-py 0.6.0", _OURS, "dragon-executables", 8, _UPSTREAM, under_dragon=True),
        ),
        (Target("rhapsody", "ratio", 1.02),),
        count,
        20,
    ),
    Figure(
        "driver",
        "Our own cost in the driver",
        "10,000 functions on a stand-in for Dragon, whose functions have ended by the time that"
        " they are handed over: processor time of the driver's process, all its threads, from"
        " `submit_tasks` until all are DONE. The stand-in's own part, a queue and a pickled result"
        " of each task, is among it. Beside it a session on the no-op backend: what no engine"
        " can be without, and by which runs on machines as busy as this one can be compared.",
        (
            Side("a session on the no-op backend", _DRIVER, "session", 10_000),
            Side("rhapsody", _DRIVER, "cpu", 10_000),
        ),
        (Target("rhapsody", "seconds", 15e-6),),
        count,
        1,
        unit="cpu",
    ),
    Figure(
        "stall",
        "The event loop meanwhile",
        "The same 10,000, and the longest time for which a coroutine that does nothing but `await"
        " asyncio.sleep(0)` was not called. Pauses of Python's garbage collector count. Beside it"
        " an event loop in a process with three threads that do nothing but run, as long: how"
        " busy the machine was.",
        (
            Side("a bare loop beside three threads", _DRIVER, "bare-stall", 10_000),
            Side("rhapsody", _DRIVER, "stall", 10_000),
        ),
        (Target("rhapsody", "seconds", 0.050),),
        count,
        1,
        unit="stall",
    ),
)


def main() -> None:
    parser = command.parser("benchmarks.dragon_bench", __doc__, FIGURES)
    parser.add_argument(
        "--bare", action="store_true", help="on this machine as it is, without patches"
    )
    options = parser.parse_args()
    bare = options.bare or os.geteuid() != 0
    if not bare and _INSIDE not in os.environ:
        sys.exit(_inside())
    command.run(
        parser,
        options,
        FIGURES,
        HEAD,
        facts={
            "dragonhpc": version("dragonhpc"),
            "workers of each Batch": str(side.cores()),
            "patches for small machines": "none" if bare else "those of the tests, on every side",
        },
        env=None if bare else _patches(),
    )


def _inside() -> int:
    """Run this command in a sandbox."""
    from on_dragon.nodes import Sandbox

    with Sandbox() as place:
        again = [sys.executable, "-m", "benchmarks.dragon_bench", *sys.argv[1:]]
        entry, env = place.entry(again, {_INSIDE: "1"}, os.getcwd())
        code = subprocess.call(entry, env=env)
        if left := place.left():
            sys.exit(f"left behind: {left}")
    return code


def _patches() -> dict[str, str]:
    """What makes Dragon bearable on a few cores, of which Batch takes half."""
    from on_dragon import small

    return small.environment(cpus=2 * side.cores())


if __name__ == "__main__":
    main()
