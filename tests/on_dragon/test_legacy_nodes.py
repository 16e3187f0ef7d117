"""V1 and V2 on two nodes: both are used, and one of them dies."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from rhapsody.api import Resources
from rhapsody.api.errors import BackendError, WorkerLostError

from . import small, test_legacy, work
from .nodes import Nodes
from .runtime import Runtime
from .test_legacy import function, options, program, run, session


async def _both() -> None:
    tasks = await run(*(function("two", work.host) for _ in range(200)))
    assert {task.return_value for task in tasks} == {"node1", "node2"}
    nodes = session().backends["one"].topology()  # type: ignore[attr-defined]
    ranks = sum(node["cores"] for node in nodes.values())
    said, hosts = await run(
        program("one", "hostname", resources=Resources(ranks=ranks), **options(pmi="cray")),
        function("one", work.host, resources=Resources(ranks=ranks), **options(pmi=None)),
    )
    assert said.state == "DONE", said.exception
    for found in (str(said.stdout).split(), hosts.return_value):
        assert sorted(found) == ["node1"] * (ranks // 2) + ["node2"] * (ranks // 2)
    sleeps = [program(name, "sleep", "60") for name in ("one", "two") for _ in range(4)]
    await test_legacy.start(*sleeps)
    assert all(await asyncio.gather(*map(session().cancel, sleeps)))


async def _kill(marker: str) -> tuple[float, float]:
    tasks = [function(name, work.spin, 60.0) for name in ("one", "two") for _ in range(8)]
    await session().submit_tasks(tasks)
    while sum(task.state == "RUNNING" for task in tasks) < 8:
        await asyncio.sleep(0.05)
    topology = session().backends["one"].topology()  # type: ignore[attr-defined]
    other = next(host for host in topology if host != work.host())
    Path(marker).write_text(other)  # not the node that we are on
    began = time.monotonic()
    await session().wait_tasks(tasks, timeout=40)
    settled = time.monotonic() - began
    for task in tasks:
        assert isinstance(task.exception, WorkerLostError), task
        assert (task.exception.host, task.exception.transient) == (other, True)
    for name in ("one", "two"):
        (late,) = await run(function(name, work.add, 1, 1))
        assert isinstance(late.exception, BackendError)
    return settled, await test_legacy.close_session()


@pytest.mark.multinode
def test_two_nodes_one_of_which_dies(tmp_path: Path) -> None:
    marker = tmp_path / "running"

    def killer() -> None:
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.1)
        nodes.kill(marker.read_text())

    with Nodes(2) as nodes, Runtime(nodes, small.environment(4), cwd=tmp_path) as runtime:
        runtime.call(test_legacy.open_session, str(tmp_path), 4, 5.0)
        runtime.call(_both)
        thread = threading.Thread(target=killer, daemon=True)
        thread.start()
        settled, closed = runtime.call_within(90, _kill, str(marker))
        thread.join()
        assert settled < 15
        assert closed < 10
        runtime.close()  # Dragon's launcher never ends after that
        assert runtime.command.wait(10.0).code != 0
