"""Ranks that form one MPI_COMM_WORLD, under the Dragon that `rhapsody launch` starts."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rhapsody import ComputeTask
from rhapsody.api import Resources
from rhapsody.api.errors import TaskExecutionError
from rhapsody.cli import doctor

from . import small, work
from .nodes import Nodes, Sandbox
from .runtime import Runtime

# The environment of the tests has MPICH too, and mpi4py would take it.
MPI = {"MPI4PY_LIBMPI": os.path.join(sys.prefix, "lib", "libmpi.so.40")}
LAUNCH = [sys.executable, "-m", "rhapsody", "launch", "--dragon"]
PROGRAM = """
from on_dragon.test_mpi import note
note("begin")
from mpi4py import MPI
world = MPI.COMM_WORLD
world_rank = world.Get_rank()
total = world.allreduce(world_rank + 1)
print(world.Get_rank(), world.Get_size(), total, MPI.Get_processor_name())
MPI.Finalize()
note("end")
raise SystemExit(world_rank)
"""


def note(word: str) -> None:
    """Append a line to the log of the test's worlds, if it has one; after the first, wait a bit."""
    if "WORLDS" in os.environ and os.environ["PMIX_RANK"] == "0":
        with open(os.environ["WORLDS"], "a") as log:
            log.write(f"{word}\n")
        if word == "begin":
            time.sleep(2)


def rank() -> tuple[int, int, int, str]:
    """Rank, size, the sum of all ranks from 1 on, host."""
    note("begin")
    from mpi4py import MPI as mpi

    world = mpi.COMM_WORLD
    total = world.allreduce(world.Get_rank() + 1)
    note("end")
    return world.Get_rank(), world.Get_size(), total, work.host()


async def check(backend: str, on: Sequence[str | None] = (None, None)) -> None:
    """A function by `Resources`, a program by templates; pinned to these hosts, if they are named.

    The program fails on its last rank, and the exit codes of all reach the task.
    """
    templates = [(1, {"env": MPI, **pinned(host)}) for host in on]
    program = ComputeTask(
        executable=sys.executable,
        arguments=["-c", PROGRAM],
        task_backend_specific_kwargs={"process_templates": templates, "pmi": "pmix"},
        backend=backend,
    )
    function = ComputeTask(
        function=rank,
        resources=Resources(ranks=2, env=MPI),
        task_backend_specific_kwargs={"process_templates": templates} if all(on) else {},
        backend=backend,
    )
    await work.run(program, function, timeout=150)
    hosts = [host or work.host() for host in on]
    assert function.state == "DONE", function.exception
    assert function.return_value == [(rank, 2, 3, host) for rank, host in enumerate(hosts)]
    assert isinstance(program.exception, TaskExecutionError), program.exception
    assert sorted(program.exception.exit_codes or ()) == [0, 1]
    assert program.stdout == "".join(f"{rank} 2 3 {host}\n" for rank, host in enumerate(hosts))


async def check_both(on: Sequence[str]) -> None:
    await asyncio.gather(check("dragon", on), check("v1", on))


def pinned(host: str | None) -> dict[str, Any]:
    from dragon.infrastructure.policy import Policy

    if host is None:
        return {}
    return {"policy": Policy(placement=Policy.Placement.HOST_NAME, host_name=host)}


@pytest.fixture(scope="module")
def dragon(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    folder = tmp_path_factory.mktemp("mpi")
    with Runtime(sandbox, small.environment(4), launcher=LAUNCH, cwd=folder) as runtime:
        runtime.call(work.open_both)
        yield runtime
        runtime.call(work.close_session)
        assert runtime.stop().code == 0
        assert sandbox.left() == []


@pytest.mark.parametrize("backend", ["dragon", "v1"])
def test_two_ranks_are_one_world(dragon: Runtime, backend: str) -> None:
    dragon.call_within(110, check, backend)


def test_doctor_finds_the_library_in_there(dragon: Runtime) -> None:
    found = dragon.call(doctor.check_dragon)
    assert (found.status, found.data["pmix"]) == ("ok", True)


ALONE = """
import asyncio, sys
from rhapsody import ComputeTask, Session
from rhapsody.api import Resources
from rhapsody.backends import DragonExecutionBackend

async def main(program, libmpi):
    async with Session(backends=[DragonExecutionBackend()]) as session:
        resources = Resources(ranks=2, env={"MPI4PY_LIBMPI": libmpi})
        task = ComputeTask(executable=sys.executable, arguments=[program], resources=resources)
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        print(task.stdout, task.exception)

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


def test_in_a_runtime_of_the_programs_own(tmp_path: Path) -> None:
    (tmp_path / "workflow.py").write_text(ALONE)
    (tmp_path / "rank.py").write_text(PROGRAM.replace("raise", "# raise"))
    (tmp_path / "tmp").mkdir()
    env = {**small.environment(4), "TMPDIR": str(tmp_path / "tmp")}
    with Sandbox() as place:
        command = [sys.executable, "workflow.py", "rank.py", MPI["MPI4PY_LIBMPI"]]
        result = place.run(command, env=env, cwd=tmp_path)
        host = work.host()
        assert result.stdout == f"0 2 3 {host}\n1 2 3 {host}\n None\n", result
        assert place.left() == []
    assert list((tmp_path / "tmp").glob("rhapsody-libraries-*")) == []


@pytest.mark.multinode
def test_a_world_over_two_nodes(tmp_path: Path) -> None:
    """Also where its end takes longer than Batch waits, after which exit codes would be lost.

    Those of two backends take turns: if not, they wait for each other for ever, now and then.
    """
    slow, worlds = tmp_path / "slow", tmp_path / "worlds"
    files = {"RHAPSODY_TEST_SLOW_GROUPS": str(slow), "WORLDS": str(worlds)}
    env = {**small.environment(4), **files}
    with Nodes(2) as place:
        launcher = [*LAUNCH, "--hosts", ",".join(place.hosts)]
        with Runtime(place, env, launcher=launcher, cwd=tmp_path) as runtime:
            runtime.call(work.open_both)
            slow.write_text("5")
            runtime.call_within(170, check_both, place.hosts)
            runtime.call(work.close_session)
            assert runtime.stop().code == 0
            assert place.left(15.0) == []
    assert worlds.read_text().split() == ["begin", "end"] * 4
