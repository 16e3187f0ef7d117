"""The Dask backend against Dask itself, on the same cluster, in one run.

    python -m benchmarks.dask_bench [--write docs/dask-benchmarks.md]

A cluster of two workers of one thread runs in processes of its own; this one connects to it, once
as plain Dask (`Client.map` and `gather`) and once as a session, in turns. Beside the wall time the
processor time is measured, user and system: that of this process, the cluster's, and all their
children. A ratio is that of the two sides of one turn. With `--peer PYTHON`, an interpreter that
has `rhapsody-py[dask]==0.6.0`, that release runs the same functions beside plain Dask in a process
of its own, as a black box.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cpu import adopt_orphans, seconds_below

N_WORKERS = 2
MEGABYTES = 10


def increment(number: int) -> int:
    return number + 1


def run_true(_: int) -> int:
    return subprocess.run(["/bin/true"], capture_output=True, check=False).returncode


def make_data(_: int) -> bytes:
    return bytes(MEGABYTES << 20)


def serve() -> None:
    """Be the cluster, until the standard input ends."""
    distributed: Any = importlib.import_module("distributed")
    with distributed.LocalCluster(
        n_workers=N_WORKERS, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()


class Reading(NamedTuple):
    """Seconds that one side took, once."""

    wall: float
    cpu: float  # of this process and all below it: the cluster, its workers, their children


class Clock:
    """Measures from when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), seconds_below()

    def read(self) -> Reading:
        return Reading(time.perf_counter() - self._wall, seconds_below() - self._cpu)


# ---------------------------------------------------------------------- the two sides


class Raw:
    def __init__(self, address: str) -> None:
        distributed: Any = importlib.import_module("distributed")
        self.client = distributed.Client(address, set_as_default=False)

    def _map(self, function: Callable[[int], Any], count: int) -> Reading:
        clock = Clock()
        results = self.client.gather(self.client.map(function, range(count), pure=False))
        reading = clock.read()
        assert len(results) == count
        return reading

    def functions(self, count: int) -> Reading:
        return self._map(increment, count)

    def executables(self, count: int) -> Reading:
        return self._map(run_true, count)

    def data(self, count: int) -> Reading:
        return self._map(make_data, count)


class Ours:
    def __init__(self, address: str) -> None:
        self.address = address

    def _run(self, count: int, **fields: Any) -> Reading:
        from rhapsody.api import ComputeTask, Session
        from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

        async def main() -> Reading:
            backend = await DaskExecutionBackend(cluster=self.address)
            async with Session(backends=[backend]) as session:
                await session.submit_tasks(first := [ComputeTask(function=increment, args=(1,))])
                await session.wait_tasks(first)
                clock = Clock()
                if "executable" in fields:
                    tasks = [ComputeTask(**fields) for _ in range(count)]
                else:
                    tasks = [ComputeTask(args=(n,), **fields) for n in range(count)]
                await asyncio.gather(*await session.submit_tasks(tasks))
                return clock.read()

        return asyncio.run(main())

    def functions(self, count: int) -> Reading:
        return self._run(count, function=increment)

    def executables(self, count: int) -> Reading:
        return self._run(count, executable="/bin/true")

    def data(self, count: int) -> Reading:
        return self._run(count, function=make_data)


def memory_per_task(address: str, count: int) -> float:
    """Bytes that this process grows by for each finished task that its session keeps."""
    from rhapsody.api import ComputeTask, Session
    from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

    async def main() -> float:
        backend = await DaskExecutionBackend(cluster=address)
        async with Session(backends=[backend]) as session:
            kept = []

            async def burst() -> None:
                tasks = [ComputeTask(function=increment, args=(n,)) for n in range(count)]
                await asyncio.gather(*await session.submit_tasks(tasks))
                kept.append(tasks)
                del tasks
                await asyncio.sleep(1.0)  # Dask lets go of what it had for them
                gc.collect()

            await burst()
            before = _rss()
            await burst()
            await burst()
            return (_rss() - before) / (2 * count)

    return asyncio.run(main())


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# The public release, by its public interface, and plain Dask beside it in the same process.
_PEER = """
import asyncio, json, sys, time
from importlib.metadata import version

def increment(number):
    return number + 1

async def main(count):
    from rhapsody.api import ComputeTask, Session
    from rhapsody.backends import DaskExecutionBackend
    backend = await DaskExecutionBackend({"n_workers": 2, "threads_per_worker": 1})
    session = Session(backends=[backend])
    begun = time.perf_counter()
    tasks = [ComputeTask(function=increment, args=(n,)) for n in range(count)]
    await asyncio.gather(*await session.submit_tasks(tasks))
    seconds = time.perf_counter() - begun
    await session.close()
    return seconds

def raw(count):
    from distributed import Client, LocalCluster
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options) as cluster:
        with Client(cluster) as client:
            begun = time.perf_counter()
            client.gather(client.map(increment, range(count), pure=False))
            return time.perf_counter() - begun

if __name__ == "__main__":
    count = int(sys.argv[1])
    print(json.dumps({"raw": raw(count), "theirs": asyncio.run(main(count)),
                      "version": version("rhapsody-py")}))
"""


def peer(python: str, count: int, folder: Path) -> dict[str, Any]:
    """Measure the public release once."""
    script = folder / "peer.py"
    script.write_text(_PEER)
    done = subprocess.run(
        [python, str(script), str(count)], capture_output=True, text=True, cwd=folder, check=False
    )
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------------- the run


def main() -> None:
    options = _parser().parse_args()
    if options.serve:
        serve()
        return
    adopt_orphans()
    command = [sys.executable, "-m", "benchmarks.dask_bench", "--serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdout is not None
        assert cluster.stdin is not None
        address = cluster.stdout.readline().strip()
        try:
            lines = _measure(address, options)
        finally:
            cluster.stdin.close()
    print("\n".join(lines))
    if options.write:
        options.write.write_text("\n".join([*_heading(), *lines, ""]))


def _measure(address: str, options: argparse.Namespace) -> list[str]:
    raw, ours = Raw(address), Ours(address)
    raw.functions(200)
    lines = [
        "| what | measured | plain Dask, s | ours, s | ratio: median (least to most) | goal |",
        "|---|---|---|---|---|---|",
    ]
    for name, count, words, goal in (
        ("functions", options.tasks, f"{options.tasks:,} short functions", "1.1"),
        ("executables", options.tasks // 10, f"{options.tasks // 10:,} times `/bin/true`", "1.1"),
        ("data", 100, f"100 results of {MEGABYTES} MiB", "1.1"),
    ):
        turns: list[Turn] = []
        for number in range(options.repeat):
            if number % 2 == 0:
                theirs, own = getattr(raw, name)(count), getattr(ours, name)(count)
            else:
                own, theirs = getattr(ours, name)(count), getattr(raw, name)(count)
            turns.append(Turn(theirs, own))
            print(f"  {name}: {turns[-1]}", file=sys.stderr, flush=True)
        lines += _rows(words, turns, goal)
    grown = memory_per_task(address, options.tasks)
    lines.append(
        f"| memory of the client, per finished task that its session keeps | | | {grown:.0f} bytes"
        " | | ≤ 1,536 bytes |"
    )
    if options.peer:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            count = options.tasks // 2
            found = [peer(options.peer, count, Path(folder)) for _ in range(options.repeat)]
        ratios = [each["theirs"] / each["raw"] for each in found]
        lines.append(
            f"| {count:,} short functions, rhapsody-py {found[0]['version']} | wall"
            f" | {statistics.median(each['raw'] for each in found):.2f}"
            f" | theirs: {statistics.median(each['theirs'] for each in found):.2f}"
            f" | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | |"
        )
    return lines


class Turn(NamedTuple):
    raw: Reading
    ours: Reading


def _rows(words: str, turns: list[Turn], goal: str) -> list[str]:
    """Return the lines of one workload: wall time, and processor time."""
    rows = []
    for label, field in (("wall", 0), ("CPU", 1)):
        pairs = [(turn.raw[field], turn.ours[field]) for turn in turns]
        ratios = [ours / raw for raw, ours in pairs]
        rows.append(
            f"| {words} | {label} | {statistics.median(raw for raw, _ in pairs):.2f}"
            f" | {statistics.median(ours for _, ours in pairs):.2f}"
            f" | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f" | ≤ {goal} |"
        )
    return rows


def _heading() -> list[str]:
    given = ["PYTHON" if before == "--peer" else word for before, word in pairwise(sys.argv)]
    words = " ".join(["python -m benchmarks.dask_bench", *given])
    return [
        "# Figures of the Dask backend",
        "",
        f"Written by `{words}`: Python {platform.python_version()}, distributed"
        f" {version('distributed')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the"
        " end. Each turn measures both sides on the same cluster of two workers of one thread, and"
        " a ratio is that of one turn. CPU is the user and system time of the client, the cluster"
        " and all children. A load above the number of cores says that other work ran beside it.",
        "",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dask_bench", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000, help="short functions in a turn")
    parser.add_argument("--repeat", type=int, default=5, help="turns")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with rhapsody-py 0.6.0")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
