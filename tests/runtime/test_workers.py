"""Functions in processes: whatever happens to a worker, its neighbours and the next call go on."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fifos import Fifo, report, wait_for_release
from functions import die, double, double_later
from pools import CONTEXTS, process_pool
from processes import gone
from rhapsody.api import (
    BackendError,
    ComputeTask,
    ResourceError,
    Resources,
    SerializationError,
    Session,
    TaskTimeoutError,
    WorkerLostError,
)

# ---------------------------------------------------------------------- what is called


def busy(line: str) -> None:
    """Say which process it is, and run until a signal ends it."""
    report(line, os.getpid())
    while True:
        signal.pause()


def busy_with_child(line: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    apart = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    report(line, os.getpid(), child.pid, apart.pid)
    child.wait()


def held(line: str, go: str) -> int:
    report(line, os.getpid())
    wait_for_release(go)
    return os.getpid()


def segfault() -> None:
    faulthandler.disable()  # no dump in the test report
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


def close_all() -> None:
    os.closerange(3, 1000)


def states(tasks: list[ComputeTask]) -> list[str]:
    return [task.state for task in tasks]


# ---------------------------------------------------------------------- calls


@pytest.mark.parametrize("context", CONTEXTS)
async def test_functions_run_in_processes(context: str) -> None:
    base = 5
    async with Session([await process_pool(2, context)]) as session:
        tasks = [ComputeTask(function=double, args=(n,)) for n in range(200)]
        tasks += [ComputeTask(function=double_later, kwargs={"x": n}) for n in range(200)]
        local = ComputeTask(function=lambda x: x + base, args=(1,))
        at = ComputeTask(function=os.getpid)
        await session.submit_tasks([*tasks, local, at])
        await asyncio.gather(*tasks, local, at)
    assert [task.return_value for task in tasks] == [2 * n for n in range(200)] * 2
    assert local.return_value == 6
    assert at.return_value != os.getpid()


def hang_up() -> tuple[int, str]:
    """SIGHUP to ourselves; returns our pid, and what a child does about one."""
    os.kill(os.getpid(), signal.SIGHUP)
    script = "import signal; print(signal.getsignal(signal.SIGHUP).name)"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return os.getpid(), child.stdout.decode().strip()


@pytest.mark.parametrize("context", CONTEXTS)
async def test_a_worker_outlives_a_hangup_and_its_children_do_not(context: str) -> None:
    """The kernel sends one when the driver dies, and the worker has its children to end yet."""
    async with Session([await process_pool(1, context)]) as session:
        first = ComputeTask(function=hang_up)
        then = ComputeTask(function=os.getpid)
        await session.submit_tasks([first])
        await first
        await session.submit_tasks([then])
        await then
    assert first.return_value == (then.return_value, "SIG_DFL")


@pytest.mark.parametrize("context", CONTEXTS)
async def test_a_hundred_megabytes_each_way(context: str) -> None:
    data = bytes(range(250)) * 400_000
    async with Session([await process_pool(1, context)]) as session:
        task = ComputeTask(function=lambda data: data[::-1], args=(data,))
        await session.submit_tasks([task])
        await task
    assert len(data) == 100_000_000
    assert task.return_value == data[::-1]


async def test_calls_that_wait_for_each_other_are_not_put_behind_one_another(
    roster: Fifo, go: Fifo
) -> None:
    """Long ones after very many short ones, which came in large bundles."""

    def first() -> str:
        wait_for_release(go.path)
        return "first"

    def second() -> str:
        os.write(os.open(go.path, os.O_WRONLY), b".")
        return "second"

    async with Session([await process_pool(2)]) as session:
        await session.wait_tasks(await _submit(session, [(double, (n,)) for n in range(3000)]))
        shorts: list[Any] = [(double, (n,)) for n in range(40)]
        mixed = await _submit(session, [(first, ()), *shorts, (second, ())])
        await asyncio.wait_for(asyncio.gather(*mixed), 30)
    assert (mixed[0].return_value, mixed[-1].return_value) == ("first", "second")


async def _submit(session: Session, calls: list[tuple[Callable[..., Any], Any]]) -> list[Any]:
    tasks = [ComputeTask(function=function, args=args) for function, args in calls]
    await session.submit_tasks(tasks)
    return tasks


# ---------------------------------------------------------------------- lost workers


@pytest.mark.parametrize("context", CONTEXTS)
async def test_a_worker_killed_while_busy_fails_its_task_only(
    context: str, roster: Fifo, go: Fifo, tmp_path: Path
) -> None:
    async with Session([await process_pool(2, context)]) as session:
        victim, neighbour = await _submit(
            session, [(busy, (roster.path,)), (held, (roster.path, go.path))]
        )
        pids = {int(await roster.line()), int(await roster.line())}
        queued = await _submit(session, [(double, (n,)) for n in range(20)])
        # Which of both is busy's is known by who goes on when it is let go.
        go.release()
        await neighbour
        (pid,) = pids - {neighbour.return_value}
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=r"that ran task .*killed by SIGKILL") as caught:
            await victim
        await asyncio.gather(*queued)
        again = await _submit(session, [(held, (roster.path, go.path))] * 2)
        new = {int(await roster.line()), int(await roster.line())}
        go.release(2)
        await asyncio.gather(*again)
    assert caught.value.transient
    assert caught.value.host
    assert caught.value.backend == "concurrent"
    assert victim.uid in str(caught.value)
    assert pid not in new
    assert len(new) == 2


@pytest.mark.parametrize(
    ("death", "words"),
    [
        (die, "killed by SIGKILL"),
        (segfault, "killed by SIGSEGV"),
        (leave, "exit code 3"),
        (close_all, "killed by SIGKILL"),
    ],
)
async def test_a_function_that_ends_its_worker_fails_alone(
    death: Callable[[], None], words: str
) -> None:
    async with Session([await process_pool(2)]) as session:
        await asyncio.gather(*await _submit(session, [(double, (n,)) for n in range(500)]))
        calls: list[Any] = [(double, (n,)) for n in range(60)]
        calls[20:20] = calls[40:40] = [(death, ())]
        tasks = await _submit(session, calls)
        await session.wait_tasks(tasks, timeout=60)
        after = await _submit(session, [(double, (n,)) for n in range(20)])
        await asyncio.gather(*after)
    dead = [task for task in tasks if task.function is death]
    assert len(dead) == 2
    for task in dead:
        assert isinstance(task.exception, WorkerLostError)
        assert words in str(task.exception)
    assert {task.state for task in tasks if task.function is double} == {"DONE"}
    assert all(task.return_value == 2 * task.args[0] for task in tasks if task not in dead)


async def test_a_lost_task_is_run_again_where_it_may_be(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def once() -> str:
        if not mark.exists():
            mark.touch()
            die()
        return "second time"

    async with Session([await process_pool(1)]) as session:
        task = ComputeTask(function=once, retries=1)
        await session.submit_tasks([task])
        await task
    assert task.return_value == "second time"


@pytest.mark.parametrize("context", CONTEXTS)
async def test_a_worker_killed_while_idle_costs_no_task(
    context: str, roster: Fifo, go: Fifo
) -> None:
    async with Session([await process_pool(2, context)]) as session:
        first = await _submit(session, [(held, (roster.path, go.path))] * 2)
        go.release(2)
        await asyncio.gather(*first)
        pids = {task.return_value for task in first}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            await gone(pid)
        tasks = await _submit(session, [(os.getpid, ())] * 50)
        await session.wait_tasks(tasks, timeout=60)
    assert set(states(tasks)) == {"DONE"}
    assert not pids & {task.return_value for task in tasks}


async def test_the_death_of_a_worker_is_seen_though_its_child_lives_on(roster: Fifo) -> None:
    """A forked child has a copy of every descriptor, that of the worker's connection too."""

    def fork_and_wait() -> None:
        if os.fork() == 0:
            os.setsid()  # first: what is in the worker's group is killed with it
            report(roster.path, os.getppid(), os.getpid())
            while True:
                signal.pause()
        signal.pause()

    async with Session([await process_pool(1)]) as session:
        (task,) = await _submit(session, [(fork_and_wait, ())])
        worker, child = await roster.pids()
        os.kill(worker, signal.SIGKILL)
        await session.wait_tasks([task], timeout=30)
        assert isinstance(task.exception, WorkerLostError)
        os.kill(child, signal.SIGKILL)
        await gone(child)


async def test_a_forked_child_that_returns_does_not_answer_for_its_parent(roster: Fifo) -> None:
    def fork_and_return() -> str:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return "parent" if pid else "child"

    async with Session([await process_pool(1)]) as session:
        tasks = await _submit(session, [(fork_and_return, ())])
        await session.wait_tasks(tasks, timeout=30)
        after = await _submit(session, [(double, (n,)) for n in range(5)])
        await asyncio.gather(*after)
    assert tasks[0].return_value != "child"
    assert [task.return_value for task in after] == [0, 2, 4, 6, 8]


# ---------------------------------------------------------------------- what is raised


class Demanding(Exception):
    def __init__(self, host: str, *, port: int) -> None:
        super().__init__(f"{host}:{port}")
        self.host = host
        self.port = port
        self.lock = threading.Lock()


def demand() -> None:
    raise Demanding("node7", port=22)


def raise_it(error: BaseException) -> None:
    raise error


async def test_an_exception_comes_back_as_its_own() -> None:
    async with Session([await process_pool(1)]) as session:
        (task,) = await _submit(session, [(demand, ())])
        with pytest.raises(Demanding) as caught:
            await task
    assert (caught.value.host, caught.value.port) == ("node7", 22)
    assert not hasattr(caught.value, "lock")
    assert "in demand" in str(caught.value.__cause__)
    assert task.exception is caught.value


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt("now"),
        StopIteration(5),
        GeneratorExit(),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_ends_programs_ends_the_function_only(error: BaseException) -> None:
    async with Session([await process_pool(1)]) as session:
        before, raises, after = await _submit(
            session, [(os.getpid, ()), (raise_it, (error,)), (os.getpid, ())]
        )
        await session.wait_tasks([before, raises, after], timeout=30)
    assert states([before, raises, after]) == ["DONE", "FAILED", "DONE"]
    assert type(raises.exception) is type(error)
    assert raises.exception.args == error.args
    assert before.return_value == after.return_value


class Unpicklable:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self) -> None:
        return None


def give_lock() -> Any:
    return [threading.Lock()]


def raise_local() -> None:
    class Bound(Exception):
        lock = threading.Lock()

    raise Bound("the words")


class Trap:
    def __reduce__(self) -> Any:
        return spring, (os.getpid(),)


def spring(pid: int) -> None:
    if os.getpid() != pid:
        raise OSError("not in this process")


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "words"),
    [
        (Unpicklable(), (), {}, "cannot pickle the function of task 'bad'"),
        (max, (1, threading.Lock()), {}, "cannot pickle the argument 1 of task 'bad'"),
        (max, (1, 2), {"key": threading.Lock()}, "cannot pickle the argument key= of task 'bad'"),
        (give_lock, (), {}, "cannot pickle the result"),
        (Trap, (), {}, "cannot unpickle the result of task 'bad': OSError: not in this"),
        (max, (1, Trap()), {}, "cannot unpickle the calls: OSError: not in this"),
        (raise_local, (), {}, "raised an exception that cannot be pickled: Bound: the words"),
    ],
    ids=["function", "argument", "keyword", "result", "result-here", "argument-there", "exception"],
)
async def test_what_cannot_cross_fails_its_task_and_is_named(
    function: Any, args: Any, kwargs: Any, words: str
) -> None:
    async with Session([await process_pool(1)]) as session:
        bad = ComputeTask(function=function, args=args, kwargs=kwargs, uid="bad")
        good = [ComputeTask(function=double, args=(n,)) for n in range(10)]
        await session.submit_tasks([*good[:5], bad, *good[5:]])
        await session.wait_tasks([*good, bad], timeout=30)
    assert set(states(good)) == {"DONE"}
    assert isinstance(bad.exception, SerializationError)
    assert words in str(bad.exception)


# ---------------------------------------------------------------------- cancel and timeout


async def test_cancel_ends_the_function_with_its_children_and_nobody_else(roster: Fifo) -> None:
    async with Session([await process_pool(1)]) as session:
        await asyncio.gather(*await _submit(session, [(double, (n,)) for n in range(500)]))
        calls: list[Any] = [(double, (n,)) for n in range(20)]
        others = await _submit(session, [*calls, (busy_with_child, (roster.path,)), *calls])
        pids = await roster.pids()
        task = others.pop(20)
        assert await session.cancel(task)
        for pid in pids:
            await gone(pid)
        await session.wait_tasks(others, timeout=30)
        assert not await session.cancel(task)
    assert task.state == "CANCELED"
    assert set(states(others)) == {"DONE"}


async def test_a_timeout_ends_the_function_with_its_children_and_nobody_else(roster: Fifo) -> None:
    async with Session([await process_pool(1)]) as session:
        task = ComputeTask(function=busy_with_child, args=(roster.path,), timeout=1.0)
        others = [ComputeTask(function=double, args=(n,)) for n in range(20)]
        await session.submit_tasks([*others[:10], task, *others[10:]])
        pids = await roster.pids()
        with pytest.raises(TaskTimeoutError) as caught:
            await task
        for pid in pids:
            await gone(pid)
        await session.wait_tasks(others, timeout=30)
    assert caught.value.stopped
    assert caught.value.timeout == 1.0
    assert set(states(others)) == {"DONE"}


def stubborn(line: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    busy_with_child(line)


async def test_a_function_that_ignores_sigterm_is_killed_after_the_grace(roster: Fifo) -> None:
    async with Session([await process_pool(1, grace=0.2)]) as session:
        (task,) = await _submit(session, [(stubborn, (roster.path,))])
        pids = await roster.pids()
        assert await session.cancel(task)
        for pid in pids:
            await gone(pid)
    assert task.state == "CANCELED"


async def test_a_function_that_holds_the_gil_can_be_canceled_and_blocks_nobody(
    roster: Fifo,
) -> None:
    def hold() -> None:
        report(roster.path, os.getpid())
        ctypes.PyDLL(None).pause()  # does not let go of the GIL

    async with Session([await process_pool(2)]) as session:
        await asyncio.gather(*await _submit(session, [(double, (n,)) for n in range(500)]))
        holder, *others = await _submit(
            session, [(hold, ()), *((double, (n,)) for n in range(100))]
        )
        pid = int(await roster.line())
        assert await session.cancel(holder)
        await gone(pid)
        await session.wait_tasks(others, timeout=30)
    assert holder.state == "CANCELED"
    assert set(states(others)) == {"DONE"}


async def test_calls_that_wait_are_canceled_and_never_run(roster: Fifo, tmp_path: Path) -> None:
    def mark(n: int) -> None:
        (tmp_path / f"ran{n}").touch()

    async with Session([await process_pool(1)]) as session:
        first, *waiting = await _submit(
            session, [(busy, (roster.path,)), *((mark, (n,)) for n in range(20))]
        )
        await roster.line()
        assert all(await asyncio.gather(*map(session.cancel, waiting[::2])))
        assert await session.cancel(first)
        await session.wait_tasks(waiting, timeout=30)
    assert states(waiting) == ["CANCELED", "DONE"] * 10
    assert {int(path.name[3:]) for path in tmp_path.glob("ran*")} == set(range(1, 20, 2))


# ---------------------------------------------------------------------- how workers are made

_made: list[int] = []


def make(value: int) -> None:
    _made.append(value)


def made() -> list[int]:
    return _made


def refuse() -> None:
    raise LookupError("no licence left")


@pytest.mark.parametrize("context", CONTEXTS)
async def test_the_initializer_runs_once_in_each_worker(context: str) -> None:
    async with Session(
        [await process_pool(2, context, initializer=make, initargs=(7,))]
    ) as session:
        tasks = await _submit(session, [(made, ())] * 20)
        await asyncio.gather(*tasks)
    assert all(task.return_value == [7] for task in tasks)
    assert _made == []


@pytest.mark.parametrize("context", CONTEXTS)
async def test_an_initializer_that_raises_is_told_of_by_every_task(context: str) -> None:
    async with Session([await process_pool(2, context, initializer=refuse)]) as session:
        tasks = await _submit(session, [(double, (n,)) for n in range(6)])
        await session.wait_tasks(tasks, timeout=60)
    for task in tasks:
        assert isinstance(task.exception, BackendError)
        assert "initializer" in str(task.exception)
        assert isinstance(task.exception.__cause__, LookupError)


async def test_an_initializer_that_ends_its_worker_is_no_endless_loop() -> None:
    async with Session([await process_pool(2, initializer=leave)]) as session:
        tasks = await _submit(session, [(double, (n,)) for n in range(4)])
        await session.wait_tasks(tasks, timeout=60)
    assert all(isinstance(task.exception, WorkerLostError) for task in tasks)
    assert "exit code 3" in str(tasks[0].exception)


async def test_an_initializer_that_cannot_be_pickled_is_a_backend_error() -> None:
    async with Session([await process_pool(1, "spawn", initializer=lambda: None)]) as session:
        tasks = await _submit(session, [(double, (1,))])
        await session.wait_tasks(tasks, timeout=30)
    assert isinstance(tasks[0].exception, BackendError)
    assert "cannot start a worker process" in str(tasks[0].exception)


if sys.version_info >= (3, 11):

    async def test_a_worker_runs_no_more_calls_than_it_may() -> None:
        pool = await process_pool(1, "forkserver", max_tasks_per_child=3)
        async with Session([pool]) as session:
            tasks = await _submit(session, [(os.getpid, ())] * 10)
            await session.wait_tasks(tasks, timeout=60)
        pids = [task.return_value for task in tasks]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3, 1]


# ---------------------------------------------------------------------- resources


def seen() -> tuple[set[int], dict[str, str]]:
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "SAID")
    return os.sched_getaffinity(0), {n: os.environ[n] for n in names if n in os.environ}


async def test_a_function_has_its_cores_its_gpus_and_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    cores = os.sched_getaffinity(0)
    # A fork server's workers have the environment in which it was started, as Python has it.
    backend = await process_pool(1, "spawn")
    async with Session([backend]) as session:
        before = ComputeTask(function=seen)
        one = ComputeTask(function=seen, resources=Resources(gpus_per_rank=1, env={"SAID": "so"}))
        both = ComputeTask(function=seen, resources=Resources(gpus_per_rank=2))
        after = ComputeTask(function=seen)
        for task in (before, one, both, after):
            await session.submit_tasks([task])
            await task
    assert before.return_value == after.return_value == (cores, {"CUDA_VISIBLE_DEVICES": "3,5"})
    pinned, environ = one.return_value
    assert len(pinned) == 1
    assert pinned <= cores
    assert environ == {"CUDA_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "3", "SAID": "so"}
    assert both.return_value[1]["CUDA_VISIBLE_DEVICES"] == "3,5"


async def test_two_at_a_time_have_different_gpus(
    monkeypatch: pytest.MonkeyPatch, roster: Fifo, go: Fifo
) -> None:
    def gpu() -> str:
        report(roster.path, "here")
        wait_for_release(go.path)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    backend = await process_pool(2)
    if len(backend._cores) < 2:
        backend._slots = type(backend._slots)((0, 0), ("3", "5"))
    async with Session([backend]) as session:
        need = Resources(gpus_per_rank=1)
        tasks = [ComputeTask(function=gpu, resources=need) for _ in range(2)]
        await session.submit_tasks(tasks)
        await roster.line()
        await roster.line()
        go.release(2)
        await asyncio.gather(*tasks)
    assert sorted(task.return_value for task in tasks) == ["3", "5"]


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (Resources(ranks=2), "runs a function as one rank"),
        (Resources(memory_per_rank="1000TiB"), "bytes of memory, and this machine grants"),
        (Resources(cores_per_rank=10_000), "asks for 10000 cores"),
        (Resources(gpus_per_rank=1), "asks for 1 GPUs, and this machine grants 0"),
        (Resources(cwd="/tmp"), "cwd is for executables"),
    ],
)
async def test_what_a_function_cannot_have_is_refused(
    need: Resources, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    async with Session([await process_pool(1)]) as session:
        bad, good = ComputeTask(function=os.getpid, resources=need), ComputeTask(function=os.getpid)
        with pytest.raises(ResourceError, match=words):
            await session.submit_tasks([bad, good])
        await good
    assert good.state == "DONE"
