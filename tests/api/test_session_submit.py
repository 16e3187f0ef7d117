"""Which backend a task goes to, and what is refused at submit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from functions import noop
from manual import ManualBackend
from rhapsody.api import (
    AITask,
    ComputeTask,
    ResourceError,
    Resources,
    Session,
    SessionError,
    TaskValidationError,
)
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend


class Functions(ManualBackend):
    kinds = frozenset({"function"})


class Executables(ManualBackend):
    kinds = frozenset({"executable"})


class Answers(ManualBackend):
    kinds = frozenset({"ai"})


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


@pytest.mark.parametrize("make", [NoopExecutionBackend, ConcurrentExecutionBackend])
async def test_many_submits_at_once(make: Callable[[], Any]) -> None:
    async with Session([make()]) as session:
        batches = [[ComputeTask(function=noop) for _ in range(700)] for _ in range(10)]
        futures = await asyncio.gather(*map(session.submit_tasks, batches))
        await asyncio.gather(*(future for batch in futures for future in batch))
        assert session.get_statistics()["counts"] == {"DONE": 7000}
