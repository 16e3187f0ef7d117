"""What bursts and large data cost."""

from __future__ import annotations

from typing import Any

import pytest

from rhapsody.api import ComputeTask, Session

from .helpers import add, distributed, ended, until

pytestmark = pytest.mark.timeout(180)


class CountGraphs(distributed.SchedulerPlugin):  # type: ignore[misc]
    def __init__(self) -> None:
        self.name = "count-graphs"
        self.graphs = 0

    def update_graph(self, *args: Any, **kwargs: Any) -> None:
        self.graphs += 1


def test_bursts_cost_messages_by_the_burst(run: Any, cluster: Any) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        counter = CountGraphs()
        cluster.scheduler.add_plugin(counter)
        try:
            assert await session.map(add, range(3000)) == list(range(1, 3001))
        finally:
            cluster.scheduler.remove_plugin(name=counter.name)
        assert counter.graphs <= 5
        assert len(cluster.scheduler.get_events(backend._plugin)) < 1000
        assert not backend._pending
        await until(lambda: not backend._by_uid)

    run(scenario)


def make_data(megabytes: int) -> bytes:
    return bytes(megabytes << 20)


def test_large_results_do_not_pass_the_scheduler(run: Any, cluster: Any) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        gathered: list[Any] = []

        def gather(*args: Any, **kwargs: Any) -> Any:
            gathered.append(kwargs)
            return handler(*args, **kwargs)

        handler = cluster.scheduler.handlers["gather"]
        cluster.scheduler.handlers["gather"] = gather
        try:
            (task,) = await ended(session, ComputeTask(function=make_data, args=(100,)))
        finally:
            cluster.scheduler.handlers["gather"] = handler
        assert len(task.return_value) == 100 << 20
        assert not gathered

    run(scenario)


def test_large_arguments(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        (task,) = await ended(session, ComputeTask(function=len, args=(make_data(20),)))
        assert task.return_value == 20 << 20

    run(scenario)
