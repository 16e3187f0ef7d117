"""Graphs of tasks that do nothing: what dependencies cost, with us and with asyncio alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from benchmarks import side
from rhapsody.api import ComputeTask, Session
from rhapsody.backends.execution.noop import NoopExecutionBackend

#: Of each task, in an order in which parents come first, the numbers of its parents.
Graph = list[list[int]]

CHAIN = 100  # tasks in a chain
FAN = 10_000  # children of one task, and the parents of the one behind them
NEAR = 1_000  # a task of the random graph has parents among so many before it


def chains(tasks: int) -> Graph:
    """Chains of 100 tasks, side by side."""
    return [[number - 1] if number % CHAIN else [] for number in range(tasks)]


def fans(tasks: int) -> Graph:
    """One task, its children, and one that waits for all of these; as often as it fits."""
    width = min(FAN, tasks)
    graph: Graph = []
    for number in range(tasks):
        place = number % width
        first = number - place
        if place == 0:
            graph.append([])
        elif place == width - 1:
            graph.append(list(range(first + 1, number)))
        else:
            graph.append([first])
    return graph


def random_graph(tasks: int) -> Graph:
    """Up to three parents each, drawn from the 1,000 tasks before; the same in every run."""
    draw = random.Random(2026)
    graph: Graph = []
    for number in range(tasks):
        near = range(max(0, number - NEAR), number)
        graph.append(draw.sample(near, min(len(near), draw.randrange(4))))
    return graph


async def _bare(graph: Graph) -> dict[str, Any]:
    """An asyncio task for each, which awaits those of its parents."""

    async def run(parents: list[asyncio.Task[int]]) -> int:
        for parent in parents:
            await parent
        side.nothing()
        return 1

    gauge = side.Gauge()
    gauge.start()
    tasks: list[asyncio.Task[int]] = []
    for parents in graph:
        tasks.append(asyncio.create_task(run([tasks[number] for number in parents])))
    await asyncio.wait(tasks)
    gauge.stop()
    return gauge.reading(len(graph), sum(task.result() for task in tasks))


async def _ours(graph: Graph) -> dict[str, Any]:
    async with Session(backends=[await NoopExecutionBackend()]) as session:
        gauge = side.Gauge()
        gauge.start()
        tasks: list[ComputeTask] = []
        for parents in graph:
            after = [tasks[number] for number in parents]
            tasks.append(
                ComputeTask(function=side.nothing, after=after)
                if after
                else ComputeTask(function=side.nothing)
            )
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        gauge.stop()
        return gauge.reading(len(graph), sum(task.state == "DONE" for task in tasks))


_SHAPES: dict[str, Callable[[int], Graph]] = {
    "chains": chains,
    "fans": fans,
    "random": random_graph,
}


def _workload(run: Callable[[Graph], Any], shape: str) -> side.Workload:
    return lambda tasks: asyncio.run(run(_SHAPES[shape](tasks)))


if __name__ == "__main__":
    side.main(
        {
            **{f"bare-{shape}": _workload(_bare, shape) for shape in _SHAPES},
            **{shape: _workload(_ours, shape) for shape in _SHAPES},
        }
    )
