"""Dragon's `Batch` driven directly, inside a Dragon runtime: as many workers as there are cores."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from benchmarks import side

# What our backend gives to a Batch on one node.
_RESULTS = 128 << 20


def _run(submit: Callable[[Any, int], Any], tasks: int) -> dict[str, Any]:
    """Measure tasks that `submit(batch, value)` hands over, and that `poll` says have ended."""
    package: Any = importlib.import_module("dragon.workflows.batch")
    batch = package.Batch(workers_per_node=side.cores(), results_ddict_mem=_RESULTS)
    try:
        _sum_of(batch, submit, side.FEW)
        gauge = side.Gauge()
        gauge.start()
        result = _sum_of(batch, submit, tasks)
        gauge.stop()
    finally:
        batch.terminate(timeout=5.0)
    return gauge.reading(tasks, result)


def _sum_of(batch: Any, submit: Callable[[Any, int], Any], tasks: int) -> int:
    handles = {}
    for value in range(tasks):
        handle = submit(batch, value)
        handles[handle.uid] = handle
    total = 0
    while handles:
        if (uid := batch.poll(timeout=1.0)) is not None:
            total += int(handles.pop(uid).get())
    return total


def _process(batch: Any, _: int) -> Any:
    native: Any = importlib.import_module("dragon.native.process")
    return _Succeeded(batch.process(native.ProcessTemplate(side.TRUE, args=())))


class _Succeeded:
    """A process of Batch, whose result is its exit code, as one that counts successes."""

    def __init__(self, handle: Any) -> None:
        self.uid = handle.uid
        self._handle = handle

    def get(self) -> int:
        return int(self._handle.get() == 0)


if __name__ == "__main__":
    side.main(
        {
            "functions": lambda tasks: _run(
                lambda batch, value: batch.function(side.increment, value), tasks
            ),
            "executables": lambda tasks: _run(
                lambda batch, value: batch.function(side.run_true, value), tasks
            ),
            "processes": lambda tasks: _run(_process, tasks),
        }
    )
