"""Dask's distributed scheduler with a cluster on this machine, of threads or of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distributed import Client, LocalCluster

from benchmarks import side


def _run(function: Callable[[int], int], tasks: int, *, processes: bool) -> dict[str, Any]:
    width = side.cores()
    with (
        LocalCluster(
            n_workers=width if processes else 1,
            threads_per_worker=1 if processes else width,
            processes=processes,
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):

        def sum_of(values: range) -> int:
            # Equal calls are one task to Dask, unless it is told that they are not pure.
            return sum(client.gather(client.map(function, values, pure=False)))

        sum_of(range(side.WARM_UP))
        gauge = side.Gauge()
        gauge.start()
        result = sum_of(range(tasks))
        gauge.stop()
        return gauge.reading(tasks, result)


if __name__ == "__main__":
    side.main(
        {
            "threads": lambda tasks: _run(side.increment, tasks, processes=False),
            "processes": lambda tasks: _run(side.increment, tasks, processes=True),
            "executables": lambda tasks: _run(side.run_true, tasks, processes=False),
        }
    )
