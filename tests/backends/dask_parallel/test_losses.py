"""Workers, schedulers, connections and drivers that die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest

from functions import die
from processes import alive
from rhapsody.api import ComputeTask, Session
from rhapsody.api.errors import BackendError, WorkerLostError
from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

from .helpers import LocalCluster, add, ended, options, until

pytestmark = pytest.mark.timeout(180)


def die_once(marker: str) -> str:
    if os.path.exists(marker):
        return "survived"
    Path(marker).touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


@pytest.fixture
def expendable() -> Iterator[Any]:
    """A cluster whose workers may be killed.

    Of its own, and with workers to spare: now and then Dask's nanny does not bring a killed worker
    back (seen with 2026.8 and no rhapsody in sight).
    """
    # Its second death gives a task up, in place of its fourth.
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        cluster = LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address="127.0.0.1:0")
    with cluster:
        yield cluster


def test_a_killed_worker(run: Any, expendable: Any, tmp_path: Path) -> None:
    async def scenario(session: Session, _: Any) -> None:
        once = ComputeTask(function=die_once, args=(str(tmp_path / "died"),))
        await ended(session, once)
        assert once.return_value == "survived"
        (task,) = await ended(session, ComputeTask(function=die))
        assert isinstance(task.exception, WorkerLostError)
        assert task.exception.transient
        assert task.exception.host == "127.0.0.1"
        assert "2 workers died" in str(task.exception)
        assert await session.map(add, range(20)) == list(range(1, 21))

    run(scenario, cluster=expendable)


def test_the_children_of_a_killed_worker_go_with_it(
    run: Any, expendable: Any, tmp_path: Path
) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        script = "echo $$ >> pids; exec sleep 600"
        task = ComputeTask(executable="sh", arguments=["-c", script], **options(cwd=str(tmp_path)))
        await session.submit_tasks([task])
        await until(lambda: task.state == "RUNNING")
        first = int((tmp_path / "pids").read_text().split()[0])
        worker = backend._by_uid[task.uid].worker
        pids = await asyncio.to_thread(backend.client.run, os.getpid)
        os.kill(pids[worker], signal.SIGKILL)
        await until(lambda: not alive(first), 10)
        await until(lambda: len((tmp_path / "pids").read_text().split()) == 2)  # Dask runs it again
        assert await session.cancel(task) is True

    run(scenario, cluster=expendable)


def test_a_worker_that_hangs_does_not_keep_others_from_being_stopped(
    run: Any, expendable: Any
) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        task = ComputeTask(executable="sleep", arguments=["600"])
        await session.submit_tasks([task])
        await until(lambda: task.state == "RUNNING")
        pids = await asyncio.to_thread(backend.client.run, os.getpid)
        busy = backend._by_uid[task.uid].worker
        other, frozen = next(item for item in pids.items() if item[0] != busy)
        there = ComputeTask(executable="sleep", arguments=["600"], **options(workers=[other]))
        await session.submit_tasks([there])
        await until(lambda: there.state == "RUNNING")
        os.kill(frozen, signal.SIGSTOP)
        try:
            stopped, unknown = await asyncio.gather(session.cancel(task), session.cancel(there))
            assert stopped
            assert not unknown  # of the one there nobody can tell
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert [task.state, there.state] == ["CANCELED", "RUNNING"]

    run(scenario, cluster=expendable)


def test_an_interrupted_connection_fails_what_is_in_flight(run: Any) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        # In one graph: some have ended, some run, some wait for a worker.
        tasks = [ComputeTask(function=time.sleep, args=(i and 1.5,)) for i in range(6)]
        await session.submit_tasks(tasks)
        await until(lambda: tasks[0].done() and tasks[1].state == "RUNNING")
        backend.client.loop.add_callback(backend.client.scheduler_comm.comm.abort)
        await session.wait_tasks(tasks, timeout=30)
        for task in tasks[1:]:
            assert isinstance(task.exception, BackendError), task
            assert task.exception.transient
        await until(lambda: backend.client.status == "running")
        (again,) = await ended(session, ComputeTask(function=add, args=(1,)))
        assert again.return_value == 2

    run(scenario)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], str]]]:
    """Start `python -c` or `python -m` processes, which end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **kwargs: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=tmp_path, start_new_session=True, **kwargs
        )
        started.append(process)
        return process

    yield start  # type: ignore[misc]
    for process in started:
        process.kill()
        process.wait(30)


def test_a_lost_scheduler_fails_what_is_in_flight(processes: Any, tmp_path: Path) -> None:
    info = tmp_path / "scheduler.json"
    scheduler = processes(
        "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0",
        "--no-dashboard", "--scheduler-file", str(info),
    )  # fmt: skip
    processes(
        "-m", "distributed.cli.dask_worker", "--scheduler-file", str(info), "--nthreads", "1",
        "--no-dashboard", "--no-nanny", "--death-timeout", "20", "--local-directory", str(tmp_path),
    )  # fmt: skip

    async def main() -> None:
        await until(lambda: info.exists() and info.read_text())
        address = json.loads(info.read_text())["address"]
        backend = await DaskExecutionBackend(cluster=address)
        async with Session(backends=[backend], work_dir=tmp_path) as session:
            tasks = [ComputeTask(function=time.sleep, args=(600,)) for _ in range(20)]
            await session.submit_tasks(tasks)
            await until(lambda: any(t.state == "RUNNING" for t in tasks))
            begun = time.monotonic()
            scheduler.kill()
            await session.wait_tasks(tasks, timeout=30)
            for task in tasks:
                assert isinstance(task.exception, BackendError)
                assert task.exception.transient
                assert "scheduler" in str(task.exception)
            late = ComputeTask(function=add, args=(1,))
            await ended(session, late)
            assert isinstance(late.exception, BackendError)
        assert time.monotonic() - begun < 40

    asyncio.run(main())


DRIVER = """
import asyncio, sys, time
from rhapsody.api import ComputeTask, Session
from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

async def main():
    cluster = sys.argv[1] if len(sys.argv) > 1 else None
    resources = None if cluster else {"n_workers": 1, "threads_per_worker": 1}
    backend = await DaskExecutionBackend(resources, cluster=cluster)
    async with Session(backends=[backend]) as session:
        task = ComputeTask(executable="sh", arguments=["-c", "echo $$ > pid; sleep 600"])
        await session.submit_tasks([task])
        await session.wait_tasks([task])

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("own", [True, False], ids=["own cluster", "cluster of others"])
def test_no_orphan_after_a_driver_was_killed(
    processes: Any, cluster: Any, tmp_path: Path, own: bool
) -> None:
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    pid_file = tmp_path / "pid"
    if not own:  # the workers of the shared cluster have another working directory
        text = (tmp_path / "driver.py").read_text()
        (tmp_path / "driver.py").write_text(text.replace("> pid;", f"> {pid_file};"))
    driver = processes("driver.py", *([] if own else [cluster.scheduler_address]))

    async def main() -> None:
        await until(lambda: pid_file.exists() and pid_file.read_text().strip())
        pid = int(pid_file.read_text())
        assert alive(pid)
        driver.kill()
        await until(lambda: not alive(pid), 20)

    asyncio.run(main())
