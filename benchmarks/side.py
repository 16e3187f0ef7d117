"""One side of a figure: a process that runs one workload and prints one line of JSON.

Imported in the environments of the peers too, so this needs the standard library only, and the
functions that are tasks are here, where the workers of every engine can import them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import cpu

WARM_UP = 64  # tasks before the clock starts: pools start their workers with their first tasks
FEW = 8  # the same, where a task takes long

#: Runs a number of tasks; returns what `Gauge.reading` does.
Workload = Callable[[int], dict[str, Any]]


class Gauge:
    """Time, processor time, and growth of the peak of resident memory, from `start` to `stop`."""

    def start(self) -> None:
        self._bytes = _memory("VmRSS")
        self._cpu = cpu.seconds_below()
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._started
        self._cpu = cpu.seconds_below() - self._cpu

    def reading(self, tasks: int, result: int) -> dict[str, Any]:
        """Return seconds and bytes per task, and what all the tasks computed together.

        Processor time is that of this process and all below it: workers, servers, the tasks.
        """
        return {
            "seconds": self._seconds / tasks,
            "cpu": self._cpu / tasks,
            "bytes": (_memory("VmHWM") - self._bytes) / tasks,
            "result": result,
        }


def _memory(field: str) -> int:
    """Return `VmRSS` (resident now) or `VmHWM` (its peak) of this process, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel does not tell {field} of this process")


def main(workloads: Mapping[str, Workload]) -> None:
    """Run the workload and the number of tasks that the command line names."""
    name, tasks = sys.argv[1:]
    cpu.adopt_orphans()  # a server that detaches itself is counted too
    print(json.dumps(workloads[name](int(tasks))), flush=True)


def submitted(
    submit: Callable[..., Any], function: Callable[[int], int], tasks: int
) -> dict[str, Any]:
    """Measure an engine whose `submit(function, value)` returns a future with `result()`."""
    _sum_of(submit, function, WARM_UP)
    gauge = Gauge()
    gauge.start()
    result = _sum_of(submit, function, tasks)
    gauge.stop()
    return gauge.reading(tasks, result)


def _sum_of(submit: Callable[..., Any], function: Callable[[int], int], tasks: int) -> int:
    futures = [submit(function, value) for value in range(tasks)]
    return sum(future.result() for future in futures)


# ---------------------------------------------------------------------- what the tasks do


def nothing() -> None:
    """The smallest function task."""


def increment(value: int) -> int:
    """A function that is shorter than anything around it, and whose result can be checked."""
    return value + 1


def run_true(_: int) -> int:
    """Run `true` with its output captured; 1 where it went well."""
    return int(subprocess.run([TRUE], capture_output=True, check=False).returncode == 0)


TRUE = shutil.which("true") or "/bin/true"


def cores() -> int:
    """How many cores this process may use: the width of every pool."""
    return len(os.sched_getaffinity(0))
