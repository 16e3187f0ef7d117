"""`Resources` with cores and GPUs: what the ranks have to themselves, seen from inside of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from rhapsody import ComputeTask
from rhapsody.api import Resources
from rhapsody.api.errors import ResourceError
from rhapsody.runtime.machine.hardware import granted_cores

from . import small, work
from .nodes import Sandbox
from .runtime import Runtime

BOTH = pytest.mark.parametrize("backend", ["dragon", "v1"])
CPUS, GPUS = 8, 2  # that the node is said to have


class Seen(NamedTuple):
    """What a rank has seen, and when it was there."""

    cpus: frozenset[int]
    gpus: frozenset[str]
    began: float
    ended: float


def look(seconds: float) -> Seen:
    began = time.monotonic()
    time.sleep(seconds)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return Seen(frozenset(os.sched_getaffinity(0)), frozenset(gpus), began, time.monotonic())


def core(backend: str) -> int:
    """How many CPUs a core has: V3 counts half of what the kernel counts, as Batch."""
    return 1 if backend == "v1" else max(1, len(granted_cores()) // (CPUS // 2))


@pytest.fixture(scope="module")
def dragon(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    folder = tmp_path_factory.mktemp("pinning")
    with Runtime(sandbox, small.environment(CPUS, GPUS), cwd=folder) as runtime:
        runtime.call(work.open_both)
        yield runtime
        runtime.call(work.close_session)
        assert runtime.stop().code == 0
        assert sandbox.left() == []


async def _gpus(backend: str) -> None:
    one = Resources(gpus_per_rank=1)
    two = Resources(ranks=2, gpus_per_rank=1)
    without: dict[str, Any] = {"task_backend_specific_kwargs": {"pmi": None}, "backend": backend}
    tasks = await work.run(
        *(ComputeTask(function=look, args=(2.0,), resources=one, backend=backend) for _ in "123"),
        ComputeTask(function=look, args=(0.5,), resources=two, **without),
    )
    assert {task.state for task in tasks} == {"DONE"}, [task.exception for task in tasks]
    seen: list[Seen] = [task.return_value for task in tasks[:3]] + tasks[3].return_value
    for rank in seen:
        assert (len(rank.cpus), len(rank.gpus)) == (core(backend), 1)
        assert rank.gpus <= {"0", "1"}
        for other in seen:
            if other is not rank and rank.began < other.ended and other.began < rank.ended:
                assert not rank.cpus & other.cpus
                assert not rank.gpus & other.gpus
    assert not seen[3].gpus & seen[4].gpus


@BOTH
def test_ranks_have_cores_and_gpus_to_themselves(dragon: Runtime, backend: str) -> None:
    dragon.call(_gpus, backend)


async def _cores(backend: str) -> None:
    program, function = await work.run(
        ComputeTask(
            executable="/bin/sh",
            arguments=["-c", "nproc; pwd"],
            resources=Resources(cores_per_rank=2),
            task_backend_specific_kwargs={"process_template": {"cwd": "/"}},
            backend=backend,
        ),
        ComputeTask(
            function=look, args=(0.0,), resources=Resources(cores_per_rank=2), backend=backend
        ),
    )
    assert function.state == program.state == "DONE", (function.exception, program.exception)
    assert len(function.return_value.cpus) == 2 * core(backend)
    assert str(program.stdout).split() == [str(2 * core(backend)), "/"]


@BOTH
def test_several_cores(dragon: Runtime, backend: str) -> None:
    dragon.call(_cores, backend)


async def _own_policy(backend: str) -> None:
    from dragon.infrastructure.policy import Policy

    (task,) = await work.run(
        ComputeTask(
            function=look,
            args=(0.0,),
            resources=Resources(gpus_per_rank=1),
            task_backend_specific_kwargs={
                "process_template": {"policy": Policy(gpu_affinity=[1], cpu_affinity=[0])}
            },
            backend=backend,
        )
    )
    assert task.return_value[:2] == (frozenset({0}), frozenset({"1"})), task.exception


@BOTH
def test_a_policy_of_the_tasks_own_wins(dragon: Runtime, backend: str) -> None:
    dragon.call(_own_policy, backend)


async def _too_much(backend: str, resources: Resources, on: str | None) -> None:
    from dragon.infrastructure.policy import Policy

    template: dict[str, Any] = {}
    if on is not None:
        template["policy"] = Policy(placement=Policy.Placement.HOST_NAME, host_name=on)
    task = ComputeTask(
        executable="true",
        resources=resources,
        task_backend_specific_kwargs={"process_template": template, "pmi": None},
        backend=backend,
    )
    await work.session().submit_tasks([task])


@BOTH
@pytest.mark.parametrize(
    ("resources", "on", "words"),
    [
        (Resources(cores_per_rank=99), None, "room for 0 on 1 node: localhost"),
        (Resources(gpus_per_rank=3), None, "and 3 GPUs, and there is room for 0"),
        (Resources(ranks=3, gpus_per_rank=1), "localhost", "on 'localhost', and there is room for"),
    ],
)
def test_what_would_wait_for_ever_is_refused(
    dragon: Runtime, backend: str, resources: Resources, on: str | None, words: str
) -> None:
    with pytest.raises(ResourceError, match=words):
        dragon.call(_too_much, backend, resources, on)


async def _cancel_waiting() -> None:
    need = Resources(gpus_per_rank=GPUS)
    holds = await work.start(ComputeTask(executable="sleep", arguments=["5"], resources=need))
    waits = ComputeTask(function=look, args=(0.0,), resources=need)
    then = ComputeTask(function=look, args=(0.0,), resources=need)
    await work.session().submit_tasks([waits, then])
    (overtakes,) = await work.run(ComputeTask(function=work.add, args=(1, 1)))
    assert overtakes.return_value == 2
    assert await work.session().cancel(waits)
    assert (holds.state, waits.state) == ("RUNNING", "CANCELED")
    await work.session().wait_tasks([holds, then], timeout=50)
    assert (holds.state, then.state) == ("DONE", "DONE")


def test_what_waits_for_a_place_can_be_cancelled_and_holds_nobody_up(dragon: Runtime) -> None:
    dragon.call(_cancel_waiting)
