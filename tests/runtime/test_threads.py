"""Functions on threads: what can be stopped there, and what cannot."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from functions import noop
from rhapsody.api import ComputeTask, ResourceError, Resources, Session, TaskTimeoutError
from rhapsody.backends import ConcurrentExecutionBackend

PATIENCE = 30.0


async def happened(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE)


def raise_it(error: BaseException) -> None:
    raise error


class Gate:
    """A call that says when it has begun, and goes on when it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        self.calls = 0

    def __call__(self, value: Any = None) -> Any:
        self.calls += 1
        self.begun.set()
        assert self.go.wait(PATIENCE)
        return value


async def test_functions_run_on_threads_of_this_process() -> None:
    async def later(x: int) -> tuple[int, int]:
        await asyncio.sleep(0)
        return threading.get_ident(), x

    def now(x: int) -> tuple[int, int]:
        return threading.get_ident(), x

    async with Session([await ConcurrentExecutionBackend()]) as session:
        tasks = [ComputeTask(function=f, args=(n,)) for f in (now, later) for n in range(100)]
        tasks.append(ComputeTask(function=lambda: (threading.get_ident(), os.getpid())))
        await session.submit_tasks(tasks)
        await asyncio.gather(*tasks)
    assert [task.return_value[1] for task in tasks] == [*range(100), *range(100), os.getpid()]
    assert threading.get_ident() not in {task.return_value[0] for task in tasks}


async def test_as_many_run_at_once_as_the_executor_has_threads() -> None:
    """Each of them goes on only when all the others have begun."""
    with ThreadPoolExecutor(7) as executor:
        barrier = threading.Barrier(7)
        async with Session([await ConcurrentExecutionBackend(executor)]) as session:
            tasks = [ComputeTask(function=barrier.wait, args=(PATIENCE,)) for _ in range(14)]
            await session.submit_tasks(tasks)
            await asyncio.gather(*tasks)
    assert sorted(task.return_value for task in tasks) == sorted([*range(7)] * 2)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("plain"),
        SystemExit(3),
        KeyboardInterrupt("now"),
        StopIteration(5),
        GeneratorExit(),
        asyncio.CancelledError("not ours"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_a_function_raises_ends_it_only(error: BaseException) -> None:
    with ThreadPoolExecutor(1) as executor:
        async with Session([await ConcurrentExecutionBackend(executor)]) as session:
            tasks = [
                ComputeTask(function=noop),
                ComputeTask(function=raise_it, args=(error,)),
                ComputeTask(function=noop),
            ]
            await session.submit_tasks(tasks)
            await session.wait_tasks(tasks, timeout=PATIENCE)
    assert [task.state for task in tasks] == ["DONE", "FAILED", "DONE"]
    assert tasks[1].exception is error


async def test_a_generator_is_a_result_like_any_other() -> None:
    def numbers(count: int) -> Iterator[int]:
        yield from range(count)

    async with Session([await ConcurrentExecutionBackend()]) as session:
        (found,) = await session.map(numbers, [3])
    assert list(found) == [0, 1, 2]


async def test_the_traceback_begins_at_the_function() -> None:
    async with Session([await ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=raise_it, args=(ValueError("here"),))
        await session.submit_tasks([task])
        await session.wait_tasks([task])
    assert task.exception is not None
    assert task.exception.__traceback__ is not None
    assert task.exception.__traceback__.tb_frame.f_code.co_name == "raise_it"


# ---------------------------------------------------------------------- cancel and timeout


async def test_an_async_function_is_canceled_and_cleans_up() -> None:
    begun, cleaned = threading.Event(), threading.Event()

    async def wait() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    async with Session([await ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=wait)
        await session.submit_tasks([task])
        await happened(begun)
        assert await session.cancel(task)
        assert cleaned.is_set()
    assert task.state == "CANCELED"


async def test_an_async_function_that_will_not_be_canceled_is_not_said_to_be() -> None:
    begun = threading.Event()

    async def refuse() -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return "to the end"

    async with Session([await ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=refuse)
        await session.submit_tasks([task])
        await happened(begun)
        assert not await session.cancel(task)
        await task
    assert (task.state, task.return_value) == ("DONE", "to the end")


async def test_a_function_that_runs_cannot_be_canceled_and_goes_on_to_its_end() -> None:
    gate = Gate()
    async with Session([await ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=gate, args=(5,))
        await session.submit_tasks([task])
        await happened(gate.begun)
        assert not await session.cancel(task)
        assert task.state == "RUNNING"
        gate.go.set()
        await task
    assert (task.state, task.return_value) == ("DONE", 5)


async def test_a_timeout_says_that_the_function_still_runs_and_its_end_is_dropped() -> None:
    gate = Gate()
    with ThreadPoolExecutor(1) as executor:
        backend = await ConcurrentExecutionBackend(executor)
        async with Session([backend]) as session:
            task = ComputeTask(function=gate, args=(5,), timeout=0.1)
            await session.submit_tasks([task])
            with pytest.raises(TaskTimeoutError) as caught:
                await task
            dropped = backend.dropped_events
            behind = ComputeTask(function=noop)  # on the same thread
            await session.submit_tasks([behind])
            assert gate.begun.is_set()
            gate.go.set()
            await behind
    assert not caught.value.stopped
    assert (task.state, task.exception) == ("FAILED", caught.value)
    assert task.return_value is None
    assert backend.dropped_events == dropped + 1


async def test_a_timeout_stops_an_async_function() -> None:
    cleaned = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    async with Session([await ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=wait, timeout=0.1)
        await session.submit_tasks([task])
        with pytest.raises(TaskTimeoutError) as caught:
            await task
        assert cleaned.is_set()
    assert caught.value.stopped


async def test_calls_that_wait_are_canceled_and_never_run() -> None:
    gate = Gate()
    ran: list[int] = []
    with ThreadPoolExecutor(1) as executor:
        async with Session([await ConcurrentExecutionBackend(executor)]) as session:
            first = ComputeTask(function=gate)
            waiting = [ComputeTask(function=ran.append, args=(n,)) for n in range(20)]
            await session.submit_tasks([first, *waiting])
            await happened(gate.begun)
            assert all(await asyncio.gather(*map(session.cancel, waiting[::2])))
            gate.go.set()
            await session.wait_tasks([first, *waiting], timeout=PATIENCE)
    assert [task.state for task in waiting] == ["CANCELED", "DONE"] * 10
    assert ran == list(range(1, 20, 2))


async def test_close_cancels_what_waits_and_does_not_wait_for_what_cannot_be_stopped() -> None:
    gate, begun = Gate(), threading.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(2) as executor:
        session = Session([await ConcurrentExecutionBackend(executor)])
        tasks = [ComputeTask(function=f) for f in (gate, wait, noop)]
        await session.submit_tasks(tasks)
        await happened(gate.begun)
        await happened(begun)
        await asyncio.wait_for(session.close(), PATIENCE)
        assert all(task.done() for task in tasks)
        assert [task.state for task in tasks] == ["FAILED", "CANCELED", "CANCELED"]
        assert "could not stop it" in str(tasks[0].exception)
        gate.go.set()


# ---------------------------------------------------------------------- the user's executor


async def test_the_users_executor_is_open_afterwards() -> None:
    with ThreadPoolExecutor(2) as executor:
        for _ in range(2):
            async with Session([await ConcurrentExecutionBackend(executor)]) as session:
                task = ComputeTask(function=noop)
                await session.submit_tasks([task])
                await task
        assert executor.submit(int, "7").result(PATIENCE) == 7


async def test_the_users_own_jobs_are_not_put_behind_all_of_our_queue() -> None:
    """Ours never ends before theirs has run: each of our calls queues the next."""
    theirs = threading.Event()

    with ThreadPoolExecutor(1) as executor:
        async with Session([await ConcurrentExecutionBackend(executor)]) as session:
            loop = asyncio.get_running_loop()
            ran = 0
            tasks = [ComputeTask(function=noop)]

            def ours() -> None:
                nonlocal ran
                ran += 1
                if not theirs.is_set():
                    asyncio.run_coroutine_threadsafe(more(), loop).result(PATIENCE)

            async def more() -> None:
                tasks.append(ComputeTask(function=ours))
                await session.submit_tasks(tasks[-1:])

            tasks += [ComputeTask(function=ours) for _ in range(100)]
            await session.submit_tasks(tasks)
            executor.submit(theirs.set)
            await happened(theirs)
            await session.wait_tasks(tasks, timeout=PATIENCE)
            counts = session.get_statistics()["counts"]
    assert counts == {"DONE": ran + 1}


# ---------------------------------------------------------------------- resources


async def test_a_function_is_pinned_to_its_cores_and_its_thread_is_free_afterwards() -> None:
    cores = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as executor:
        async with Session([await ConcurrentExecutionBackend(executor)]) as session:
            pinned = ComputeTask(function=os.sched_getaffinity, args=(0,), resources=Resources())
            free = ComputeTask(function=os.sched_getaffinity, args=(0,))
            for task in (pinned, free):
                await session.submit_tasks([task])
                await task
    assert len(pinned.return_value) == 1
    assert pinned.return_value <= cores
    assert free.return_value == cores
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (Resources(ranks=2), "runs a function as one rank"),
        (Resources(gpus_per_rank=1), "GPUs, env and cwd belong to a process"),
        (Resources(env={"A": "b"}), "GPUs, env and cwd belong to a process"),
        (Resources(cwd="/tmp"), "GPUs, env and cwd belong to a process"),
        (Resources(memory_per_rank="1000TiB"), "bytes of memory, and this machine grants"),
        (Resources(cores_per_rank=10_000), "asks for 10000 cores"),
    ],
)
async def test_what_a_function_cannot_have_is_refused(
    need: Resources, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    async with Session([await ConcurrentExecutionBackend()]) as session:
        bad, good = ComputeTask(function=noop, resources=need), ComputeTask(function=noop)
        with pytest.raises(ResourceError, match=words):
            await session.submit_tasks([bad, good])
        await good
    assert good.state == "DONE"


# ---------------------------------------------------------------------- nothing is left


def test_no_thread_and_no_descriptor_is_left() -> None:
    async def use() -> None:
        async with Session([await ConcurrentExecutionBackend()]) as session:
            tasks: list[Any] = [ComputeTask(function=noop) for _ in range(50)]
            tasks.append(ComputeTask(executable="true"))
            await session.submit_tasks(tasks)
            await asyncio.gather(*tasks)

    asyncio.run(use())
    before = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    asyncio.run(use())
    for thread in set(threading.enumerate()) - before[0]:
        thread.join(PATIENCE)  # those of the executor are told to end, and not waited for
    assert (set(threading.enumerate()), len(os.listdir("/proc/self/fd"))) == before
