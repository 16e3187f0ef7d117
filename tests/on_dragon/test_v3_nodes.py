"""The V3 backend on two nodes: places, jobs over both, and a node that dies."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody import ComputeTask
from rhapsody.api import Resources
from rhapsody.api.errors import BackendError, WorkerLostError

from . import small, work
from .nodes import Nodes
from .runtime import Runtime
from .test_v3 import options


@pytest.fixture(scope="module")
def dragon(runtime_on_two: Runtime) -> Iterator[Runtime]:
    runtime_on_two.call(work.open_session)
    yield runtime_on_two
    runtime_on_two.call(work.close_session)


async def _everywhere() -> dict[str, int]:
    tasks = await work.run(*(ComputeTask(function=work.host) for _ in range(50)))
    found: dict[str, int] = {}
    for task in tasks:
        assert task.state == "DONE", task.exception
        found[task.return_value] = found.get(task.return_value, 0) + 1
    return found


def test_functions_run_on_both_nodes(dragon: Runtime, two_nodes: Nodes) -> None:
    found = dragon.call(_everywhere)
    assert sorted(found) == two_nodes.hosts
    assert sum(found.values()) == 50


async def _pinned(host: str) -> None:
    from dragon.infrastructure.policy import Policy

    policy = Policy(placement=Policy.Placement.HOST_NAME, host_name=host)
    program, function = await work.run(
        ComputeTask(executable="hostname", **options(process_template={"policy": policy})),
        ComputeTask(function=work.host, **options(process_template={"policy": policy})),
    )
    assert program.stdout == f"{host}\n", program.exception
    assert function.return_value == host


@pytest.mark.parametrize("number", [1, 2])
def test_a_policy_names_the_node(dragon: Runtime, number: int) -> None:
    dragon.call(_pinned, f"node{number}")


async def _job(ranks: int) -> None:
    programs, functions = await work.run(
        ComputeTask(executable="hostname", resources=Resources(ranks=ranks), **options(pmi=None)),
        ComputeTask(function=work.host, resources=Resources(ranks=ranks), **options(pmi=None)),
    )
    assert (programs.exception, functions.exception) == (None, None)
    for said in (str(programs.stdout).split(), functions.return_value):
        assert len(said) == ranks
        assert set(said) == {"node1", "node2"}


def test_a_job_over_both_nodes(dragon: Runtime) -> None:
    topology = dragon.call(_topology)
    dragon.call(_job, sum(node["cores"] for node in topology.values()))


async def _wide() -> None:
    """Each rank wants all cores of a node, so that there is one on each."""
    cores = min(os.cpu_count() or 1, min(n["cores"] for n in (await _topology()).values()))
    need = Resources(ranks=2, cores_per_rank=cores)
    (task,) = await work.run(ComputeTask(function=work.host, resources=need, **options(pmi=None)))
    assert sorted(task.return_value) == ["node1", "node2"], task.exception


def test_ranks_go_where_their_cores_are(dragon: Runtime) -> None:
    dragon.call(_wide)


async def _topology() -> dict[str, dict[str, Any]]:
    return work.backend().topology()


async def _kill(marker: str) -> dict[str, Any]:
    before = set(threading.enumerate())
    await work.open_session(node_timeout=5.0)
    # On the first Batch, which is left to it when the other takes a worker down.
    tasks = [await work.start(ComputeTask(function=work.spin, args=(60.0,)))]
    await work.run(ComputeTask(function=work.die))
    tasks += [ComputeTask(function=work.spin, args=(60.0,)) for _ in range(8)]
    tasks += [ComputeTask(executable="sleep", arguments=["60"]) for _ in range(4)]
    await work.session().submit_tasks(tasks[1:])
    while not any(task.state == "RUNNING" for task in tasks[1:]):
        await asyncio.sleep(0.05)
    assert len(work.backend()._executors) == 2
    other = next(host for host in work.backend().topology() if host != work.host())
    Path(marker).write_text(other)  # not the node that we are on
    began = time.monotonic()
    await work.session().wait_tasks(tasks, timeout=40)
    settled = time.monotonic() - began
    for task in tasks:
        error = task.exception
        assert isinstance(error, WorkerLostError), task
        assert error.transient
        assert error.host == other
    late = ComputeTask(function=work.add, args=(1, 1))
    await work.run(late)
    assert isinstance(late.exception, BackendError)
    took = {"settled": settled, "closed": await work.close_session()}
    until = time.monotonic() + 10
    while [t for t in threading.enumerate() if not (t.daemon or t in before)]:
        assert time.monotonic() < until, "a thread of a Batch keeps the program from its end"
        await asyncio.sleep(0.05)
    return took


def test_a_lost_node_settles_everything(tmp_path: Path) -> None:
    marker = tmp_path / "running"
    with Nodes(2) as nodes:
        runtime = Runtime(nodes, small.environment(4), cwd=tmp_path)

        def killer() -> None:
            while not (marker.exists() and marker.read_text()):
                time.sleep(0.1)
            nodes.kill(marker.read_text())

        thread = threading.Thread(target=killer)
        thread.start()
        took = runtime.call_within(90, _kill, str(marker))
        thread.join()
        assert took["settled"] < 15
        assert took["closed"] < 10
        runtime.close()  # Dragon's launcher never ends after that
        assert runtime.command.wait(10.0).code != 0
