"""V1 and V2 on one node, side by side on one runtime: every kind of task, and every bad end."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody import ComputeTask, Session, discover_backends, get_backend
from rhapsody.api import Resources
from rhapsody.api.errors import (
    BackendError,
    ResourceError,
    SerializationError,
    TaskExecutionError,
    TaskTimeoutError,
    TaskValidationError,
    WorkerLostError,
)
from rhapsody.backends import DragonExecutionBackendV1, DragonExecutionBackendV2

from . import small, work
from .nodes import Sandbox
from .runtime import Runtime

BOTH = pytest.mark.parametrize("name", ["one", "two"])
HERE = socket.gethostname()

_session: Session | None = None


def session() -> Session:
    assert _session is not None
    return _session


async def open_session(folder: str, workers: int = 2, node_timeout: float = 15.0) -> None:
    global _session
    _session = Session(
        backends=[
            DragonExecutionBackendV1({"working_dir": folder}, "one", node_timeout=node_timeout),
            DragonExecutionBackendV2(
                {"workers": workers, "working_dir": folder}, "two", node_timeout=node_timeout
            ),
        ]
    )
    await asyncio.gather(*_session.backends.values())


async def close_session() -> float:
    began = time.monotonic()
    await session().close()
    return time.monotonic() - began


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def dragon(runtime: Runtime, folder: str) -> Iterator[Runtime]:
    runtime.call(open_session, folder)
    yield runtime
    runtime.call(close_session)


async def run(*tasks: ComputeTask, timeout: float = 50.0) -> list[ComputeTask]:
    """Submit tasks, and return them when they have ended."""
    await session().submit_tasks(tasks)
    await session().wait_tasks(tasks, timeout=timeout)
    return list(tasks)


async def start(*tasks: ComputeTask) -> list[ComputeTask]:
    """Submit tasks, and return them when they run."""
    await session().submit_tasks(tasks)
    while not all(task.state == "RUNNING" for task in tasks):
        assert not any(task.done() for task in tasks), tasks
        await asyncio.sleep(0.02)
    return list(tasks)


def options(**given: Any) -> dict[str, Any]:
    return {"task_backend_specific_kwargs": given}


def function(name: str, call: Any, *args: Any, **fields: Any) -> ComputeTask:
    return ComputeTask(function=call, args=args, backend=name, **fields)


def program(name: str, executable: str, *arguments: str, **fields: Any) -> ComputeTask:
    return ComputeTask(executable=executable, arguments=list(arguments), backend=name, **fields)


# ---------------------------------------------------------------------- functions


async def _functions(name: str, folder: str) -> None:
    one, two, three, where = await run(
        function(name, work.add, 1, 2),
        function(name, work.later, "then"),
        ComputeTask(function=lambda **named: named, kwargs={"a": 1}, backend=name),
        function(name, os.getcwd),
    )
    assert (one.return_value, two.return_value, three.return_value) == (3, "then", {"a": 1})
    assert where.return_value == folder
    assert {(task.state, task.backend) for task in (one, two, three)} == {("DONE", name)}
    (child,) = await run(function(name, work.add, one, 10))
    assert child.return_value == 13


@BOTH
def test_functions(dragon: Runtime, folder: str, name: str) -> None:
    dragon.call(_functions, name, folder)


async def _errors(name: str) -> None:
    odd, result, left, argument, fine = await run(
        function(name, work.raise_odd),
        function(name, work.unpicklable),
        function(name, __import__("sys").exit, 4),
        function(name, work.add, __import__("sys")._getframe(), 1),
        function(name, work.add, 1, 1),
    )
    assert isinstance(odd.exception, work.Odd)
    assert odd.exception.code == 7
    assert "raise_odd" in str(odd.exception.__cause__)
    assert isinstance(result.exception, SerializationError)
    assert isinstance(left.exception, SystemExit)
    assert isinstance(argument.exception, SerializationError)
    assert fine.return_value == 2


@BOTH
def test_errors_are_the_functions_own(dragon: Runtime, name: str) -> None:
    dragon.call(_errors, name)


async def _large(name: str) -> None:
    size = 20 << 20
    back, there = await run(
        function(name, work.large, 20), function(name, len, bytes(size)), timeout=40
    )
    assert len(back.return_value) == there.return_value == size


@BOTH
def test_arguments_and_results_larger_than_a_message_may_be(dragon: Runtime, name: str) -> None:
    dragon.call(_large, name)


async def _many(count: int) -> int:
    tasks = await run(*(function("two", work.add, i, 1) for i in range(count)))
    assert [task.return_value for task in tasks] == list(range(1, count + 1))
    return session().backends["two"].dropped_events


def test_a_pool_runs_many(dragon: Runtime) -> None:
    assert dragon.call(_many, 5000) == 0


async def _at_most() -> None:
    began = [ComputeTask(function=work.spin, args=(0.3,), backend="one") for _ in range(5)]
    await session().submit_tasks(began)
    most = 0
    while not all(task.done() for task in began):
        most = max(most, sum(task.state == "RUNNING" for task in began))
        await asyncio.sleep(0.01)
    (node,) = session().backends["one"].topology().values()  # type: ignore[attr-defined]
    assert most == node["cores"] == node["workers"]


def test_no_more_processes_than_cores(dragon: Runtime) -> None:
    dragon.call(_at_most)


# ---------------------------------------------------------------------- executables


async def _programs(name: str, folder: str) -> None:
    here, there, fails, env, ends = await run(
        program(name, "/bin/pwd"),
        program(name, "/bin/pwd", **options(cwd="/")),
        program(name, "/bin/sh", "-c", "echo no >&2; exit 5"),
        program(name, "/bin/sh", "-c", "echo $A", **options(env={"A": "set"})),
        program(name, "/bin/cat"),
    )
    assert (here.stdout, there.stdout) == (folder + "\n", "/\n")
    assert isinstance(fails.exception, TaskExecutionError)
    assert (fails.exit_code, fails.exception.stderr) == (5, "no\n")
    assert env.stdout == "set\n"
    assert (ends.state, ends.stdout) == ("DONE", "")


@BOTH
def test_executables(dragon: Runtime, folder: str, name: str) -> None:
    dragon.call(_programs, name, folder)


async def _pool_programs() -> None:
    shell, reads, missing = await run(
        program("two", "echo $A", **options(shell=True, env={"A": "set"})),
        program("two", "cat", **options(stdin="read")),
        program("two", "not-there"),
    )
    assert (shell.stdout, reads.stdout, missing.exit_code) == ("set\n", "read", 127)


def test_the_local_backends_options_in_a_pool(dragon: Runtime) -> None:
    dragon.call(_pool_programs)


async def _ranks(folder: str) -> None:
    lines = "i=0; while [ $i -lt 2000 ]; do echo $i of $A; i=$((i+1)); done; exit $A"
    job, ranks, group = await run(
        program(
            "one",
            "/bin/sh",
            *("-c", lines),
            capture_stdio=True,
            **options(process_templates=[(1, {"env": {"A": str(a)}}) for a in (0, 4)], pmi=None),
        ),
        function("one", os.getcwd, resources=Resources(ranks=2), **options(pmi=None)),
        program("one", "/bin/pwd", resources=Resources(ranks=2), **options(pmi="cray")),
    )
    assert isinstance(job.exception, TaskExecutionError)
    assert job.exception.exit_codes == [0, 4]
    with open(str(job.stdout)) as file:
        said = [line.rpartition(" ")[2] for line in file.read().splitlines()]
    assert said == ["0"] * 2000 + ["4"] * 2000
    assert ranks.return_value == [folder] * 2
    assert (group.state, group.stdout) == ("DONE", f"{folder}\n" * 2), group.exception


def test_ranks(dragon: Runtime, folder: str) -> None:
    dragon.call(_ranks, folder)


def devices(seconds: float) -> str:
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"]


async def _gpus(folder: str) -> None:
    await open_session(folder)
    one = Resources(gpus_per_rank=1)
    tasks = await run(*(function("one", devices, 0.5, resources=one) for _ in range(4)))
    assert [task.return_value for task in tasks[:2]] == ["0", "1"]
    assert sorted(task.return_value for task in tasks) == ["0", "0", "1", "1"]
    assert [files for _, _, files in os.walk(folder) if files] == []
    await close_session()


def test_gpus_are_handed_out(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    with Sandbox() as place, Runtime(place, small.environment(gpus=2), cwd=folder) as runtime:
        runtime.call(_gpus, str(folder))
        assert runtime.stop().code == 0
        assert place.left() == []


# ---------------------------------------------------------------------- deaths


def die_well() -> None:
    os._exit(0)


async def _deaths(name: str) -> None:
    tasks = [function(name, work.add, i, 0) for i in range(8)]
    deaths = [function(name, work.die), function(name, die_well)]
    await run(*tasks[:3], *deaths, *tasks[3:])
    for task in deaths:
        assert isinstance(task.exception, WorkerLostError), task
    assert {task.state for task in tasks} == {"DONE"}
    if name == "two":
        assert str(deaths[0].exception).startswith(
            f"the worker process that ran task '{deaths[0].uid}'"
        )
        # Both are replaced: two tasks that wait for each other need two workers.
        when = time.time()
        both = await run(*(function("two", meet, i, when) for i in range(2)))
        assert [task.state for task in both] == ["DONE", "DONE"], both[0].exception


def meet(number: int, when: float) -> None:
    """Return when the other one has come, too."""
    mine, other = (f"/tmp/meet-{when}-{n}" for n in (number, 1 - number))
    open(mine, "w").close()
    end = time.monotonic() + 20
    while not os.path.exists(other):
        assert time.monotonic() < end
        time.sleep(0.01)


@BOTH
def test_a_process_that_dies_fails_its_task_alone(dragon: Runtime, name: str) -> None:
    dragon.call(_deaths, name)


# ---------------------------------------------------------------------- refusals

REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("one", options(shell=True), TaskValidationError, "does not know 'shell'"),
    ("one", options(process_template={"args": 1}), TaskValidationError, "args of a process"),
    ("one", {"resources": Resources(ranks=99), **options(pmi=None)}, ResourceError, "room for"),
    ("one", {"resources": Resources(gpus_per_rank=1)}, ResourceError, "room for 0"),
    ("two", options(process_template={}), TaskValidationError, "accepted: cwd, env"),
    ("two", {"resources": Resources(ranks=2)}, ResourceError, "dragon_v3 or dragon_v1"),
    ("two", {"resources": Resources(gpus_per_rank=1)}, ResourceError, "or for GPUs"),
]


async def _refused(name: str, fields: dict[str, Any]) -> None:
    fine = program(name, "/bin/true")
    try:
        await session().submit_tasks([program(name, "/bin/true", **fields), fine])
    finally:
        await session().wait_tasks([fine], timeout=30)
        assert fine.state == "DONE"


@pytest.mark.parametrize(("name", "fields", "error", "words"), REFUSED)
def test_what_cannot_be_run_is_refused(
    dragon: Runtime, name: str, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        dragon.call(_refused, name, fields)


async def _pinned() -> None:
    from dragon.infrastructure.policy import Policy

    (host,) = session().backends["one"].topology()  # type: ignore[attr-defined]
    policy = Policy(placement=Policy.Placement.HOST_NAME, host_name=host)
    fields = options(process_templates=[(99, {"policy": policy})], pmi=None)
    with pytest.raises(ResourceError):
        await _refused("one", fields)
    (there,) = await run(
        program("one", "/bin/hostname", **options(process_template={"policy": policy}))
    )
    assert there.stdout == f"{HERE}\n"


def test_a_policy_of_the_tasks_own(dragon: Runtime) -> None:
    dragon.call(_pinned)


@pytest.mark.parametrize(
    ("kind", "resources", "words"),
    [
        (
            DragonExecutionBackendV1,
            {"workers": 2},
            "have 'workers'; accepted: working_dir",
        ),
        (DragonExecutionBackendV2, {"slots": 2}, "'slots'; accepted: workers, working_dir"),
        (DragonExecutionBackendV2, {"workers": 0}, "at least 1, not 0"),
        (DragonExecutionBackendV2, {"workers": True}, "at least 1, not True"),
        (DragonExecutionBackendV1, {"working_dir": "/not/there"}, "an existing folder"),
        (DragonExecutionBackendV1, "dragon", "resources must be a dict"),
    ],
)
def test_resources_are_checked(kind: Any, resources: Any, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        kind(resources)


def test_by_name() -> None:
    assert type(get_backend("dragon_v1", name="one")) is DragonExecutionBackendV1
    assert type(get_backend("dragon_v2", {"workers": 3})) is DragonExecutionBackendV2
    assert {"dragon_v1", "dragon_v2"} <= discover_backends().keys()


# ---------------------------------------------------------------------- cancel and time limits


def stubborn(seconds: float) -> str:
    """Let no exception end it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except BaseException:
            continue
    return "done"


async def _cancel_running(name: str) -> None:
    # The shell's child ignores what ends the shell.
    nested = "trap '' TERM; sleep 60 & wait; sleep 60"
    tasks = [
        (function(name, work.spin, 60.0), 4.0),
        (function(name, asyncio.sleep, 60.0), 4.0),
        (program(name, "sleep", "60"), 4.0),
        (program(name, "/bin/sh", "-c", nested), 8.0),
        (function(name, stubborn, 60.0), 8.0),
    ]
    for task, bound in tasks:
        await start(task)
        began = time.monotonic()
        assert await session().cancel(task), task
        assert task.state == "CANCELED"
        assert time.monotonic() - began < bound, task
    assert "60" not in [words[-1] for words in command_lines() if words[0] == "sleep"]
    (after,) = await run(function(name, work.add, 1, 1))
    assert after.return_value == 2


def command_lines() -> list[list[str]]:
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", process, "cmdline").read_text().split("\0")[:-1]
        except OSError:
            continue
        found.append(words or [""])
    return found


@BOTH
def test_cancel_stops_what_runs(dragon: Runtime, name: str) -> None:
    dragon.call(_cancel_running, name)


async def _cancel_queued(name: str) -> None:
    busy = await start(*(function(name, work.spin, 5.0) for _ in range(2)))
    queued = [function(name, work.add, 1, 1) for _ in range(30)]
    await session().submit_tasks(queued)
    assert all(await asyncio.gather(*map(session().cancel, queued)))
    assert {task.state for task in queued} == {"CANCELED"}
    assert {task.state for task in busy} == {"RUNNING"}  # nobody waited for these
    await session().wait_tasks(busy, timeout=30)
    assert not await session().cancel(busy[0])


@BOTH
def test_cancel_of_queued_and_finished(dragon: Runtime, name: str) -> None:
    dragon.call(_cancel_queued, name)


async def _timeouts(name: str) -> None:
    tasks = await run(
        function(name, work.spin, 30.0, timeout=0.5),
        program(name, "sleep", "30", timeout=0.5),
        program(name, "sleep", "30", **options(timeout=0.5)),
    )
    for task in tasks:
        assert isinstance(task.exception, TaskTimeoutError), task


@BOTH
def test_time_limits(dragon: Runtime, name: str) -> None:
    dragon.call(_timeouts, name)


async def _close_while_running(folder: str) -> list[str]:
    global _session
    kept = session()
    await open_session(folder)
    tasks = [
        task
        for name in ("one", "two")
        for task in (
            program(name, "/bin/sh", "-c", "sleep 61 & wait"),
            function(name, stubborn, 60.0),
            *(function(name, work.add, i, 1) for i in range(50)),
        )
    ]
    await session().submit_tasks(tasks)
    while sum(task.state == "RUNNING" for task in tasks) < 4:
        await asyncio.sleep(0.05)
    took = await close_session()
    _session = kept
    assert took < 25, took
    assert "61" not in [words[-1] for words in command_lines()]
    assert "FAILED" not in {task.state for task in tasks}
    assert all(task.done() for task in tasks)
    return [task.state for task in tasks if task.function not in (work.add,)]


def test_close_stops_what_runs(dragon: Runtime, folder: str) -> None:
    assert dragon.call(_close_while_running, folder) == ["CANCELED"] * 4
