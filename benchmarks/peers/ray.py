"""Ray on this machine, as many workers as cores, without its dashboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from benchmarks import side


def _run(function: Callable[[int], int], tasks: int) -> dict[str, Any]:
    ray.init(num_cpus=side.cores(), include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(function)

        def sum_of(values: range) -> int:
            return sum(ray.get([remote.remote(value) for value in values]))

        sum_of(range(side.WARM_UP))
        gauge = side.Gauge()
        gauge.start()
        result = sum_of(range(tasks))
        gauge.stop()
        return gauge.reading(tasks, result)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    side.main(
        {
            "processes": lambda tasks: _run(side.increment, tasks),
            "executables": lambda tasks: _run(side.run_true, tasks),
        }
    )
