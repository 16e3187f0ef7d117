"""A Dask cluster of containers: a scheduler and workers on a network of their own."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import pytest
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from rhapsody.api import ComputeTask, Session
from rhapsody.api.errors import BackendError, TaskExecutionError, WorkerLostError
from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

from . import docker_engine

pytestmark = [
    pytest.mark.timeout(300),
    # Debian's Python is of the same minor version as ours, which is what counts, but not the same.
    pytest.mark.filterwarnings("default::distributed.versions.VersionMismatchWarning"),
]

# The containers do not have this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

# How soon a silent peer counts as gone: the least that Dask takes. Its own 30 s would only make the
# tests slow.
_SILENCE = "11s"


class DaskContainers:
    """A scheduler and workers; nothing of it is published on the host's own addresses."""

    def __init__(self, image: str, network: Network) -> None:
        self.image = image
        self.network = network
        self.workers: list[DockerContainer] = []
        self.scheduler = self._container("dask scheduler --no-dashboard", "Scheduler at:")
        self.scheduler.with_network_aliases("scheduler").start()

    def _container(self, command: str, ready: str, **options: Any) -> DockerContainer:
        return (
            DockerContainer(self.image)
            .with_kwargs(labels={docker_engine.LABEL: "1"}, **options)
            .with_network(self.network)
            .with_env("DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP", _SILENCE)
            .with_command(command)
            .waiting_for(LogMessageWaitStrategy(ready).with_startup_timeout(60))
        )

    def add_worker(self, **options: Any) -> DockerContainer:
        name = f"w{len(self.workers)}"
        words = ["dask", "worker", "tcp://scheduler:8786", "--nthreads", "1", "--name", name]
        words += ["--no-dashboard", "--memory-limit", "1GiB"]
        worker = self._container(" ".join(words), "Registered to:", **options)
        self.workers.append(worker.start())
        return worker

    @property
    def address(self) -> str:
        container = self.scheduler.get_wrapped_container()
        container.reload()
        networks = container.attrs["NetworkSettings"]["Networks"]
        return f"tcp://{networks[self.network.name]['IPAddress']}:8786"

    def stop(self) -> None:
        for container in (*self.workers, self.scheduler):
            container.stop()


@pytest.fixture
def containers(dask_image: str) -> Iterator[DaskContainers]:
    with Network(docker_network_kw={"labels": {docker_engine.LABEL: "1"}}) as network:
        containers = DaskContainers(dask_image, network)
        try:
            containers.add_worker()
            containers.add_worker()
            yield containers
        finally:
            containers.stop()


@pytest.fixture
def run(containers: DaskContainers, tmp_path: Path) -> Callable[..., Any]:
    """Run `scenario(session, backend)` in a session on the cluster."""

    def run(scenario: Callable[..., Coroutine[Any, Any, Any]], **options: Any) -> Any:
        async def main() -> Any:
            backend = await DaskExecutionBackend(cluster=containers.address, **options)
            async with Session(backends=[backend], work_dir=tmp_path) as session:
                return await asyncio.wait_for(scenario(session, backend), 240)

        with dask.config.set({"distributed.comm.timeouts.tcp": _SILENCE}):
            return asyncio.run(main())

    return run


def square(number: int, seconds: float = 0.0) -> tuple[int, str]:
    time.sleep(seconds)
    return number * number, socket.gethostname()


async def square_later(number: int) -> int:
    await asyncio.sleep(0.01)
    return number * number


def eat(megabytes: int) -> int:
    data = []
    for _ in range(megabytes // 10):
        data.append(os.urandom(10 << 20))
        time.sleep(0.05)  # so that the nanny sees it grow
    return len(data)


async def settled(tasks: list[ComputeTask], count: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while sum(task.done() for task in tasks) < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def check_squares(tasks: list[ComputeTask]) -> set[str]:
    """All of them right; returns the hosts that ran them."""
    assert [t.exception for t in tasks] == [None] * len(tasks)
    assert [t.return_value[0] for t in tasks] == [n * n for n in range(len(tasks))]
    return {t.return_value[1] for t in tasks}


def test_all_kinds_of_tasks(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        env: dict[str, Any] = {
            "task_backend_specific_kwargs": {"cwd": "/usr", "env": {"COLOUR": "red"}}
        }
        shell: dict[str, Any] = {"task_backend_specific_kwargs": {"shell": True}}
        tasks = [
            ComputeTask(function=square, args=(3,)),
            ComputeTask(function=square_later, args=(4,)),
            ComputeTask(executable="sh", arguments=["-c", "echo $COLOUR; pwd; hostname"], **env),
            ComputeTask(executable="echo $((6*7)); exit 3", **shell),
            ComputeTask(executable="hostname", capture_stdio=True),
        ]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=60)
        function, later, program, fails, captured = tasks
        assert function.return_value[0] == 9
        assert function.return_value[1] != socket.gethostname()
        assert later.return_value == 16
        colour, folder, host = str(program.stdout).split()
        assert (colour, folder) == ("red", "/usr")
        assert host != socket.gethostname()
        assert isinstance(fails.exception, TaskExecutionError)
        assert (fails.exit_code, fails.stdout) == (3, "42\n")
        # The container shares no files with us, and yet the file is where it should be.
        assert Path(str(captured.stdout)).parent == session.path
        assert Path(str(captured.stdout)).read_text().strip() != socket.gethostname()

    run(scenario)


def test_a_worker_container_killed_in_mid_run(run: Any, containers: DaskContainers) -> None:
    async def scenario(session: Session, _: Any) -> None:
        tasks = [ComputeTask(function=square, args=(n, 0.1)) for n in range(100)]
        await session.submit_tasks(tasks)
        await settled(tasks, 30)
        containers.workers[1].get_wrapped_container().kill("SIGKILL")
        await session.wait_tasks(tasks, timeout=90)
        assert len(check_squares(tasks)) == 2

    run(scenario)


def test_all_workers_killed(run: Any, containers: DaskContainers) -> None:
    async def scenario(session: Session, _: Any) -> None:
        tasks = [ComputeTask(executable="sleep", arguments=["600"]) for _ in range(4)]
        await session.submit_tasks(tasks)
        while not any(task.state == "RUNNING" for task in tasks):
            await asyncio.sleep(0.05)
        for worker in containers.workers:
            worker.get_wrapped_container().kill("SIGKILL")
        await session.wait_tasks(tasks, timeout=60)
        for task in tasks:
            assert isinstance(task.exception, BackendError)
            assert task.exception.transient
            assert "no worker for 3 s" in str(task.exception)

    run(scenario, worker_timeout=3.0)


def test_the_scheduler_container_killed(run: Any, containers: DaskContainers) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        address = containers.address
        tasks = [ComputeTask(function=square, args=(n, 1.0)) for n in range(50)]
        await session.submit_tasks(tasks)
        await settled(tasks, 2)
        begun = time.monotonic()
        containers.scheduler.get_wrapped_container().kill("SIGKILL")
        await session.wait_tasks(tasks, timeout=60)
        assert time.monotonic() - begun < 30
        lost = [task for task in tasks if task.state == "FAILED"]
        assert len(lost) >= 40
        for task in lost:
            assert isinstance(task.exception, BackendError)
            assert task.exception.transient
            assert str(task.exception.host) in address

    run(scenario)


def test_the_network_of_a_worker_cut_and_restored(run: Any, containers: DaskContainers) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        # A worker that has lost its scheduler ends; whoever started it starts it again.
        cut = containers.add_worker(restart_policy={"Name": "always"}).get_wrapped_container()
        network: Any = containers.network._network
        tasks = [ComputeTask(function=square, args=(n, 0.2)) for n in range(150)]
        await session.submit_tasks(tasks)
        await settled(tasks, 30)
        await asyncio.to_thread(network.disconnect, cut)
        await session.wait_tasks(tasks, timeout=120)
        hosts = check_squares(tasks)
        assert hosts >= {worker.get_wrapped_container().short_id for worker in containers.workers}
        await asyncio.to_thread(network.connect, cut)
        await asyncio.to_thread(backend.client.wait_for_workers, 3, timeout=90)
        more = [ComputeTask(function=square, args=(n, 0.2)) for n in range(30)]
        await session.submit_tasks(more)
        await session.wait_tasks(more, timeout=60)
        assert len(check_squares(more)) == 3

    run(scenario)


def test_a_worker_killed_by_its_memory_limit(run: Any, containers: DaskContainers) -> None:
    async def scenario(session: Session, _: Any) -> None:
        greedy = ComputeTask(function=eat, args=(4000,))
        modest = [ComputeTask(function=square, args=(n, 0.05)) for n in range(40)]
        await session.submit_tasks([greedy, *modest])
        await session.wait_tasks([greedy, *modest], timeout=200)
        assert isinstance(greedy.exception, WorkerLostError)
        assert greedy.exception.transient
        assert greedy.exception.host
        check_squares(modest)

    run(scenario)


def test_ten_thousand_tasks(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        tasks = [ComputeTask(function=square, args=(n,)) for n in range(10_000)]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=220)
        assert len(check_squares(tasks)) == 2

    run(scenario)
