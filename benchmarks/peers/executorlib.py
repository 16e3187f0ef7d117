"""executorlib on this machine, with workers that stay (`block_allocation`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from executorlib import SingleNodeExecutor

from benchmarks import side


def _run(function: Callable[[int], int], tasks: int) -> dict[str, Any]:
    with SingleNodeExecutor(max_workers=side.cores(), block_allocation=True) as pool:
        return side.submitted(pool.submit, function, tasks)


if __name__ == "__main__":
    side.main(
        {
            "processes": lambda tasks: _run(side.increment, tasks),
            "executables": lambda tasks: _run(side.run_true, tasks),
        }
    )
