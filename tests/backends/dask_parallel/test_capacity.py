"""Tasks that no worker can run, and clusters that may yet grow."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from rhapsody.api import ComputeTask, Resources, Session
from rhapsody.api.errors import BackendError, ResourceError
from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

from .helpers import LocalCluster, add, ended, options

pytestmark = pytest.mark.timeout(180)


def test_unsatisfiable_resources_fail_at_once_and_name_what_there_is(
    run: Any, cluster: Any
) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        begun = time.monotonic()
        tasks = [
            ComputeTask(function=add, args=(i,), **options(resources={"GPU": 4})) for i in range(50)
        ]
        tasks.append(ComputeTask(function=add, args=(1,), resources=Resources(cores_per_rank=64)))
        tasks.append(ComputeTask(function=add, args=(1,), **options(workers=["tcp://192.0.2.1:1"])))
        await ended(session, *tasks)
        assert time.monotonic() - begun < 10
        for task in tasks:
            assert isinstance(task.exception, ResourceError)
            assert "SLOT=1" in str(task.exception)
        assert "GPU=4" in str(tasks[0].exception)
        assert "CPU=64" in str(tasks[50].exception)

        assert len(cluster.scheduler.get_events(backend._plugin)) < 20

    run(scenario)


def test_resources_are_dask_s_and_ours(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        tasks = await ended(
            session,
            ComputeTask(function=add, args=(1,), **options(resources={"SLOT": 1})),
            ComputeTask(function=add, args=(1,), resources=Resources(cores_per_rank=2)),
            ComputeTask(executable="true", resources=Resources(cores_per_rank=2)),
        )
        assert [t.state for t in tasks] == ["DONE"] * 3

    run(scenario)


def test_a_cluster_that_may_grow_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        with await asyncio.to_thread(
            LocalCluster, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"
        ) as cluster:
            cluster.adapt(minimum=1, maximum=2)
            backend = await DaskExecutionBackend(cluster=cluster, worker_timeout=1.5)
            async with Session(backends=[backend], work_dir=tmp_path) as session:
                begun = time.monotonic()
                (task,) = await ended(
                    session, ComputeTask(function=add, args=(1,), **options(resources={"GPU": 1}))
                )
                assert time.monotonic() - begun > 1.4
                assert isinstance(task.exception, ResourceError)
                assert "within 1.5 s" in str(task.exception)

    asyncio.run(main())


def test_a_cluster_without_workers_is_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        with await asyncio.to_thread(
            LocalCluster, n_workers=0, dashboard_address="127.0.0.1:0"
        ) as cluster:
            backend = await DaskExecutionBackend(cluster=cluster, worker_timeout=1.0)
            async with Session(backends=[backend], work_dir=tmp_path) as session:
                (lost,) = await ended(session, ComputeTask(function=add, args=(1,)))
                assert isinstance(lost.exception, BackendError)
                assert lost.exception.transient
                assert "no worker" in str(lost.exception)
                backend._capacity.timeout = 60.0
                task = ComputeTask(function=add, args=(1,))
                await session.submit_tasks([task])
                cluster.scale(1)
                await session.wait_tasks([task], timeout=60)
                assert task.return_value == 2

    asyncio.run(main())
