"""Dask workers as jobs of a Slurm, by dask-jobqueue."""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from rhapsody.api import ComputeTask, Session
from rhapsody.api.errors import BackendError
from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

from .slurm_site import Slurm

pytestmark = pytest.mark.timeout(300)

# The jobs do not have this folder on their path.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SLURMCluster: Any = importlib.import_module("dask_jobqueue").SLURMCluster
Security: Any = importlib.import_module("distributed").Security

MakeCluster = Callable[..., Any]


@pytest.fixture
def make_cluster(slurm: Slurm, tmp_path: Path) -> Iterator[MakeCluster]:
    """Make a cluster of jobs with one worker each, over TLS, as `docs/dask.md` has it."""
    made: list[Any] = []

    def make(walltime: str = "00:10:00", **options: Any) -> Any:
        cluster = SLURMCluster(
            queue="debug",
            cores=1,
            processes=1,
            memory="1GiB",
            walltime=walltime,
            interface="lo",
            protocol="tls",
            security=Security.temporary(),
            shared_temp_directory=str(tmp_path),
            local_directory=str(tmp_path),
            log_directory=str(tmp_path),
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
            **options,
        )
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.close(timeout=20)
    for job in slurm.jobs():
        slurm.run("scancel", job)
    made.clear()
    del cluster
    with warnings.catch_warnings():
        # dask-jobqueue 0.9 leaves its files of credentials to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    def run(cluster: Any, scenario: Callable[..., Coroutine[Any, Any, Any]], **options: Any) -> Any:
        async def main() -> Any:
            backend = await DaskExecutionBackend(cluster=cluster, **options)
            async with Session(backends=[backend], work_dir=tmp_path) as session:
                return await asyncio.wait_for(scenario(session, backend), 240)

        return asyncio.run(main())

    return run


def where(seconds: float = 0.0) -> tuple[str, str]:
    import os

    time.sleep(seconds)
    return os.environ["SLURM_JOB_ID"], os.environ["SLURMD_NODENAME"]


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.1)


def test_tasks_wait_for_the_jobs_and_run_in_them(
    make_cluster: MakeCluster, run: Any, tmp_path: Path
) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        functions = [ComputeTask(function=where, args=(0.2,)) for _ in range(20)]
        program = ComputeTask(
            executable="sh", arguments=["-c", "echo $SLURM_JOB_ID"], capture_stdio=True
        )
        failing = ComputeTask(executable="false")
        tasks = [*functions, program, failing]
        await session.submit_tasks(tasks)  # before there is any worker
        cluster.scale(jobs=2)
        await session.wait_tasks(tasks, timeout=90)
        assert len({task.return_value[0] for task in functions}) == 2
        assert Path(str(program.stdout)).read_text().strip() in {
            task.return_value[0] for task in functions
        }
        assert failing.exit_code == 1

    cluster = make_cluster()
    run(cluster, scenario)


def test_a_job_is_cancelled_in_mid_run(make_cluster: MakeCluster, run: Any, slurm: Slurm) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        await asyncio.to_thread(backend.client.wait_for_workers, 2, timeout=60)
        tasks = [ComputeTask(function=where, args=(0.2,)) for _ in range(60)]
        await session.submit_tasks(tasks)
        await until(lambda: sum(t.done() for t in tasks) > 15)
        victim = next(t.return_value[0] for t in tasks if t.done())
        slurm.run("scancel", victim)
        await session.wait_tasks(tasks, timeout=90)
        assert {t.state for t in tasks} == {"DONE"}

    cluster = make_cluster()
    cluster.scale(jobs=2)
    run(cluster, scenario)


def test_the_walltime_ends_under_running_tasks(
    make_cluster: MakeCluster, run: Any, tmp_path: Path
) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        await asyncio.to_thread(backend.client.wait_for_workers, 1, timeout=60)
        pid_file = tmp_path / "pid"
        task = ComputeTask(executable="sh", arguments=["-c", f"echo $$ > {pid_file}; sleep 600"])
        waiting = ComputeTask(function=where)
        await session.submit_tasks([task, waiting])
        await until(lambda: task.state == "RUNNING")
        pid = int(pid_file.read_text())
        await session.wait_tasks([task, waiting], timeout=200)
        # A worker that closes still begins what waits on it, once the place is free (distributed
        # 2026.8): what is short may run there to its end, and its result may arrive.
        assert waiting.state == "FAILED" or waiting.return_value[0]
        for lost in [task, *([waiting] if waiting.state == "FAILED" else [])]:
            assert isinstance(lost.exception, BackendError), lost.exception
            assert lost.exception.transient
            assert "no worker" in str(lost.exception)
        await until(lambda: not Path(f"/proc/{pid}").exists(), 10)

    cluster = make_cluster(walltime="00:01:00")  # the shortest that Slurm has
    cluster.scale(jobs=1)
    run(cluster, scenario, worker_timeout=5.0)


def test_workers_with_a_lifetime_hand_over_before_the_walltime(
    make_cluster: MakeCluster, run: Any
) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        tasks = [ComputeTask(function=where, args=(1.0,)) for _ in range(30)]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=200)
        assert {t.state for t in tasks} == {"DONE"}
        assert len({t.return_value[0] for t in tasks}) > 1

    cluster = make_cluster(
        walltime="00:02:00", worker_extra_args=["--lifetime", "15s", "--lifetime-stagger", "2s"]
    )
    cluster.adapt(minimum_jobs=1, maximum_jobs=1, interval="1s")
    run(cluster, scenario, worker_timeout=60.0)
