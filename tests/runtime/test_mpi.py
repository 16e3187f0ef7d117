"""Executables with resources: ranks under a real `mpiexec`, cores, GPUs and memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fifos import PATIENCE, Fifo
from processes import descendants_of, most_at_once, open_session, public_listeners, run
from rhapsody.api import ComputeTask, ResourceError, Resources, TaskExecutionError

# A program of MPI without anything to compile: the library of the `mpich` package, by ctypes.
MPI = """
import ctypes, json, os, sys
mpi = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
world, byte_int, op_sum = 0x44000000, 0x4c000405, 0x58000003  # mpi.h of MPICH
assert mpi.MPI_Init(None, None) == 0
rank, size, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
mpi.MPI_Comm_rank(world, ctypes.byref(rank))
mpi.MPI_Comm_size(world, ctypes.byref(size))
mine = ctypes.c_int(rank.value + 10)
mpi.MPI_Allreduce(ctypes.byref(mine), ctypes.byref(total), 1, byte_int, op_sum, world)
if len(sys.argv) > 2:
    with open(sys.argv[2], "w") as roster:
        print(os.getpid(), file=roster, flush=True)
        open(sys.argv[3]).read()
said = [rank.value, size.value, total.value, sorted(os.sched_getaffinity(0)),
        os.environ.get("PMI_RANK")]
os.write(1, (json.dumps(said) + "\\n").encode())
mpi.MPI_Barrier(world)
assert mpi.MPI_Finalize() == 0
"""


def library() -> str:
    files = importlib.metadata.files("mpich") or []
    (found,) = [file for file in files if file.name == "libmpi.so.12"]
    return str(found.locate())


def mpi(*arguments: str, **fields: Any) -> ComputeTask:
    return ComputeTask(
        executable=sys.executable,
        arguments=["-I", "-S", "-c", MPI, library(), *arguments],
        resources=Resources(ranks=2),
        **fields,
    )


def shell(script: str, **fields: Any) -> ComputeTask:
    return ComputeTask(executable="/bin/sh", arguments=["-c", script], **fields)


# ---------------------------------------------------------------------- ranks


async def test_ranks_find_each_other_on_cores_of_their_own() -> None:
    task = mpi()
    await run(task)
    assert task.state == "DONE", task.stderr
    assert task.stdout is not None
    said = sorted(json.loads(line) for line in task.stdout.splitlines())
    assert [(rank, size, total) for rank, size, total, _, _ in said] == [(0, 2, 21), (1, 2, 21)]
    assert [number for *_, number in said] == ["0", "1"]
    cores = {core for *_, affinity, _ in said for core in affinity}
    assert len(cores) == 2
    assert cores <= os.sched_getaffinity(0)


async def test_the_cores_of_all_ranks_are_reserved() -> None:
    script = "echo begin >> log; echo end >> log"
    ranks = [shell(script, resources=Resources(ranks=2)) for _ in range(2)]
    single = [shell(script, resources=Resources()) for _ in range(10)]
    free = [shell(script) for _ in range(30)]
    tasks = [*free[:10], *ranks[:1], *single, *free[10:], *ranks[1:]]
    await run(*tasks)
    assert {task.state for task in tasks} == {"DONE"}
    assert len(Path("log").read_text().split()) == 2 * (2 * 2 + 10 + 30)
    assert most_at_once(Path("log")) <= 2


async def test_a_failing_rank_fails_the_task_with_its_exit_code() -> None:
    tasks = [shell("exit $((7 * PMI_RANK))", resources=Resources(ranks=2)) for _ in range(12)]
    await run(*tasks)
    assert [(task.state, task.exit_code) for task in tasks] == [("FAILED", 7)] * 12
    assert all(isinstance(task.exception, TaskExecutionError) for task in tasks)


async def test_arguments_are_no_command_of_mpiexec() -> None:
    evil = [":", "-n", "1", "touch", "pwned", ":;", "a b", "$(touch pwned)", "'", ""]
    show = "import sys, json; print(json.dumps(sys.argv[1:]))"
    task = ComputeTask(
        executable=sys.executable,
        arguments=["-I", "-S", "-c", show, *evil],
        resources=Resources(ranks=2),
    )
    await run(task)
    assert task.stdout is not None
    assert [json.loads(line) for line in task.stdout.splitlines()] == [evil, evil]
    assert not Path("pwned").exists()


async def test_a_missing_program_fails_the_task() -> None:
    task = ComputeTask(executable="no-such-program", resources=Resources(ranks=2))
    after = shell("exit 0", resources=Resources(ranks=2))
    await run(task, after)
    assert (task.state, after.state) == ("FAILED", "DONE")
    assert task.exit_code != 0


async def test_cancel_leaves_no_rank(roster: Fifo) -> None:
    os.mkfifo("go")
    task = mpi(str(roster.path), "go")
    async with open_session() as session:
        await session.submit_tasks([task])
        await roster.lines(2)
        assert await session.cancel(task)
        assert roster.is_empty()
        after = shell("exit 0", resources=Resources(ranks=2))
        await session.submit_tasks([after])
        await session.wait_tasks([after], timeout=PATIENCE)
    assert (task.state, after.state) == ("CANCELED", "DONE")


@pytest.mark.parametrize("trap", ["trap '' TERM", ": nothing"])
async def test_cancel_leaves_no_rank_that_ignores_sigterm(roster: Fifo, trap: str) -> None:
    script = f"{trap}; {roster.here}; sleep 1000; true"
    task = shell(script, resources=Resources(ranks=2))
    async with open_session(grace=0.1) as session:
        await session.submit_tasks([task])
        await roster.lines(2)
        assert await session.cancel(task)
        assert roster.is_empty()
    assert task.state == "CANCELED"


async def test_nothing_listens_on_a_public_interface(roster: Fifo) -> None:
    os.mkfifo("go")
    task = mpi(str(roster.path), "go")
    async with open_session() as session:
        await session.submit_tasks([task])
        await roster.lines(2)
        family = descendants_of(os.getpid())
        assert len(family) >= 4  # the warden, mpiexec, two ranks
        assert public_listeners([os.getpid(), *family]) == []
        Path("go").write_text("")
        assert await session.cancel(task) or task.done()


async def test_without_mpiexec_the_error_has_the_line_that_installs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_session() as session:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        with pytest.raises(ResourceError, match=r"python -m pip install 'mpich<5'"):
            await session.submit_tasks([shell("exit 0", resources=Resources(ranks=2))])
        alone = shell("exit 0", resources=Resources(ranks=1))
        monkeypatch.undo()
        await session.submit_tasks([alone])
        await session.wait_tasks([alone], timeout=PATIENCE)
        assert alone.state == "DONE"


# ---------------------------------------------------------------------- cores, GPUs, memory

CORES = "import os; print(*sorted(os.sched_getaffinity(0)))"


def python(code: str, **fields: Any) -> ComputeTask:
    return ComputeTask(executable=sys.executable, arguments=["-I", "-S", "-c", code], **fields)


async def test_cores_are_pinned_for_those_who_asked() -> None:
    one = [python(CORES, resources=Resources()) for _ in range(4)]
    two = python(CORES, resources=Resources(cores_per_rank=2))
    free = python(CORES)
    await run(*one, two, free)
    mine = os.sched_getaffinity(0)
    for task, count in [*((task, 1) for task in one), (two, 2)]:
        assert task.stdout is not None
        cores = {int(word) for word in task.stdout.split()}
        assert len(cores) == count
        assert cores <= mine
    assert free.stdout is not None
    assert {int(word) for word in free.stdout.split()} == mine


async def test_two_at_once_have_different_cores() -> None:
    os.mkfifo("a")
    first = shell(f"cat a; {sys.executable} -I -S -c '{CORES}'", resources=Resources())
    second = shell(f"{sys.executable} -I -S -c '{CORES}'; echo go > a", resources=Resources())
    await run(first, second)
    assert first.stdout is not None
    assert first.stdout.startswith("go\n")
    assert first.stdout.split()[1:] != str(second.stdout).split()


async def test_gpus_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    show = 'echo "$CUDA_VISIBLE_DEVICES $HIP_VISIBLE_DEVICES"'
    os.mkfifo("a")
    one = Resources(gpus_per_rank=1)
    first = shell(f"read _ < a; {show}", resources=one)
    second = shell(f"{show}; echo go > a", resources=one)
    both = shell(show, resources=Resources(gpus_per_rank=2))
    free = shell('echo "$CUDA_VISIBLE_DEVICES"')
    chosen = shell(
        show, resources=one, task_backend_specific_kwargs={"env": {"CUDA_VISIBLE_DEVICES": "7"}}
    )
    await run(first, second, both, free, chosen)
    assert {first.stdout, second.stdout} == {"0 0\n", "1 1\n"}
    assert both.stdout == "0,1 0,1\n"
    assert free.stdout == "0,1\n"
    assert str(chosen.stdout).split()[0] == "7"  # a backend's own options win


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (Resources(cores_per_rank=4096), "4096 cores"),
        (Resources(ranks=4096), "4096 cores"),
        (Resources(gpus_per_rank=3), "3 GPUs"),
        (Resources(memory_per_rank="4000TiB"), "bytes of memory"),
    ],
)
async def test_more_than_the_machine_has_is_refused_at_submit(
    need: Resources, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    good = shell("exit 0")
    async with open_session() as session:
        with pytest.raises(ResourceError, match=words):
            await session.submit_tasks([shell("exit 0", resources=need), good])
        await session.wait_tasks([good], timeout=PATIENCE)
    assert good.state == "DONE"


async def test_resources_give_a_folder_and_an_environment(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    need = Resources(cwd=str(tmp_path / "there"), env={"GIVEN": "by resources"})
    task = shell('pwd -P; echo "$GIVEN"', resources=need)
    await run(task)
    assert task.stdout == f"{(tmp_path / 'there').resolve()}\nby resources\n"
