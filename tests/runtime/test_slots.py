"""What the machine has is handed out once, and comes back."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fifos import Fifo, report, wait_for_release
from rhapsody.api import BackendError, ComputeTask, ResourceError, Resources, Session
from rhapsody.backends import ConcurrentExecutionBackend
from rhapsody.runtime.machine.slots import Grant, Slots

CORES = (2, 3, 5, 7, 11, 13)
GPUS = ("0", "GPU-b", "7")
MEMORY = 1000


def needs() -> st.SearchStrategy[Resources | None]:
    return st.none() | st.builds(
        Resources,
        ranks=st.integers(1, 4),
        cores_per_rank=st.integers(1, 3),
        gpus_per_rank=st.integers(0, 2),
        memory_per_rank=st.none() | st.integers(1, 600),
    )


def possible(slots: Slots, need: Resources) -> bool:
    try:
        slots.check("t", need)
    except ResourceError:
        return False
    return True


def test_one_slot_per_core_unless_told() -> None:
    assert Slots(CORES).total == 6
    assert Slots(CORES, slots=40).total == 40


def test_a_task_without_resources_holds_a_slot_and_no_core() -> None:
    slots = Slots(CORES, slots=2)
    assert slots.acquire(None) == slots.acquire(None) == Grant()
    assert slots.acquire(None) is None


def test_a_rank_holds_its_cores_its_gpus_and_its_memory() -> None:
    slots = Slots(CORES, GPUS, MEMORY)
    need = Resources(ranks=2, cores_per_rank=2, gpus_per_rank=1, memory_per_rank=400)
    assert slots.acquire(need) == Grant(4, (2, 3, 5, 7), ("0", "GPU-b"), 800)
    assert slots.acquire(need) is None
    assert slots.acquire(Resources(memory_per_rank=201)) is None
    assert slots.acquire(Resources(gpus_per_rank=2)) is None
    assert slots.acquire(Resources(cores_per_rank=2, gpus_per_rank=1)) == Grant(
        2, (11, 13), ("7",), 0
    )


def test_what_came_back_is_handed_out_again_lowest_first() -> None:
    slots = Slots(CORES, GPUS)
    grants = [slots.acquire(Resources(gpus_per_rank=1)) for _ in range(3)]
    for grant in (grants[2], grants[0], grants[1]):
        assert grant is not None
        slots.release(grant)
    assert slots.acquire(Resources(cores_per_rank=6, gpus_per_rank=3)) == Grant(6, CORES, GPUS)


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (Resources(cores_per_rank=7), "asks for 7 cores, and this machine grants 6"),
        (Resources(ranks=7), "asks for 7 cores for 7 ranks, and this machine grants 6"),
        (Resources(gpus_per_rank=4), "asks for 4 GPUs, and this machine grants 3"),
        (Resources(memory_per_rank=1001), "asks for 1001 bytes of memory, and.* grants 1000"),
    ],
)
def test_more_than_there_is_is_refused(need: Resources, words: str) -> None:
    slots = Slots(CORES, GPUS, MEMORY)
    with pytest.raises(ResourceError, match=words):
        slots.check("t", need)
    assert slots.acquire(need) is None


def test_fewer_slots_than_cores_bound_the_cores_of_a_task() -> None:
    slots = Slots(CORES, slots=2)
    with pytest.raises(ResourceError, match="asks for 3 cores, and this machine grants 2"):
        slots.check("t", Resources(cores_per_rank=3))


@settings(deadline=None)  # it is no test of speed
@given(st.lists(needs(), max_size=30))
def test_what_is_possible_is_granted_by_an_empty_machine(asked: list[Resources | None]) -> None:
    slots = Slots(CORES, GPUS, MEMORY)
    for need in asked:
        if need is None or possible(slots, need):
            grant = slots.acquire(need)
            assert grant is not None
            slots.release(grant)


class Machine(RuleBasedStateMachine):
    """Any order of taking and giving back."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(CORES, GPUS, MEMORY)
        self.held: list[Grant] = []

    @rule(need=needs())
    def take(self, need: Resources | None) -> None:
        free_cores = len(CORES) - sum(len(grant.cores) for grant in self.held)
        free_slots = len(CORES) - sum(grant.slots for grant in self.held)
        free_gpus = len(GPUS) - sum(len(grant.gpus) for grant in self.held)
        free_memory = MEMORY - sum(grant.memory for grant in self.held)
        grant = self.slots.acquire(need)
        if need is None:
            fits = free_slots >= 1
        else:
            fits = (
                need.cores <= min(free_cores, free_slots)
                and need.gpus <= free_gpus
                and need.memory <= free_memory
            )
        assert (grant is not None) == fits
        if grant is not None:
            if need is not None:
                assert (len(grant.cores), len(grant.gpus)) == (need.cores, need.gpus)
                assert grant.memory == need.memory
            self.held.append(grant)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.slots.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def nothing_is_held_twice(self) -> None:
        cores = [core for grant in self.held for core in grant.cores]
        gpus = [gpu for grant in self.held for gpu in grant.gpus]
        assert len(cores) == len(set(cores))
        assert len(gpus) == len(set(gpus))
        assert set(cores) <= set(CORES)
        assert set(gpus) <= set(GPUS)
        assert sum(grant.slots for grant in self.held) <= len(CORES)
        assert sum(grant.memory for grant in self.held) <= MEMORY

    def teardown(self) -> None:
        for grant in self.held:
            self.slots.release(grant)
        everything = Resources(cores_per_rank=6, gpus_per_rank=3, memory_per_rank=MEMORY)
        assert self.slots.acquire(everything) == Grant(6, CORES, GPUS, MEMORY)


TestMachine = Machine.TestCase
TestMachine.settings = settings(deadline=None, max_examples=50)


# ---------------------------------------------------------------------- through the session


async def test_tasks_that_hold_the_machine_run_one_after_the_other(roster: Fifo, go: Fifo) -> None:
    """Each asks for all cores: while one of them waits, no other has begun."""

    def one(number: int) -> int:
        report(roster.path, "begin", number)
        wait_for_release(go.path)
        report(roster.path, "end", number)
        return number

    backend = await ConcurrentExecutionBackend()
    whole = Resources(cores_per_rank=len(backend._cores))
    async with Session([backend]) as session:
        tasks = [ComputeTask(function=one, args=(n,), resources=whole) for n in range(4)]
        await session.submit_tasks(tasks)
        heard = []
        for _ in tasks:
            heard.append(await roster.line())
            go.release()
            heard.append(await roster.line())
        await asyncio.gather(*tasks)
    assert heard == [f"{word} {n}" for n in range(4) for word in ("begin", "end")]


async def test_a_large_task_is_not_passed_by_small_ones() -> None:
    order: list[str] = []
    backend = await ConcurrentExecutionBackend(slots=2)
    most = min(2, len(backend._cores))
    async with Session([backend]) as session:
        tasks = [
            ComputeTask(function=order.append, args=(name,), resources=Resources(cores_per_rank=n))
            for name, n in (("first", most), ("large", most), ("small", 1))
        ]
        await session.submit_tasks(tasks)
        await asyncio.gather(*tasks)
    assert order == ["first", "large", "small"]


async def test_what_a_canceled_failed_or_refused_task_held_comes_back() -> None:
    backend = await ConcurrentExecutionBackend()
    whole = Resources(cores_per_rank=len(backend._cores))
    async with Session([backend]) as session:
        asleep = ComputeTask(executable="sleep", arguments=[1000], resources=whole)
        await session.submit_tasks([asleep])
        waits = ComputeTask(executable="true", resources=whole)
        await session.submit_tasks([waits])
        assert await session.cancel(waits)
        assert await session.cancel(asleep)
        fails = ComputeTask(executable="false", resources=whole)
        raises = ComputeTask(function=int, args=("x",), resources=whole)
        absent = ComputeTask(executable="/there/is/none", resources=whole)
        last = ComputeTask(function=int, args=("7",), resources=whole)
        await session.submit_tasks([fails, raises, absent, last])
        await session.wait_tasks([fails, raises, absent, last], timeout=30)
    assert [t.state for t in (asleep, waits)] == ["CANCELED"] * 2
    assert [t.state for t in (fails, raises, absent)] == ["FAILED"] * 3
    assert last.return_value == 7


class Unspeakable:
    def __str__(self) -> str:
        raise ZeroDivisionError("it has no text")


async def test_what_cannot_be_described_fails_alone_and_its_slot_comes_back(go: Fifo) -> None:
    """At a submit, and behind another that runs, with resources and without."""
    backend = await ConcurrentExecutionBackend(slots=1)
    async with Session([backend]) as session:
        parent = ComputeTask(function=Unspeakable)
        await session.submit_tasks([parent])
        await parent

        def batch() -> list[ComputeTask]:
            bad = [
                ComputeTask(executable="echo", arguments=[parent]),
                ComputeTask(executable="echo", arguments=[parent], resources=Resources()),
            ]
            return [*bad, ComputeTask(executable="echo", arguments=["well"])]

        first = batch()
        await session.submit_tasks(first)
        await session.wait_tasks(first, timeout=30)
        blocks = ComputeTask(executable="head", arguments=["-c1", go.path])
        await session.submit_tasks([blocks])
        behind = [task for _ in range(4) for task in batch()]
        await session.submit_tasks(behind)
        go.release()
        await session.wait_tasks([blocks, *behind], timeout=30)
    assert blocks.state == "DONE"
    for bad, worse, good in zip(*[iter([*first, *behind])] * 3, strict=True):
        assert isinstance(bad.exception, ZeroDivisionError)
        assert isinstance(worse.exception, ZeroDivisionError)
        assert (good.state, good.stdout) == ("DONE", "well\n")


async def test_a_function_for_an_executor_that_was_shut_down_gives_back_what_it_held() -> None:
    with ThreadPoolExecutor(1) as executor:
        backend = await ConcurrentExecutionBackend(executor, slots=1)
    async with Session([backend]) as session:
        late = ComputeTask(function=int, resources=Resources())
        well = ComputeTask(executable="true", resources=Resources())
        await session.submit_tasks([late, well])
        await session.wait_tasks([late, well], timeout=30)
    assert isinstance(late.exception, BackendError)
    assert late.exception.backend == "concurrent"
    assert well.state == "DONE"
