"""Parsl on this machine: its thread executor, and its high-throughput executor (HTEX)."""

from __future__ import annotations

from typing import Any

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor, ThreadPoolExecutor
from parsl.providers import LocalProvider

from benchmarks import side


def _threads() -> Any:
    return ThreadPoolExecutor(max_threads=side.cores())


def _htex() -> Any:
    """As many workers as cores, on the loopback interface, with its own encryption as it comes."""
    return HighThroughputExecutor(
        address="127.0.0.1",
        max_workers_per_node=side.cores(),
        provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    )


def _functions(executor: Any, tasks: int) -> dict[str, Any]:
    with parsl.load(Config(executors=[executor], initialize_logging=False)):
        app = parsl.python_app(side.increment)
        return side.submitted(lambda _, value: app(value), side.increment, tasks)


def _true() -> str:
    """The command line; sent to the workers without this module's globals."""
    from benchmarks.side import TRUE

    return TRUE


class _Succeeded:
    """The future of a command, whose result is its exit code, as one that counts successes."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def result(self) -> int:
        return int(self._future.result() == 0)


def _executables(tasks: int) -> dict[str, Any]:
    with parsl.load(Config(executors=[_htex()], initialize_logging=False)):
        app = parsl.bash_app(_true)
        return side.submitted(lambda *_: _Succeeded(app()), side.increment, tasks)


if __name__ == "__main__":
    side.main(
        {
            "threads": lambda tasks: _functions(_threads(), tasks),
            "processes": lambda tasks: _functions(_htex(), tasks),
            "executables": _executables,
        }
    )
