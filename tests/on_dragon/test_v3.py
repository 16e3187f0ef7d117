"""The V3 backend on one node, inside Dragon: every kind of task, and where Batch itself hangs."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody import ComputeTask, Session
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
from rhapsody.backends import DragonExecutionBackendV3

from . import work
from .runtime import Runtime


@pytest.fixture(scope="module")
def dragon(runtime: Runtime) -> Iterator[Runtime]:
    runtime.call(work.open_session)
    yield runtime
    runtime.call(work.close_session)


def options(**given: Any) -> dict[str, Any]:
    return {"task_backend_specific_kwargs": given}


# ---------------------------------------------------------------------- while nothing is done


def _our_cpu() -> float:
    """CPU seconds so far of the agent, of our threads in the driver, and of its event loop."""
    agents = work.backend()._agents
    assert agents is not None
    (agent,) = [info.pid for info in agents.info.values()]
    ours = [t.native_id for t in threading.enumerate() if t.name.startswith(("dragon-", "Main"))]
    tasks = [Path("/proc/self/task", str(thread)) for thread in ours]
    tasks += Path("/proc", str(agent), "task").iterdir()
    # Nanoseconds on a CPU; user and system time in `stat` are of whole ticks.
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def _idle(seconds: float) -> float:
    before = _our_cpu()
    await asyncio.sleep(seconds)
    return (_our_cpu() - before) / seconds


def test_an_idle_backend_uses_next_to_no_cpu(dragon: Runtime) -> None:
    assert dragon.call(_idle, 5.0) < 0.02  # of a core; 0.005 on two cores that others used too


# ---------------------------------------------------------------------- functions


async def _functions() -> None:
    one, two, three = await work.run(
        ComputeTask(function=work.add, args=(1, 2)),
        ComputeTask(function=work.later, args=("then",)),
        ComputeTask(function=lambda **named: named, kwargs={"a": 1}),
    )
    assert (one.return_value, two.return_value, three.return_value) == (3, "then", {"a": 1})
    assert {task.state for task in (one, two, three)} == {"DONE"}
    child = ComputeTask(function=work.add, args=(one, 10))
    await work.run(child)
    assert child.return_value == 13


def test_functions(dragon: Runtime) -> None:
    dragon.call(_functions)


async def _many() -> int:
    tasks = await work.run(*(ComputeTask(function=work.add, args=(i, 1)) for i in range(300)))
    assert [task.return_value for task in tasks] == list(range(1, 301))
    return work.backend().dropped_events


def test_more_functions_than_batch_takes_at_once(dragon: Runtime) -> None:
    assert dragon.call(_many) == 0


async def _errors() -> None:
    tasks = await work.run(
        ComputeTask(function=work.raise_odd),
        ComputeTask(function=work.unpicklable),
        ComputeTask(function=sys.exit, args=(4,)),
        ComputeTask(function=work.add, args=(sys._getframe(), 1)),
        ComputeTask(function=work.add, args=(1, 1)),
    )
    odd, result, left, argument, fine = tasks
    assert isinstance(odd.exception, work.Odd)
    assert odd.exception.code == 7
    assert "raise_odd" in str(odd.exception.__cause__)
    assert isinstance(result.exception, SerializationError)
    assert isinstance(left.exception, SystemExit)
    assert left.exception.code == 4
    assert isinstance(argument.exception, SerializationError)
    assert fine.return_value == 2


def test_errors_are_the_functions_own_and_poison_nothing(dragon: Runtime) -> None:
    dragon.call(_errors)


async def _large() -> int:
    (task,) = await work.run(ComputeTask(function=work.large, args=(40,)))
    return len(task.return_value)


def test_a_result_larger_than_a_message_may_be(dragon: Runtime) -> None:
    assert dragon.call(_large) == 40 << 20


async def _deaths() -> None:
    before = [ComputeTask(function=work.add, args=(i, 0)) for i in range(3)]
    deaths = [ComputeTask(function=work.die) for _ in range(2)]
    after = [ComputeTask(function=work.add, args=(i, 0)) for i in range(20)]
    await work.run(*before, *deaths, *after)
    for task in deaths:
        assert isinstance(task.exception, WorkerLostError), task
        assert task.exception.host == socket.gethostname()
        assert task.exception.transient
    assert {task.state for task in (*before, *after)} == {"DONE"}
    (task,) = await work.run(ComputeTask(function=work.add, args=(1, 1)))
    assert task.return_value == 2


def test_a_function_that_takes_its_worker_down_fails_alone(dragon: Runtime) -> None:
    dragon.call_within(100, _deaths)


async def _isolated() -> None:
    one, two, three = await work.run(
        ComputeTask(function=work.add, args=(1, 2), **options(isolated=True)),
        ComputeTask(function=work.die, **options(isolated=True)),
        ComputeTask(function=os._exit, args=(0,), **options(isolated=True)),
    )
    assert one.return_value == 3
    assert isinstance(two.exception, WorkerLostError)
    assert "exit codes of its ranks: [3]" in str(two.exception)
    assert isinstance(three.exception, WorkerLostError)
    assert "ended before its function did, with exit code 0" in str(three.exception)


def test_an_isolated_function_has_a_process_of_its_own(dragon: Runtime) -> None:
    dragon.call(_isolated)


async def _large_call() -> None:
    task = ComputeTask(
        function=len, args=(bytes(20 << 20),), resources=Resources(ranks=2), **options(pmi=None)
    )
    await work.run(task)
    assert task.return_value == [20 << 20] * 2, task.exception
    assert not [n for n in os.listdir(work.backend().work_dir) if n.endswith(".call")]


def test_arguments_of_a_job_larger_than_dragon_takes(dragon: Runtime) -> None:
    dragon.call(_large_call)


async def _ddict() -> dict[str, int]:
    ddict = await work.backend().create_ddict(1, 1, 64 << 20)

    def put(shared: Any, key: str) -> None:
        shared[key] = len(key)

    tasks = await work.run(*(ComputeTask(function=put, args=(ddict, k)) for k in ("a", "bb")))
    assert {task.state for task in tasks} == {"DONE"}, [task.exception for task in tasks]
    return {key: ddict[key] for key in ddict.keys()}  # noqa: SIM118 - it is no dict


def test_functions_share_a_ddict(dragon: Runtime) -> None:
    assert dragon.call(_ddict) == {"a": 1, "bb": 2}


# ---------------------------------------------------------------------- executables


async def _programs(folder: str) -> None:
    echo, fails, missing, shell, reads = await work.run(
        ComputeTask(executable="/bin/pwd", **options(cwd=folder)),
        ComputeTask(executable="/bin/sh", arguments=["-c", "echo no >&2; exit 5"]),
        ComputeTask(executable="not-there"),
        ComputeTask(executable="echo $A", **options(shell=True, env={"A": "set"})),
        ComputeTask(executable="cat", **options(stdin="read")),
    )
    assert echo.stdout == folder + "\n"
    assert isinstance(fails.exception, TaskExecutionError)
    assert (fails.exit_code, fails.exception.stderr) == (5, "no\n")
    assert missing.exit_code == 127
    assert shell.stdout == "set\n"
    assert reads.stdout == "read"


def test_executables(dragon: Runtime, tmp_path: Path) -> None:
    dragon.call(_programs, str(tmp_path))


async def _templates(folder: str) -> None:
    one, two, three = await work.run(
        ComputeTask(
            executable="/bin/sh",
            arguments=["-c", "cat; pwd; echo $A"],  # cat: nothing is there to be read
            **options(process_template={"cwd": folder, "env": {"A": "set"}}),
        ),
        ComputeTask(
            executable="/bin/sh",
            arguments=["-c", "echo one; echo two >&2; exit $A"],
            **options(
                process_templates=[(1, {"env": {"A": "0"}}), (2, {"env": {"A": "4"}})], pmi=None
            ),
        ),
        ComputeTask(function=work.host, resources=Resources(ranks=3), **options(pmi=None)),
    )
    assert one.stdout == f"{folder}\nset\n"
    assert isinstance(two.exception, TaskExecutionError)
    assert sorted(two.exception.exit_codes or ()) == [0, 4, 4]
    assert two.stdout == "one\n" * 3
    assert two.stderr == "two\n" * 3
    assert three.return_value == [socket.gethostname()] * 3


def test_templates_and_ranks(dragon: Runtime, tmp_path: Path) -> None:
    dragon.call(_templates, str(tmp_path))


async def _much(lines: int) -> None:
    command = f"i=0; while [ $i -lt {lines} ]; do echo $i of $A; i=$((i+1)); done"
    templates = [(1, {"env": {"A": str(rank)}}) for rank in range(3)]
    (task,) = await work.run(
        ComputeTask(
            executable="/bin/sh",
            arguments=["-c", command],
            capture_stdio=True,
            **options(process_templates=templates, pmi=None),
        )
    )
    assert task.stdout is not None
    with open(task.stdout) as file:
        ranks = [line.rpartition(" ")[2] for line in file.read().splitlines()]
    assert ranks == ["0"] * lines + ["1"] * lines + ["2"] * lines


def test_lines_of_ranks_are_in_rank_order(dragon: Runtime) -> None:
    dragon.call(_much, 2000)


# ---------------------------------------------------------------------- refusals

REFUSED = [
    (options(process_template={"target": 1}), TaskValidationError, "target of a process template"),
    (options(process_template={"cwdd": 1}), TaskValidationError, "accepted: cwd, env"),
    (options(process_templates=[(0, {})]), TaskValidationError, r"a list of \(number of ranks"),
    (options(process_templates=[]), TaskValidationError, "is empty"),
    (options(pmi="slurm"), TaskValidationError, "'cray', 'pmix' or None"),
    (options(isolated="yes"), TaskValidationError, "True or False"),
    (options(gpu=1), TaskValidationError, "does not know 'gpu'"),
    ({"resources": Resources(ranks=99), **options(pmi=None)}, ResourceError, "room for 4 on 1"),
    ({"resources": Resources(gpus_per_rank=1)}, ResourceError, "room for 0"),
    ({"resources": Resources(ranks=2)}, ResourceError, "libpmix.so"),
]


async def _refused(fields: dict[str, Any]) -> None:
    fine = ComputeTask(executable="true")
    bad = ComputeTask(executable="true", **fields)
    try:
        await work.session().submit_tasks([bad, fine])
    finally:
        await work.session().wait_tasks([fine], timeout=30)
        assert fine.state == "DONE"


@pytest.mark.parametrize(("fields", "error", "words"), REFUSED)
def test_what_batch_would_hang_on_is_refused(
    dragon: Runtime, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        dragon.call(_refused, fields)


async def _bad_places() -> None:
    from dragon.infrastructure.policy import Policy

    policy = Policy(placement=Policy.Placement.HOST_NAME, host_name="nowhere")
    with pytest.raises(ResourceError, match="'nowhere', and this runtime has 1 node"):
        await _refused(options(process_template={"policy": policy}))
    with pytest.raises(ResourceError, match="no executable 'not-there'"):
        task = ComputeTask(executable="not-there", **options(process_template={}))
        await work.session().submit_tasks([task])


def test_unknown_hosts_and_executables_are_refused(dragon: Runtime) -> None:
    dragon.call(_bad_places)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_workers": 4}, "use batch_kwargs={'workers_per_node': n}"),
        ({"disable_batch_submission": True}, "is no more"),
        ({"num_nods": 4}, "accepted: name, num_nodes"),
        ({"num_nodes": 0}, "at least 1"),
        ({"batch_kwargs": 5}, "must be a dict"),
    ],
)
def test_constructor_refuses(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        DragonExecutionBackendV3(**settings)


# ---------------------------------------------------------------------- cancel and time limits


async def _cancel_running() -> None:
    for fields in (
        {"function": work.spin, "args": (30.0,)},
        {"executable": "sleep", "arguments": ["30"]},
        {"executable": "/bin/sleep", "arguments": ["30"], **options(process_template={})},
        {"function": work.spin, "args": (30.0,), **options(isolated=True)},
    ):
        task = await work.start(ComputeTask(**fields))
        assert await work.session().cancel(task), fields
        assert task.state == "CANCELED"
    (after,) = await work.run(ComputeTask(function=work.add, args=(1, 1)))
    assert after.return_value == 2


def test_cancel_stops_what_runs(dragon: Runtime) -> None:
    dragon.call(_cancel_running)


async def _cancel_blind() -> None:
    task = await work.start(ComputeTask(function=work.blind, args=(8.0,)))
    assert not await work.session().cancel(task)
    await work.session().wait_tasks([task], timeout=30)
    assert task.state in ("CANCELED", "DONE")


def test_what_cannot_be_stopped_is_not_called_canceled(dragon: Runtime) -> None:
    dragon.call(_cancel_blind)


async def _cancel_queued() -> None:
    workers = next(iter(work.backend().topology().values()))["workers"]
    busy = [ComputeTask(function=work.spin, args=(4.0,)) for _ in range(workers)]
    for task in busy:
        await work.start(task)
    queued = ComputeTask(function=work.add, args=(1, 1))
    await work.session().submit_tasks([queued])
    assert await work.session().cancel(queued)
    assert queued.state == "CANCELED"
    assert all(task.state == "RUNNING" for task in busy)  # nobody waited for these
    await work.session().wait_tasks(busy, timeout=30)
    assert not await work.session().cancel(busy[0])


def test_cancel_of_queued_and_finished(dragon: Runtime) -> None:
    dragon.call(_cancel_queued)


async def _timeouts() -> None:
    slow, job, own = await work.run(
        ComputeTask(function=work.spin, args=(30.0,), timeout=0.5),
        ComputeTask(
            executable="/bin/sleep", arguments=["30"], timeout=0.5, **options(process_template={})
        ),
        ComputeTask(executable="sleep", arguments=["30"], **options(timeout=0.5)),
    )
    for task in (slow, job, own):
        assert isinstance(task.exception, TaskTimeoutError), task


def test_time_limits(dragon: Runtime) -> None:
    dragon.call(_timeouts)


async def _fence() -> None:
    task = ComputeTask(function=work.spin, args=(1.0,))
    await work.session().submit_tasks([task])
    await work.backend().fence()
    assert task.state == "DONE"
    ((_, node),) = work.backend().topology().items()
    assert node["workers"] >= 1


def test_fence_and_topology(dragon: Runtime) -> None:
    dragon.call(_fence)


async def _two_backends() -> None:
    other = DragonExecutionBackendV3("other")
    work.session().add_backend(other)
    first = ComputeTask(function=work.add, args=(1, 1))
    second = ComputeTask(function=work.add, args=(first, 1), backend="other")
    await work.run(first, second)
    assert (second.return_value, second.backend) == (3, "other")
    await other.shutdown()


def test_two_backends_on_one_runtime(dragon: Runtime) -> None:
    dragon.call(_two_backends)


async def _close_while_running() -> list[str]:
    await work.close_session()
    await work.open_session()
    tasks = [
        ComputeTask(function=work.spin, args=(60.0,)),
        ComputeTask(executable="sleep", arguments=["60"]),
        ComputeTask(function=work.blind, args=(60.0,)),
    ]
    await work.session().submit_tasks(tasks)
    while tasks[0].state != "RUNNING":
        await asyncio.sleep(0.05)
    took = await work.close_session()
    assert took < 25
    await work.open_session()
    return [task.state for task in tasks]


def test_close_stops_what_runs(dragon: Runtime) -> None:
    assert dragon.call_within(100, _close_while_running) == ["CANCELED"] * 3


async def _closed_while_it_renews() -> None:
    before = set(threading.enumerate())
    backend = DragonExecutionBackendV3(name="second")
    async with Session(backends=[backend]) as session:
        task = ComputeTask(function=work.die)
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        assert backend._changes
    assert not [t for t in threading.enumerate() if not (t.daemon or t in before)]


def test_close_ends_a_batch_that_is_being_made(dragon: Runtime) -> None:
    """A thread of Dragon's would keep the program from ending."""
    dragon.call(_closed_while_it_renews)


async def _given_up_while_it_opens() -> None:
    before = set(threading.enumerate())
    backend = DragonExecutionBackendV3(name="third")

    async def start() -> None:
        await backend

    starting = asyncio.create_task(start())
    while not backend._last_executor:
        await asyncio.sleep(0.02)
    assert backend._starting is not None
    backend._starting.cancel()  # as the end of asyncio.run does with all that is left
    await asyncio.wait([starting])
    assert starting.cancelled()
    new = [t for t in threading.enumerate() if t not in before]
    assert any(thread.name == "dragon-open" for thread in new)
    while any(t.name == "dragon-open" or not t.daemon for t in new):
        await asyncio.sleep(0.05)
        new = [t for t in threading.enumerate() if t not in before]


def test_a_batch_that_comes_too_late_is_ended(dragon: Runtime) -> None:
    """As after a Ctrl-C while the backend starts."""
    dragon.call(_given_up_while_it_opens)
