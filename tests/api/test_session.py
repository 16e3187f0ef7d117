"""The session: waiting, routing, statistics, retries, timeouts, cancel, and its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manual import ManualBackend
from rhapsody.api import (
    AITask,
    BackendError,
    ComputeTask,
    ResourceError,
    Resources,
    Session,
    SessionError,
    TaskExecutionError,
    TaskTimeoutError,
    TaskValidationError,
)
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend


def double(x: int) -> int:
    return 2 * x


def fail(message: str = "as it was told to") -> None:
    raise KeyError(message)


def noop() -> None:
    return None


class Functions(ManualBackend):
    kinds = frozenset({"function"})


class Executables(ManualBackend):
    kinds = frozenset({"executable"})


class Answers(ManualBackend):
    kinds = frozenset({"ai"})


class Broken(ManualBackend):
    """Cannot be started, as often as it is told."""

    def __init__(self, name: str = "broken", failures: int = 1_000_000) -> None:
        super().__init__(name)
        self.failures = failures

    async def _start(self) -> None:
        await super()._start()
        if self.starts <= self.failures:
            raise BackendError("no scheduler answers", backend=self.name, host="node1")


class SlowToStart(ManualBackend):
    def __init__(self, name: str = "slow") -> None:
        super().__init__(name)
        self.begun = asyncio.Event()
        self.may_start = asyncio.Event()

    async def _start(self) -> None:
        self.begun.set()
        await self.may_start.wait()


class Refusing(ManualBackend):
    """Its engine raises when it is given tasks."""

    def __init__(self, error: Exception) -> None:
        super().__init__("refusing")
        self.error = error

    async def _submit(self, tasks: list[Any]) -> None:
        await super()._submit(tasks)
        raise self.error


# ---------------------------------------------------------------------- waiting


async def test_the_three_ways_of_waiting_give_the_task_itself() -> None:
    tasks = [ComputeTask(function=double, args=(n,)) for n in range(6)]
    async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
        futures = await session.submit_tasks(tasks)
        assert all(isinstance(future, asyncio.Future) for future in futures)
        assert await asyncio.gather(*futures) == tasks
        assert await asyncio.gather(*tasks) == tasks
        assert await tasks[0] is tasks[0]
        assert await session.wait_tasks(tasks) == tasks
    assert [task.return_value for task in tasks] == [0, 2, 4, 6, 8, 10]


async def test_futures_come_in_the_order_of_the_tasks() -> None:
    tasks = [ComputeTask(function=double, uid=f"t{n}") for n in range(3000)]
    async with Session([NoopExecutionBackend()]) as session:
        futures = await session.submit_tasks(iter(tasks))  # any iterable
        assert [task.uid for task in await asyncio.gather(*futures)] == [t.uid for t in tasks]


async def test_wait_tasks_never_raises_for_a_task() -> None:
    tasks = [
        ComputeTask(function=fail),
        ComputeTask(executable="/bin/false"),
        ComputeTask(executable="/there/is/no/such/program"),
        ComputeTask(function=double, args=(1,)),
    ]
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks(tasks)
        assert await session.wait_tasks(tasks) == tasks
    assert [task.state for task in tasks] == ["FAILED", "FAILED", "FAILED", "DONE"]
    assert [type(task.exception) for task in tasks[:3]] == [
        KeyError,
        TaskExecutionError,
        TaskExecutionError,
    ]
    assert [task.exit_code for task in tasks] == [1, 1, 127, 0]


async def test_wait_tasks_takes_one_task_and_none() -> None:
    task = ComputeTask(function=noop)
    async with Session([NoopExecutionBackend()]) as session:
        assert await session.submit_tasks([]) == []
        assert await session.wait_tasks([]) == []
        await session.submit_tasks([task])
        assert await session.wait_tasks(task) == [task]


async def test_one_task_stands_for_a_list_of_it() -> None:
    async with Session([NoopExecutionBackend()]) as session:
        task = ComputeTask(function=noop)
        other: Any = {"function": noop}
        await session.submit_tasks([task, other])
        assert [ended async for ended in session.as_completed(task)] == [task]
        assert [ended async for ended in session.as_completed(other)] == [other]
        session.forget(task)
        session.forget(other)
        with pytest.raises(SessionError, match="was forgotten"):
            await session.cancel(task)


async def test_wrong_arguments_are_session_errors() -> None:
    wrong: Any = 5
    with pytest.raises(SessionError, match="work_dir must be the path of a folder, not 5"):
        Session(work_dir=wrong)
    async with Session([NoopExecutionBackend()]) as session:
        text: Any = "task.000001"
        for given in (wrong, text):
            with pytest.raises(SessionError, match="a task or a list of tasks is needed"):
                await session.wait_tasks(given)
        with pytest.raises(SessionError, match="a task or a list of tasks is needed"):
            await anext(session.as_completed(wrong))
        with pytest.raises(SessionError, match="a task or a list of tasks is needed, not 5"):
            session.forget(wrong)
        limits: list[Any] = ["x", float("nan")]
        for limit in limits:
            with pytest.raises(SessionError, match="timeout must be seconds"):
                await session.wait_tasks([], timeout=limit)
        with pytest.raises(SessionError, match="map takes a list of items, not 5"):
            await session.map(noop, wrong)
        own: list[dict[str, Any]] = [{"args": (1,)}, {"executable": "x"}]
        for fields in own:
            with pytest.raises(SessionError, match="= is not accepted"):
                await session.map(noop, [1], **fields)


async def test_a_timeout_of_the_wait_leaves_the_tasks_alone() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        with pytest.raises(asyncio.TimeoutError):
            await session.wait_tasks([task], timeout=0.01)
        assert task.state == "SUBMITTED"
        assert not backend.asked_to_stop
        backend.deliver(task, "RUNNING")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_of(task), 0.01)
        assert task.state == "RUNNING"
        backend.deliver(task, "DONE", return_value=1)
        await session.wait_tasks([task], timeout=60)
    assert (task.state, task.return_value) == ("DONE", 1)


async def _of(task: ComputeTask) -> Any:
    return await task


async def test_giving_up_on_a_future_leaves_the_task_alone() -> None:
    first, second = ComputeTask(function=noop), ComputeTask(function=fail)
    backend = ManualBackend()
    async with Session([backend]) as session:
        futures = await session.submit_tasks([first, second])
        for future in futures:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(future, 0.01)
            assert future.cancelled()
        waiting = asyncio.create_task(session.wait_tasks([first, second]))
        backend.deliver(first, "DONE", return_value=7)
        backend.deliver(second, "FAILED", exception=KeyError("x"))
        await waiting
        assert await first is first
        with pytest.raises(KeyError):
            await second
    assert (first.state, second.state) == ("DONE", "FAILED")
    assert not backend.asked_to_stop


async def test_a_canceled_waiter_cancels_no_task() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        (future,) = await session.submit_tasks([task])
        waiters = [asyncio.create_task(_of(task)), asyncio.create_task(session.wait_tasks([task]))]
        await asyncio.sleep(0)
        for waiter in waiters:
            waiter.cancel()
        assert [type(e) for e in await asyncio.gather(*waiters, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 2
        assert not future.done()
        backend.deliver(task, "DONE")
        assert await future is task


async def test_a_failure_that_nobody_looks_at_warns_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=fail)
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        session.forget([task])
        del task
    gc.collect()
    assert not [record for record in caplog.records if "never retrieved" in record.message]


@pytest.mark.parametrize("wait", ["wait_tasks", "as_completed", "forget", "cancel"])
async def test_a_task_of_another_session_is_refused(wait: str) -> None:
    async with (
        Session([NoopExecutionBackend()]) as here,
        Session([NoopExecutionBackend()]) as there,
    ):
        task = ComputeTask(function=noop)
        same_uid = ComputeTask(function=noop, uid=task.uid)
        never = ComputeTask(function=noop)
        await there.submit_tasks([task])
        await here.submit_tasks([same_uid])
        backend = ManualBackend("later")
        here.add_backend(backend)
        for wrong in (task if wait != "wait_tasks" else never, never):
            with pytest.raises(SessionError, match="not submitted to session"):
                if wait == "wait_tasks":
                    await here.wait_tasks([wrong])
                elif wait == "as_completed":
                    _ = [ended async for ended in here.as_completed([wrong])]
                elif wait == "forget":
                    here.forget([wrong])
                else:
                    await here.cancel(wrong)


# ---------------------------------------------------------------------- as_completed, map, forget


async def test_as_completed_gives_tasks_in_the_order_of_their_ends() -> None:
    a, b, c = tasks = [ComputeTask(function=noop, uid=uid) for uid in "abc"]
    backend = ManualBackend()
    async with Session([backend]) as session:
        futures = await session.submit_tasks(tasks)
        backend.deliver(b, "DONE")
        await session.wait_tasks([b])
        futures[2].cancel()  # gives up that future, and nothing else
        seen = []
        follow = {"b": (a, "FAILED"), "a": (c, "CANCELED")}
        async for task in session.as_completed(tasks):
            seen.append((task.uid, task.state))
            if task.uid in follow:
                backend.deliver(*follow[task.uid])
    assert seen == [("b", "DONE"), ("a", "FAILED"), ("c", "CANCELED")]


async def test_as_completed_waits_for_tasks_not_for_futures() -> None:
    first, second = ComputeTask(function=noop), ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        futures = await session.submit_tasks([first, second])
        seen: list[tuple[Any, str]] = []

        async def follow() -> None:
            async for task in session.as_completed([first, second]):
                seen.append((task, task.state))

        following = asyncio.create_task(follow())
        await asyncio.sleep(0)
        futures[0].cancel()  # somebody else gives up on it meanwhile
        await backend.heard()
        assert seen == []
        backend.deliver(second, "DONE")
        await backend.heard()
        backend.deliver(first, "DONE")
        await following
    assert seen == [(second, "DONE"), (first, "DONE")]


async def test_as_completed_may_be_left_early() -> None:
    tasks = [ComputeTask(function=double, args=(n,)) for n in range(20)]
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks(tasks)
        async for _ in session.as_completed(tasks):
            break
        await session.wait_tasks(tasks)
    assert {task.state for task in tasks} == {"DONE"}


async def test_as_completed_ends_when_the_session_does() -> None:
    tasks = [ComputeTask(function=noop) for _ in range(3)]
    session = Session([ManualBackend()])
    await session.submit_tasks(tasks)

    async def count() -> int:
        return len([task async for task in session.as_completed(tasks)])

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    await session.close()
    assert await counting == 3


async def test_map_gives_values_in_order() -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        assert await session.map(double, range(50)) == [2 * n for n in range(50)]
        assert await session.map(double, []) == []
        assert await session.map(double, iter("ab"), retries=1) == ["aa", "bb"]


async def test_map_raises_what_the_first_failed_call_raised() -> None:
    def picky(x: int) -> int:
        if x in (3, 5):
            raise ValueError(f"not {x}")
        return x

    async with Session([ConcurrentExecutionBackend()]) as session:
        with pytest.raises(ValueError, match="not 3"):
            await session.map(picky, range(8))
        # All of them have ended, and nothing is left behind.
        assert session.get_statistics()["counts"] == {"DONE": 6, "FAILED": 2}


async def test_map_gives_its_fields_to_each_task() -> None:
    backend = ManualBackend("second")
    async with Session([NoopExecutionBackend(), backend]) as session:
        mapping = asyncio.create_task(session.map(double, [1, 2], backend="second", timeout=50))
        for task in list(await backend.handed(2)):
            assert task.timeout == 50
            backend.deliver(task, "DONE", return_value=task.args)
        assert await mapping == [(1,), (2,)]
        with pytest.raises(TaskValidationError, match="unknown argument"):
            await session.map(double, [1], speed=3)


async def test_forget_lets_go_of_tasks() -> None:
    class Value:
        pass

    async with Session([ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=Value, uid="again")
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        value = weakref.ref(task.return_value)
        gone = weakref.ref(task)
        session.forget([task])
        del task
        gc.collect()
        # The thread that made the value may still be in the call that reported it.
        until = time.monotonic() + 10
        while value() or gone():
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
            gc.collect()
        # The statistics remember, and the uid is free again.
        assert session.get_statistics()["counts"] == {"DONE": 1}
        await session.submit_tasks([ComputeTask(function=Value, uid="again")])


async def test_a_forgotten_task_keeps_its_results_for_who_holds_it() -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        task = ComputeTask(function=double, args=(4,))
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        session.forget([task])
        assert task.return_value == 8
        assert await task is task
        with pytest.raises(SessionError, match="forgotten"):
            session.forget([task])


async def test_forget_takes_all_or_none() -> None:
    ended, running = ComputeTask(function=noop), ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([ended, running])
        backend.deliver(ended, "DONE")
        await session.wait_tasks([ended])
        with pytest.raises(SessionError, match="cannot be forgotten yet"):
            session.forget([ended, running])
        session.forget([ended])


# ---------------------------------------------------------------------- routing


async def test_a_task_goes_to_the_first_compatible_backend() -> None:
    backends = [Answers("ai"), Executables("exe"), Functions("fun"), ManualBackend("any")]
    async with Session(backends) as session:
        tasks = [
            ComputeTask(function=noop),
            ComputeTask(executable="x"),
            AITask("x", model="m"),
            ComputeTask(function=noop, backend="any"),
            AITask("x", backend="any"),
            ComputeTask(function=noop, task_backend_specific_kwargs={"colour": "red"}),
        ]
        await session.submit_tasks(tasks)
        assert [task.backend for task in tasks] == ["fun", "exe", "ai", "any", "any", "fun"]
        assert [[t.uid for t in b.given] for b in backends] == [
            [tasks[2].uid],
            [tasks[1].uid],
            [tasks[0].uid, tasks[5].uid],
            [tasks[3].uid, tasks[4].uid],
        ]


async def test_backends_may_be_added_later() -> None:
    session = Session()
    with pytest.raises(SessionError, match=r"has no backend; give it backends="):
        await session.submit_tasks([ComputeTask(function=noop)])
    session.add_backend(NoopExecutionBackend())
    session.add_backend(ManualBackend("later"))
    assert list(session.backends) == ["noop", "later"]
    async with session:
        task = ComputeTask(function=noop)
        await session.submit_tasks([task])
        assert (await task).state == "DONE"


async def test_a_backend_is_started_by_its_first_task() -> None:
    used, unused = ManualBackend("used"), ManualBackend("unused")
    async with Session([used, unused]) as session:
        assert used.state() == "INITIALIZED"
        await session.submit_tasks([ComputeTask(function=noop)])
        assert (used.state(), unused.state()) == ("RUNNING", "INITIALIZED")
    assert (used.state(), unused.state()) == ("SHUTDOWN", "SHUTDOWN")
    assert (used.starts, used.stops, unused.starts, unused.stops) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"function": noop, "backend": "nowhere"}, ["no backend 'nowhere'", "exe, ai"]),
        ({"function": noop}, ["no backend can run", "'exe' runs executable", "'ai' runs ai"]),
        ({"function": noop, "backend": "exe"}, ["'function'", "'exe' runs executable tasks only"]),
        ({"prompt": "x", "backend": "exe"}, ["'ai'", "'exe' runs executable tasks only"]),
        (
            {"executable": "x", "task_backend_specific_kwargs": {"sped": 1}},
            ["'sped'", "accepted: colour, speed"],
        ),
    ],
)
async def test_what_no_backend_can_run_is_refused_at_submit(
    task: dict[str, Any], words: list[str]
) -> None:
    exe = Executables("exe")
    async with Session([exe, Answers("ai")]) as session:
        good = ComputeTask(executable="x")
        with pytest.raises(TaskValidationError) as caught:
            await session.submit_tasks([{**task, "uid": "bad"}, good])
        for word in words:
            assert word in str(caught.value)
        assert list(caught.value.errors) == ["bad"]
        assert exe.given == [good]  # the rest of the batch is untouched
        exe.deliver(good, "DONE")
        assert await good is good
        assert session.get_statistics()["counts"] == {"DONE": 1}


async def test_a_task_that_no_machine_here_can_hold_is_a_resource_error() -> None:
    async with Session([ConcurrentExecutionBackend(), NoopExecutionBackend()]) as session:
        task = ComputeTask(
            executable="x", resources=Resources(cores_per_rank=100_000), backend="concurrent"
        )
        with pytest.raises(ResourceError, match="100000"):
            await session.submit_tasks([task])


# ---------------------------------------------------------------------- refusal in a batch


async def test_every_bad_task_of_a_batch_is_named_and_every_good_one_runs() -> None:
    good = [ComputeTask(function=noop) for _ in range(3)]
    batch: list[Any] = [
        good[0],
        ComputeTask(function=noop, backend="nowhere", uid="lost"),
        good[1],
        5,
        "six",
        {"uid": "empty"},
        good[2],
    ]
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError) as caught:
            await session.submit_tasks(batch)
        await session.wait_tasks(good)
        errors = caught.value.errors
        assert len(errors) == 4, errors
        assert "nowhere" in errors["lost"]
        assert "exactly one of" in errors["empty"]
        assert sum("a task must be a ComputeTask" in text for text in errors.values()) == 2
        assert session.get_statistics()["counts"] == {"DONE": 3}
    assert [task.state for task in good] == ["DONE"] * 3


async def test_a_refused_task_may_be_submitted_once_it_can_run() -> None:
    task = ComputeTask(function=noop, backend="later", uid="t")
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError):
            await session.submit_tasks([task])
        assert task.state == "NEW"
        with pytest.raises(RuntimeError, match="not submitted"):
            await task
        session.add_backend(NoopExecutionBackend("later"))
        await session.submit_tasks([task])
        assert (await task).backend == "later"


async def test_a_duplicate_uid_is_refused() -> None:
    first, second = (ComputeTask(function=noop, uid="same") for _ in range(2))
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError, match=r"uid 'same'.*must be unique"):
            await session.submit_tasks([first, second])
        assert (await first).state == "DONE"
        assert second.state == "NEW"
        with pytest.raises(TaskValidationError, match="must be unique"):
            await session.submit_tasks([{"function": noop, "uid": "same"}])


async def test_a_task_is_submitted_once_only() -> None:
    task = ComputeTask(function=noop)
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError, match="was submitted before"):
            await session.submit_tasks([task, task])
        await task
        with pytest.raises(TaskValidationError, match="was submitted before"):
            await session.submit_tasks([task])
        async with Session([NoopExecutionBackend()]) as other:
            with pytest.raises(TaskValidationError, match="was submitted before"):
                await other.submit_tasks([task])
    assert task.state == "DONE"


@pytest.mark.parametrize(
    "wrong", [ComputeTask(function=noop), {"function": noop}, "task", 5, None, noop]
)
async def test_submit_takes_a_list_of_tasks(wrong: Any) -> None:
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(SessionError, match="submit_tasks takes a list of tasks"):
            await session.submit_tasks(wrong)


@pytest.mark.parametrize(
    ("backends", "words"),
    [
        (["noop"], "must be a BaseExecutionBackend, not 'noop'"),
        ([NoopExecutionBackend], "must be a BaseExecutionBackend"),
        ([NoopExecutionBackend(), NoopExecutionBackend()], "named 'noop' already"),
        (NoopExecutionBackend(), "list of backends"),
        (5, "list of backends"),
        ("noop", "list of backends"),
    ],
)
def test_a_session_takes_a_list_of_backends(backends: Any, words: str) -> None:
    with pytest.raises(SessionError, match=words):
        Session(backends=backends)


# ---------------------------------------------------------------------- engines that fail


async def test_tasks_of_a_backend_that_cannot_start_fail_with_its_error() -> None:
    broken, fine = Broken(), NoopExecutionBackend()
    tasks = [ComputeTask(function=noop, backend="broken") for _ in range(3)]
    other = ComputeTask(function=noop, backend="noop")
    async with Session([broken, fine]) as session:
        await session.submit_tasks([*tasks, other])
        await session.wait_tasks([*tasks, other], timeout=60)
        with pytest.raises(BackendError, match="no scheduler answers") as caught:
            await tasks[0]
        assert session.get_statistics()["counts"] == {"FAILED": 3, "DONE": 1}
    assert (caught.value.backend, caught.value.host) == ("broken", "node1")
    assert other.state == "DONE"
    assert broken.state() == "SHUTDOWN"


async def test_awaiting_a_backend_that_cannot_start_raises_and_may_be_tried_again() -> None:
    backend = Broken(failures=2)
    for _ in range(2):
        with pytest.raises(BackendError, match="no scheduler answers"):
            await backend
    assert backend.state() == "INITIALIZED"
    assert await backend is backend
    assert (backend.state(), backend.starts) == ("RUNNING", 3)
    await backend.shutdown()


async def test_a_retry_starts_a_backend_that_could_not_start() -> None:
    task = ComputeTask(function=noop, retries=2)
    backend = Broken(failures=2)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        await backend.handed(1)
        backend.deliver(task, "DONE")
        await session.wait_tasks([task])
    assert (task.state, backend.starts) == ("DONE", 3)


@pytest.mark.parametrize(
    "error", [BackendError("full", transient=True), OSError("full"), KeyError(3)]
)
async def test_an_engine_that_raises_fails_its_tasks_with_a_typed_error(error: Exception) -> None:
    tasks = [ComputeTask(function=noop) for _ in range(3)]
    async with Session([Refusing(error)]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=60)
    for task in tasks:
        assert task.state == "FAILED"
        assert isinstance(task.exception, BackendError)
        assert task.exception is error or task.exception.__cause__ is error


class Exit(BaseException):
    """As some libraries have them: no error, and not asyncio's either."""


async def test_what_no_engine_should_raise_leaves_no_task_behind() -> None:
    """Neither in the author's submit, nor in the background, where a child is handed over."""

    class Leaving(ManualBackend):
        async def _submit(self, tasks: list[Any]) -> None:
            await super()._submit(tasks)
            if len(self.given) > 1:
                raise Exit

    backend = await Leaving()
    parent, late = ComputeTask(function=noop), ComputeTask(function=noop)
    child = ComputeTask(function=noop, after=[parent])
    async with Session([backend]) as session:
        heard: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: heard.append(what))
        await session.submit_tasks([parent, child])
        backend.deliver(parent, "DONE")
        await session.wait_tasks([child], timeout=30)
        with pytest.raises(Exit):
            await session.submit_tasks([late])
        await session.wait_tasks([late], timeout=30)
    assert (child.state, late.state) == ("CANCELED", "CANCELED")


async def test_two_waits_for_a_start_make_one_start() -> None:
    backend = SlowToStart()
    tasks = [ComputeTask(function=noop) for _ in range(2)]
    async with Session([backend]) as session:
        submits = [asyncio.create_task(session.submit_tasks([task])) for task in tasks]
        await backend.begun.wait()
        backend.may_start.set()
        await asyncio.gather(*submits, _started(backend))
        await backend.handed(2)
        for task in tasks:
            backend.deliver(task, "DONE")
        await session.wait_tasks(tasks)


async def _started(backend: ManualBackend) -> ManualBackend:
    return await backend


# ---------------------------------------------------------------------- retries


async def test_a_task_that_fails_is_run_again_as_often_as_it_says() -> None:
    runs: Counter[str] = Counter()

    def flaky(name: str, good_at: int) -> int:
        runs[name] += 1
        if runs[name] < good_at:
            raise OSError(f"run {runs[name]}")
        return runs[name]

    third = ComputeTask(function=flaky, args=("third", 3), retries=5)
    never = ComputeTask(function=flaky, args=("never", 99), retries=2)
    once = ComputeTask(function=flaky, args=("once", 99))
    async with Session([ConcurrentExecutionBackend()]) as session:
        futures = await session.submit_tasks([third, never, once])
        await session.wait_tasks([third, never, once])
        assert await futures[0] is third
        assert session.get_statistics()["counts"] == {"DONE": 1, "FAILED": 2}
    assert runs == {"third": 3, "never": 3, "once": 1}
    assert (third.return_value, third.exception) == (3, None)
    assert str(never.exception) == "run 3"  # the last one


async def test_an_executable_is_retried_too(tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) -ge 3 ]"
    task = ComputeTask(executable="/bin/sh", arguments=["-c", script], retries=4)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        await task
    assert (tmp_path / "runs").read_text() == "x\n" * 3
    assert (task.exit_code, task.exception) == (0, None)


async def test_a_canceled_task_is_not_retried() -> None:
    task = ComputeTask(function=noop, retries=3)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        assert await session.cancel(task) is True
        await backend.heard()
        assert len(backend.given) == 1
    assert task.state == "CANCELED"


async def test_a_failure_while_it_is_being_canceled_is_not_retried() -> None:
    task = ComputeTask(function=noop, retries=3)

    class Fails(ManualBackend):
        async def _cancel(self, task: Any) -> bool:
            self.deliver(task, "FAILED", exception=OSError("it died of it"))
            return True

    backend = Fails()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        assert await session.cancel(task) is False  # it is not CANCELED, and cancel does not claim
        await backend.heard()
        assert len(backend.given) == 1
    assert task.state == "FAILED"


# ---------------------------------------------------------------------- timeout


@pytest.mark.parametrize(
    "limit",
    [
        {"timeout": 0.05},
        {"resources": Resources(walltime=0.05)},
        {"timeout": 0.05, "resources": Resources(walltime="1h")},
    ],
)
async def test_a_task_that_takes_too_long_is_stopped(limit: dict[str, Any]) -> None:
    task = ComputeTask(executable="/bin/sleep", arguments=[1000], **limit)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=60)
        with pytest.raises(TaskTimeoutError, match=r"0\.05 s") as caught:
            await task
    assert task.state == "FAILED"
    assert caught.value.stopped
    assert caught.value.timeout == 0.05
    assert task.exit_code != 0


async def test_an_async_function_that_takes_too_long_is_stopped() -> None:
    async def for_ever() -> None:
        await asyncio.Event().wait()

    task = ComputeTask(function=for_ever, timeout=0.05)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        with pytest.raises(TaskTimeoutError) as caught:
            await asyncio.wait_for(_of(task), 60)
    assert caught.value.stopped


async def test_a_thread_that_takes_too_long_is_said_to_run_on() -> None:
    release = threading.Event()
    task = ComputeTask(function=release.wait, timeout=0.05, retries=5)
    try:
        async with Session([ConcurrentExecutionBackend()]) as session:
            await session.submit_tasks([task])
            with pytest.raises(TaskTimeoutError, match="still runs") as caught:
                await asyncio.wait_for(_of(task), 60)
            release.set()
    finally:
        release.set()
    assert not caught.value.stopped


async def test_the_clock_starts_when_the_task_does() -> None:
    task = ComputeTask(function=noop, timeout=0.01)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        await asyncio.sleep(0.05)  # time itself is what is tested
        assert task.state == "SUBMITTED"
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
    assert isinstance(task.exception, TaskTimeoutError)
    assert backend.asked_to_stop == [task.uid]


async def test_what_an_engine_says_of_an_abandoned_task_is_dropped() -> None:
    task = ComputeTask(function=noop, timeout=0.01)
    backend = ManualBackend(stoppable=False)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
        assert isinstance(task.exception, TaskTimeoutError)
        assert not task.exception.stopped
        backend.deliver(task, "DONE", return_value="too late")
        await backend.heard()
        assert backend.dropped_events == 1
    assert (task.state, task.return_value) == ("FAILED", None)


async def test_a_task_that_ends_while_it_is_stopped_for_its_timeout_has_ended() -> None:
    class InTheLastMoment(ManualBackend):
        async def _cancel(self, task: Any) -> bool:
            self.deliver(task, "DONE", return_value="just so")
            return False

    task = ComputeTask(function=noop, timeout=0.01)
    backend = InTheLastMoment()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
    assert (task.state, task.return_value) == ("DONE", "just so")


async def test_a_timeout_is_retried_with_a_new_clock() -> None:
    task = ComputeTask(function=noop, timeout=0.01, retries=1)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await backend.handed(2)
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
    assert backend.asked_to_stop == [task.uid] * 2
    assert isinstance(task.exception, TaskTimeoutError)


async def test_what_could_not_be_stopped_is_not_run_beside_itself() -> None:
    task = ComputeTask(function=noop, timeout=0.01, retries=3)
    backend = ManualBackend(stoppable=False)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await session.wait_tasks([task], timeout=60)
        await backend.heard()
        assert len(backend.given) == 1
    assert isinstance(task.exception, TaskTimeoutError)


async def test_a_task_that_fails_when_it_is_stopped_for_its_timeout_is_run_again() -> None:
    class Dies(ManualBackend):
        async def _cancel(self, task: Any) -> bool:
            self.deliver(task, "FAILED", exception=OSError("of the signal"))
            return False

    task = ComputeTask(function=noop, timeout=0.01, retries=1)
    backend = Dies()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await backend.handed(2)
        await backend.heard()
        backend.deliver(task, "DONE", return_value="second")
        await session.wait_tasks([task], timeout=60)
    assert (task.state, task.return_value) == ("DONE", "second")


async def test_a_timeout_of_the_first_run_is_not_one_of_the_second() -> None:
    task = ComputeTask(function=noop, timeout=0.01, retries=1)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await backend.handed(2)
        backend.deliver(task, "CANCELED")  # by the engine's own decision
        await session.wait_tasks([task], timeout=60)
    assert (task.state, task.exception) == ("CANCELED", None)


async def test_an_engine_that_raises_when_it_should_stop_a_task_hangs_nobody() -> None:
    class Angry(ManualBackend):
        async def _cancel(self, task: Any) -> bool:
            raise OSError("no answer")

    late, canceled = ComputeTask(function=noop, timeout=0.01), ComputeTask(function=noop, retries=1)
    backend = Angry()
    async with Session([backend]) as session:
        await session.submit_tasks([late, canceled])
        backend.deliver(late, "RUNNING")
        await session.wait_tasks([late], timeout=60)
        with pytest.raises(OSError, match="no answer"):
            await session.cancel(canceled)
        # It runs on, as if nobody had asked: its retry is still its own.
        backend.deliver(canceled, "FAILED", exception=KeyError())
        await backend.handed(3)
        backend.deliver(canceled, "DONE")
        await session.wait_tasks([canceled], timeout=60)
    assert isinstance(late.exception, TaskTimeoutError)
    assert not late.exception.stopped
    assert canceled.state == "DONE"


# ---------------------------------------------------------------------- cancel


async def test_cancel_stops_a_task() -> None:
    running = ComputeTask(executable="/bin/sleep", arguments=[1000])
    queued = ComputeTask(executable="/bin/sleep", arguments=[1000])
    done = ComputeTask(function=noop)
    async with Session([ConcurrentExecutionBackend(slots=1)]) as session:
        futures = await session.submit_tasks([running, queued, done])
        await done
        assert await session.cancel(queued) is True
        assert await session.cancel(running) is True
        assert await session.cancel(running) is False  # it has ended already
        assert await session.cancel(done) is False
        with pytest.raises(asyncio.CancelledError):
            await futures[0]
        with pytest.raises(asyncio.CancelledError):
            await queued
        await session.wait_tasks([running, queued])
        assert session.get_statistics()["counts"] == {"CANCELED": 2, "DONE": 1}
    assert (running.state, queued.state, done.state) == ("CANCELED", "CANCELED", "DONE")


async def test_cancel_never_claims() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend(stoppable=False)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        assert await session.cancel(task) is False
        assert task.state == "RUNNING"
        backend.deliver(task, "DONE", return_value=1)
        await task
    assert (task.state, task.return_value) == ("DONE", 1)


async def test_a_running_thread_cannot_be_canceled_and_cancel_says_so() -> None:
    begun, release = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        release.wait()
        return "worked on"

    task = ComputeTask(function=work)
    try:
        async with Session([ConcurrentExecutionBackend()]) as session:
            await session.submit_tasks([task])
            await asyncio.to_thread(begun.wait)
            assert await session.cancel(task) is False
            release.set()
            await task
    finally:
        release.set()
    assert task.return_value == "worked on"


async def test_a_task_can_be_canceled_before_its_backend_is_up() -> None:
    task = ComputeTask(function=noop)
    backend = SlowToStart()
    async with Session([backend]) as session:
        submit = asyncio.create_task(session.submit_tasks([task]))
        await backend.begun.wait()
        assert await session.cancel(task) is True
        backend.may_start.set()
        await submit
        await backend.heard()
        assert backend.given == []
    assert task.state == "CANCELED"


async def test_a_backend_that_is_slow_to_start_holds_up_no_other() -> None:
    """Neither the tasks of another one behind it in a large submit, nor their children."""
    slow, fast = SlowToStart(), ManualBackend("fast")
    late = [ComputeTask(function=noop, backend="slow") for _ in range(3000)]
    soon = [ComputeTask(function=noop, backend="fast") for _ in range(2)]
    child = ComputeTask(function=noop, backend="fast", after=[soon[0]])
    async with Session([slow, fast]) as session:
        submit = asyncio.create_task(session.submit_tasks([soon[0], *late, soon[1], child]))
        assert await asyncio.wait_for(fast.handed(2), 30) == soon
        fast.deliver_burst([(task, "DONE", None) for task in soon])
        assert await asyncio.wait_for(fast.handed(3), 30) == [*soon, child]
        assert not submit.done()  # it ends when all has been handed over
        slow.may_start.set()
        await submit
        assert slow.given == late  # in the order of the submit


async def test_a_task_can_be_canceled_while_others_wait_for_its_backend() -> None:
    """What no backend has been given yet is canceled at once, and never run."""
    backend = SlowToStart()
    first, second, third = (ComputeTask(function=noop) for _ in range(3))
    async with Session([backend]) as session:
        submits = [
            asyncio.create_task(session.submit_tasks(tasks)) for tasks in ([first], [second, third])
        ]
        await backend.begun.wait()
        assert await session.cancel(second) is True
        backend.may_start.set()
        while backend.state() != "RUNNING":
            await asyncio.sleep(0)
        assert await session.cancel(third) is True
        await asyncio.gather(*submits)
        await backend.heard()
        assert third not in backend.given
        assert second not in backend.given
    assert (second.state, third.state) == ("CANCELED", "CANCELED")


async def test_cancel_of_one_task_twice_at_once() -> None:
    task = ComputeTask(executable="/bin/sleep", arguments=[1000])
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        assert all(await asyncio.gather(session.cancel(task), session.cancel(task)))


async def test_a_submit_that_is_canceled_leaves_no_task_behind() -> None:
    """Whatever was reached: each of the tasks has ended when the submit has."""
    slow, fast = SlowToStart(), ManualBackend("fast")
    first = ComputeTask(function=noop, backend="slow")
    second = ComputeTask(function=noop, backend="fast")
    child = ComputeTask(function=noop, backend="fast", after=[second])
    async with Session([slow, fast]) as session:
        submit = asyncio.create_task(session.submit_tasks([first, second, child]))
        await slow.begun.wait()
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        for task in fast.given:
            fast.deliver(task, "DONE")
        await session.wait_tasks([first, second, child], timeout=60)
        slow.may_start.set()
    assert slow.given == []


# ---------------------------------------------------------------------- statistics


async def test_statistics_count_states_by_backend() -> None:
    one, two = ManualBackend("one"), ManualBackend("two")
    tasks = [ComputeTask(function=noop, uid=uid, backend="one") for uid in "abcde"]
    other = ComputeTask(function=noop, backend="two")
    child = ComputeTask(function=noop, after=[other], backend="two")
    async with Session([one, two]) as session:
        assert session.get_statistics()["counts"] == Counter()
        await session.submit_tasks([*tasks, other, child])
        assert session.get_statistics()["counts"] == {"PENDING": 7}
        for task, state in zip(tasks, ["RUNNING", "DONE", "FAILED", "CANCELED"], strict=False):
            one.deliver(task, state)
        two.deliver(other, "RUNNING")
        await one.heard()
        stats = session.get_statistics()
        assert isinstance(stats["counts"], Counter)
        assert stats["counts"] == {
            "PENDING": 2,
            "RUNNING": 2,
            "DONE": 1,
            "FAILED": 1,
            "CANCELED": 1,
        }
        assert stats["backends"] == {
            "one": {"RUNNING": 1, "DONE": 1, "FAILED": 1, "CANCELED": 1},
            "two": {"RUNNING": 1},
        }
        one.deliver(tasks[0], "DONE")
        one.deliver(tasks[4], "DONE")
        two.deliver(other, "DONE")
        await two.handed(2)
        two.deliver(child, "DONE")
        await session.wait_tasks([*tasks, child])
        session.forget(tasks)
        assert session.get_statistics()["counts"] == {"DONE": 5, "FAILED": 1, "CANCELED": 1}


async def test_statistics_measure_seconds() -> None:
    task = ComputeTask(executable="/bin/sleep", arguments=[0.2])
    async with Session([ConcurrentExecutionBackend()]) as session:
        assert session.get_statistics()["summary"] == {
            "avg_total": 0.0,
            "avg_queue": 0.0,
            "avg_execution": 0.0,
        }
        await session.submit_tasks([task])
        await task
        summary = session.get_statistics()["summary"]
    assert 0.2 <= summary["avg_execution"] <= summary["avg_total"] < 60
    assert summary["avg_queue"] >= 0
    assert summary["avg_total"] >= summary["avg_queue"]


async def test_the_queue_is_what_a_task_waits_for() -> None:
    tasks = [ComputeTask(executable="/bin/sleep", arguments=[0.2]) for _ in range(2)]
    async with Session([ConcurrentExecutionBackend(slots=1)]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        assert session.get_statistics()["summary"]["avg_queue"] >= 0.1


# ---------------------------------------------------------------------- the end


async def test_close_settles_everything() -> None:
    running, queued, function, stuck = (
        ComputeTask(executable="/bin/sleep", arguments=[1000]),
        ComputeTask(executable="/bin/sleep", arguments=[1000]),
        ComputeTask(function=asyncio.sleep, args=(1000,)),
        ComputeTask(function=noop, backend="manual"),
    )
    child = ComputeTask(function=noop, after=[running])
    tasks = [running, queued, function, stuck, child]
    session = Session([ConcurrentExecutionBackend(slots=1), ManualBackend()])
    futures = await session.submit_tasks(tasks)
    await session.close()
    assert all(future.done() for future in futures)
    assert [task.state for task in tasks] == ["CANCELED"] * 3 + ["FAILED", "CANCELED"]
    assert isinstance(stuck.exception, BackendError)  # nobody knows whether it was stopped
    assert "shut down" in str(stuck.exception)


async def test_close_retries_nothing() -> None:
    task = ComputeTask(function=noop, retries=5)
    backend = ManualBackend()
    session = Session([backend])
    await session.submit_tasks([task])
    await session.close()
    assert (task.state, len(backend.given)) == ("FAILED", 1)


async def test_a_wait_ends_when_the_session_does() -> None:
    task = ComputeTask(function=noop)
    session = Session([ManualBackend()])
    await session.submit_tasks([task])
    waits = [asyncio.create_task(session.wait_tasks([task])), asyncio.create_task(_of(task))]
    await asyncio.sleep(0)
    await session.close()
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert results[0] == [task]
    assert isinstance(results[1], BackendError)


async def test_close_may_be_called_again_and_at_once() -> None:
    backend = ManualBackend()
    session = Session([backend])
    await session.submit_tasks([ComputeTask(function=noop)])
    await asyncio.gather(session.close(), session.close(), backend.shutdown())
    await session.close()
    await backend.shutdown()
    assert backend.stops == 1


async def test_a_closed_session_takes_nothing_more() -> None:
    task = ComputeTask(function=noop)
    session = Session([NoopExecutionBackend()])
    await session.submit_tasks([task])
    await task
    was_closed = session.closed
    await session.close()
    assert (was_closed, session.closed) == (False, True)
    with pytest.raises(SessionError, match="is closed"):
        await session.submit_tasks([ComputeTask(function=noop)])
    with pytest.raises(SessionError, match="is closed"):
        await session.map(double, [1])
    with pytest.raises(SessionError, match="is closed"):
        session.add_backend(ManualBackend())
    # What it knows can still be asked for.
    assert session.get_statistics()["counts"] == {"DONE": 1}
    assert await session.wait_tasks([task]) == [task]
    assert await session.cancel(task) is False
    session.forget([task])


async def test_a_session_closes_when_its_block_raises() -> None:
    backend = ManualBackend()
    task = ComputeTask(function=noop)
    with pytest.raises(ZeroDivisionError):
        async with Session([backend]) as session:
            (future,) = await session.submit_tasks([task])
            raise ZeroDivisionError
    assert future.done()
    assert backend.state() == "SHUTDOWN"


async def test_a_backend_that_cannot_stop_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(ManualBackend):
        async def _stop(self) -> None:
            raise OSError("the scheduler does not answer")

    stuck, fine = Stuck("stuck"), ManualBackend("fine")
    tasks = [ComputeTask(function=noop, backend=name) for name in ("stuck", "fine")]
    session = Session([stuck, fine])
    futures = await session.submit_tasks(tasks)
    with caplog.at_level(logging.ERROR, "rhapsody"):
        await session.close()
    assert all(future.done() for future in futures)
    assert fine.stops == 1
    assert "'stuck' did not shut down cleanly" in caplog.text
    assert "the scheduler does not answer" in caplog.text


async def test_close_while_a_backend_starts() -> None:
    backend = SlowToStart()
    tasks = [ComputeTask(function=noop) for _ in range(3)]
    session = Session([backend])
    submit = asyncio.create_task(session.submit_tasks(tasks))
    await backend.begun.wait()
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0)
    backend.may_start.set()
    await closing
    await asyncio.gather(submit, return_exceptions=True)
    assert all(task.done() for task in tasks)
    assert backend.given == []  # an engine that is down is given nothing


async def test_close_during_a_large_submit_settles_all_of_it() -> None:
    """After it every task that the session has taken has ended, and the others were refused."""
    backend = ManualBackend()
    session = Session([backend])
    tasks: list[ComputeTask] = []

    def described() -> Iterator[ComputeTask]:
        for number in range(20_000):
            child = number % 100 == 99
            task = ComputeTask(function=noop, after=tasks[-1:] if child else None)
            tasks.append(task)
            yield task

    submit = asyncio.create_task(session.submit_tasks(described()))
    await backend.handed(1)
    await session.close()
    left = [task.state for task in tasks]
    assert set(left) <= {"NEW", "CANCELED", "FAILED"}
    with pytest.raises(SessionError, match="closed during a submit"):
        await submit
    assert [task.state for task in tasks] == left
    for task in tasks:
        if task.state == "NEW":
            with pytest.raises(RuntimeError, match="not submitted"):
                await task


async def test_shutting_a_backend_down_fails_what_is_submitted_to_it_later() -> None:
    backend = ManualBackend()
    task = ComputeTask(function=noop)
    async with Session([backend]) as session:
        await backend.shutdown()
        await session.submit_tasks([task])
        with pytest.raises(BackendError, match="'manual' is shut down"):
            await task


# ---------------------------------------------------------------------- two loops


def test_a_session_belongs_to_one_event_loop() -> None:
    """A second asyncio.run is told so; it would wait for ever."""
    session, backend = Session(), ManualBackend()
    session.add_backend(backend)
    ended, left, late = (ComputeTask(function=noop) for _ in range(3))

    async def first() -> None:
        await session.submit_tasks([ended, left])
        backend.deliver(ended, "DONE")
        await ended

    async def follow() -> None:
        async for _ in session.as_completed([left]):
            pass

    async def second() -> None:
        assert await session.wait_tasks([ended]) == [ended]
        assert await session.cancel(ended) is False
        for attempt in (
            session.submit_tasks([late]),
            session.wait_tasks([left]),
            session.cancel(left),
            follow(),
        ):
            with pytest.raises(SessionError, match=r"another event loop; make a new session"):
                await asyncio.wait_for(attempt, 30)
        await session.close()

    asyncio.run(first())
    asyncio.run(second())
    assert (late.state, left.state) == ("NEW", "CANCELED")


@pytest.mark.parametrize("cls", [ConcurrentExecutionBackend, NoopExecutionBackend])
def test_a_backend_belongs_to_one_event_loop(cls: Any) -> None:
    backend = asyncio.run(cls.create())
    task = ComputeTask(function=noop)

    async def second() -> None:
        with pytest.raises(BackendError, match=r"another event loop; make a new one"):
            await backend
        async with Session([backend]) as session:
            await session.submit_tasks([task])
            await session.wait_tasks([task], timeout=30)

    asyncio.run(second())
    assert isinstance(task.exception, BackendError)


# ---------------------------------------------------------------------- two sessions


async def test_two_sessions_each_hear_of_their_own_tasks() -> None:
    """One after the other on one backend; both at once is refused, not mixed up."""
    backend = ManualBackend()
    first, second = Session([backend]), Session([backend])
    parent, child = ComputeTask(function=noop), None
    child = ComputeTask(function=noop, after=[parent])
    await first.submit_tasks([parent, child])
    meanwhile = ComputeTask(function=noop)
    await second.submit_tasks([meanwhile])
    with pytest.raises(BackendError, match=f"still runs 1 tasks of {first.uid}"):
        await meanwhile
    backend.deliver(parent, "DONE")
    await backend.handed(2)
    backend.deliver(child, "DONE")
    await first.wait_tasks([parent, child], timeout=60)
    assert first.get_statistics()["counts"] == {"DONE": 2}
    later = ComputeTask(function=noop)
    await second.submit_tasks([later])
    backend.deliver(later, "DONE")
    await second.wait_tasks([later], timeout=60)
    assert second.get_statistics()["counts"] == {"FAILED": 1, "DONE": 1}
    again = ComputeTask(function=noop)
    await first.submit_tasks([again])
    backend.deliver(again, "DONE")
    await first.wait_tasks([again], timeout=60)
    assert first.get_statistics()["counts"] == {"DONE": 3}
    await first.close()
    await second.close()


async def test_a_backend_that_is_at_work_cannot_be_given_to_another_session() -> None:
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([ComputeTask(function=noop)])
        with pytest.raises(BackendError, match=f"still runs 1 tasks of {session.uid}"):
            Session([backend])


# ---------------------------------------------------------------------- names and folders


def test_sessions_count_on_within_a_process() -> None:
    first, second = Session(), Session()
    number = int(first.uid.removeprefix("session."))
    assert first.uid == f"session.{number:04d}"
    assert second.uid == f"session.{number + 1:04d}"
    assert Session(uid="mine").uid == "mine"


def test_the_work_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Session().work_dir == Path.cwd()
    monkeypatch.setenv("RHAPSODY_WORK_DIR", str(tmp_path / "env"))
    assert Session().work_dir == tmp_path / "env"
    session = Session(uid="s", work_dir=tmp_path / "given")
    assert session.work_dir == tmp_path / "given"
    assert not session.work_dir.exists()  # made when it is needed
    assert session.path == tmp_path / "given" / "s"
    assert session.path.is_dir()
    assert Session(uid="s", work_dir=str(tmp_path / "given")).path.name == "s.1"


@pytest.mark.parametrize("work_dir", [5, 0, b"x", ["x"]])
def test_a_work_directory_is_a_path(work_dir: Any) -> None:
    with pytest.raises(SessionError, match="work_dir must be"):
        Session(work_dir=work_dir)


@pytest.mark.parametrize("kind", ["dangling", "file", "below a file", "proc", "nul"])
async def test_a_work_directory_that_cannot_be_made_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "dangling").symlink_to("/missing/folder")
    (tmp_path / "file").touch()
    place = {"below a file": "file/below", "proc": "/proc/nope", "nul": "a\0b"}.get(kind, kind)
    backend = ConcurrentExecutionBackend(slots=1)
    async with Session([backend], work_dir=place) as session:
        with pytest.raises(SessionError, match="work_dir") as caught:
            session.path.exists()
        assert repr(place) in str(caught.value)
        task = ComputeTask(executable="true", retries=3)
        other = ComputeTask(function=double, args=(1,))
        await session.submit_tasks([task, other])
        await session.wait_tasks([task, other], timeout=60)
    assert (task.state, other.state) == ("FAILED", "DONE")
    assert isinstance(task.exception, SessionError)
    assert "work_dir" in str(task.exception)


@pytest.mark.parametrize("uid", ["a/b", "..", 5, "a\0b"])
def test_a_session_uid_is_the_name_of_a_folder(uid: Any) -> None:
    with pytest.raises(SessionError, match="uid must be"):
        Session(uid=uid)


async def test_a_session_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    async with Session([ConcurrentExecutionBackend(), NoopExecutionBackend()]) as session:
        await session.map(double, [1])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- threads and numbers


async def test_statistics_may_be_read_from_any_thread() -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        stop = threading.Event()
        seen: list[int] = []

        def read() -> None:
            while not stop.is_set():
                seen.append(session.get_statistics()["counts"]["DONE"])

        reader = threading.Thread(target=read)
        reader.start()
        try:
            await session.map(double, range(2000))
        finally:
            stop.set()
            reader.join()
    assert seen == sorted(seen)


@pytest.mark.parametrize("make", [NoopExecutionBackend, ConcurrentExecutionBackend])
async def test_many_submits_at_once(make: Callable[[], Any]) -> None:
    async with Session([make()]) as session:
        batches = [[ComputeTask(function=noop) for _ in range(700)] for _ in range(10)]
        futures = await asyncio.gather(*map(session.submit_tasks, batches))
        await asyncio.gather(*(future for batch in futures for future in batch))
        assert session.get_statistics()["counts"] == {"DONE": 7000}
