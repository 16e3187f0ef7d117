"""Dragon's `Batch` driven directly, inside a Dragon runtime: as many workers as there are cores."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import side

# What our backend gives to a Batch on one node.
_RESULTS = 128 << 20


def _run(submit: Callable[[Any, int], Any], tasks: int, *, in_time: bool = True) -> dict[str, Any]:
    """Measure tasks that `submit(batch, value)` hands over, and that `poll` says have ended.

    Where it is not `in_time`, their results are taken when the clock has stopped.
    """
    package: Any = importlib.import_module("dragon.workflows.batch")
    batch = package.Batch(workers_per_node=side.cores(), results_ddict_mem=_RESULTS)
    try:
        sum(map(_result, _ended(batch, submit, side.FEW)))
        gauge = side.Gauge()
        gauge.start()
        ended = _ended(batch, submit, tasks)
        results = list(map(_result, ended) if in_time else ended)
        gauge.stop()
        total = sum(results if in_time else map(_result, results))
    finally:
        batch.terminate(timeout=5.0)
    return gauge.reading(tasks, total)


def _ended(batch: Any, submit: Callable[[Any, int], Any], tasks: int) -> Iterator[Any]:
    """Hand tasks over, and return their handles in the order in which they end."""
    handles = {}
    for value in range(tasks):
        handle = submit(batch, value)
        handles[handle.uid] = handle
    while handles:
        if (uid := batch.poll(timeout=1.0)) is not None:
            yield handles.pop(uid)


def _result(handle: Any) -> int:
    return int(handle.get())


def _increment(batch: Any, value: int) -> Any:
    return batch.function(side.increment, value)


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
            "functions": lambda tasks: _run(_increment, tasks),
            "functions-poll": lambda tasks: _run(_increment, tasks, in_time=False),
            "executables": lambda tasks: _run(
                lambda batch, value: batch.function(side.run_true, value), tasks
            ),
            "processes": lambda tasks: _run(_process, tasks),
        }
    )
