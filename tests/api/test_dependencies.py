"""Dependencies: tasks as arguments, `after=`, across backends, and every graph that is wrong."""

from __future__ import annotations

import asyncio
import copy
import importlib
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from functions import fail, noop
from manual import ManualBackend
from rhapsody.api import (
    AITask,
    ComputeTask,
    DependencyError,
    Session,
    TaskExecutionError,
    TaskTimeoutError,
    TaskValidationError,
)
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend


def add(*values: int) -> int:
    return sum(values)


def collect(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def links(number: int, after: ComputeTask | None = None) -> list[ComputeTask]:
    """A chain: each task waits for the one before it."""
    chain: list[ComputeTask] = []
    for _ in range(number):
        parent = chain[-1] if chain else after
        chain.append(ComputeTask(function=noop, after=[parent] if parent else None))
    return chain


# ---------------------------------------------------------------------- results take their place


async def test_a_task_as_argument_is_replaced_by_its_result() -> None:
    one, two = ComputeTask(function=add, args=(1,)), ComputeTask(function=add, args=(2,))
    child = ComputeTask(function=collect, args=(one, 5), kwargs={"x": two, "y": 6})
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([one, two, child])
        await child
    assert child.return_value == ((1, 5), {"x": 2, "y": 6})
    assert child.args == (one, 5)  # what the author gave stays


async def test_tasks_in_containers_are_replaced_too() -> None:
    one, two = ComputeTask(function=add, args=(1,)), ComputeTask(function=add, args=(2,))
    child = ComputeTask(
        function=collect,
        args=([one, two, 3], (one, 4), {5}),
        kwargs={"table": {"a": one, "b": 6}},
    )
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([child, one, two])  # in any order
        await child
    assert child.return_value == (([1, 2, 3], (1, 4), {5}), {"table": {"a": 1, "b": 6}})


async def test_one_parent_many_times() -> None:
    """A child is run once, however often its parent is named."""
    runs: list[int] = []

    def note(*args: int) -> int:
        runs.append(1)
        return sum(args)

    one = ComputeTask(function=add, args=(7,))
    child = ComputeTask(function=note, args=(one, one, one), after=[one, one])
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([one, child])
        await child
    assert (child.return_value, runs) == (21, [1])


async def test_a_parent_is_handed_to_its_children_once() -> None:
    parent, backend = ComputeTask(function=noop), ManualBackend()
    child = ComputeTask(function=collect, args=(parent, parent), after=[parent])
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child])
        backend.deliver(parent, "DONE", return_value=3)
        await backend.handed(2)
        await backend.heard()
        assert backend.given == [parent, child]
        backend.deliver(child, "DONE")
        await child
    assert backend.dropped_events == 0


async def test_an_executables_output_is_its_result() -> None:
    echo = ComputeTask(executable="/bin/echo", arguments=["-n", "hello"])
    number = ComputeTask(function=add, args=(41, 1))
    again = ComputeTask(executable="/bin/echo", arguments=["-n", echo, number])
    length = ComputeTask(function=len, args=(again,))
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([length, again, number, echo])
        await length
    assert again.stdout == "hello 42"
    assert length.return_value == 8
    assert again.arguments == ["-n", echo, number]


async def test_an_answer_is_its_tasks_result() -> None:
    ai, compute = ManualBackend("ai"), ConcurrentExecutionBackend()
    question = AITask("how many?", model="m", backend="ai")
    child = ComputeTask(function=len, args=(question,), backend="concurrent")
    async with Session([ai, compute]) as session:
        await session.submit_tasks([question, child])
        ai.deliver(question, "DONE", response="four")
        await child
    assert child.return_value == 4


async def test_after_waits_and_passes_nothing(tmp_path: Path) -> None:
    write = ComputeTask(
        executable="/bin/sh", arguments=["-c", f"sleep 0.1; echo done > {tmp_path}/file"]
    )
    read = ComputeTask(function=(tmp_path / "file").read_text, after=[write])
    single = ComputeTask(function=noop, after=read)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([single, read, write])
        await single
    assert read.return_value == "done\n"


async def test_dependencies_across_backends() -> None:
    threads = ConcurrentExecutionBackend(name="threads")
    processes = ConcurrentExecutionBackend(ProcessPoolExecutor(1), name="processes")
    a = ComputeTask(function=add, args=(1, 2), backend="threads")
    b = ComputeTask(function=add, args=(a, 3), backend="processes")
    c = ComputeTask(executable="/bin/echo", arguments=[b], backend="threads")
    d = ComputeTask(function=noop, after=[c], backend="noop")
    e = ComputeTask(function=str.strip, args=(c,), after=[d], backend="processes")
    async with Session([threads, processes, NoopExecutionBackend()]) as session:
        await session.submit_tasks([e, d, c, b, a])
        await e
    assert e.return_value == "6"
    assert [t.backend for t in (a, b, c, d, e)] == [
        "threads", "processes", "threads", "noop", "processes",
    ]  # fmt: skip


async def test_a_parent_that_has_ended_before() -> None:
    parent = ComputeTask(function=add, args=(3,))
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([parent])
        await parent
        child = ComputeTask(function=add, args=(parent, 1))
        await session.submit_tasks([child])
        await child
    assert child.return_value == 4


async def test_a_plain_dict_may_have_parents() -> None:
    parent = ComputeTask(function=add, args=(3,))
    child: dict[str, Any] = {"function": add, "args": (parent, 1), "after": [parent]}
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([child, parent])
        await session.wait_tasks([child])
    assert child["return_value"] == 4


async def test_a_plain_dict_may_be_a_parent() -> None:
    """In `after=`, once it is submitted; among arguments it is data."""
    parent: dict[str, Any] = {"function": fail}
    first = ComputeTask(function=noop, after=[parent])
    second: dict[str, Any] = {"function": noop, "after": parent}
    data = ComputeTask(function=collect, args=(parent,))
    never = ComputeTask(function=noop, after=[{"uid": "unheard-of"}])
    early = ComputeTask(function=noop, after=[{"function": noop}])
    async with Session([ConcurrentExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError, match="submit it before its child") as caught:
            await session.submit_tasks([parent, first, second, data, never, early])
        assert set(caught.value.errors) == {never.uid, early.uid}
        await session.wait_tasks([first, second, data])
    assert isinstance(first.exception, DependencyError)
    assert second["exception"].parent == parent["uid"]
    assert data.state == "DONE"


async def test_a_child_waits_for_the_last_of_its_parents() -> None:
    backend = ManualBackend()
    parents = [ComputeTask(function=noop) for _ in range(3)]
    child = ComputeTask(function=noop, after=parents)
    async with Session([backend]) as session:
        await session.submit_tasks([child, *parents])
        for parent in parents:
            assert child.state == "WAITING"
            assert len(backend.given) == 3
            backend.deliver(parent, "RUNNING")
            backend.deliver(parent, "DONE")
            await backend.heard()
        assert backend.given[3:] == [child]
        assert child.state == "SUBMITTED"
        backend.deliver(child, "DONE")
        await child


async def test_siblings_that_are_ready_together_are_handed_over_together() -> None:
    calls: list[int] = []

    class Counting(ManualBackend):
        async def _submit(self, tasks: list[Any]) -> None:
            calls.append(len(tasks))
            await super()._submit(tasks)

    backend = Counting()
    parent = ComputeTask(function=noop)
    children = [ComputeTask(function=noop, after=[parent]) for _ in range(500)]
    async with Session([backend]) as session:
        await session.submit_tasks([parent, *children])
        backend.deliver(parent, "DONE")
        await backend.handed(501)
        assert calls == [1, 500]
        backend.deliver_burst([(child, "DONE", None) for child in children])
        await session.wait_tasks(children)


async def test_a_long_chain() -> None:
    chain = links(3000)
    async with Session([NoopExecutionBackend()]) as session:
        await session.submit_tasks(chain)
        await session.wait_tasks(chain, timeout=60)
    assert {task.state for task in chain} == {"DONE"}


# ---------------------------------------------------------------------- failures go down the graph


async def test_a_failed_parent_fails_its_children_with_the_cause() -> None:
    parent = ComputeTask(function=fail, uid="parent")
    child = ComputeTask(function=add, args=(parent,), uid="child")
    grandchild = ComputeTask(function=noop, after=[child], uid="grandchild")
    aside = ComputeTask(function=noop)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([grandchild, child, parent, aside])
        await session.wait_tasks([grandchild, child, aside])
        with pytest.raises(DependencyError, match="as it was told to") as caught:
            await child
        with pytest.raises(DependencyError) as caught_below:
            await grandchild
        assert session.get_statistics()["counts"] == {"FAILED": 3, "DONE": 1}
    assert caught.value.cause is parent.exception
    assert (caught.value.uid, caught.value.parent) == ("child", "parent")
    assert caught_below.value.cause is caught.value
    assert caught_below.value.parent == "child"
    assert aside.state == "DONE"


async def test_a_failed_executable_is_the_cause() -> None:
    parent = ComputeTask(executable="/bin/sh", arguments=["-c", "echo oh >&2; exit 3"])
    child = ComputeTask(executable="/bin/echo", arguments=[parent])
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([parent, child])
        await session.wait_tasks([child])
    assert isinstance(child.exception, DependencyError)
    assert isinstance(child.exception.cause, TaskExecutionError)
    assert child.exception.cause.exit_code == 3


async def test_a_canceled_parent_fails_its_children() -> None:
    backend = ManualBackend()
    parent = ComputeTask(function=noop)
    child = ComputeTask(function=noop, after=[parent])
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child])
        assert await session.cancel(parent) is True
        await session.wait_tasks([child], timeout=60)
        assert backend.given == [parent]
    assert isinstance(child.exception, DependencyError)
    assert child.exception.cause is None
    assert "it was canceled" in str(child.exception)


async def test_a_child_is_not_retried_for_its_parents_failure() -> None:
    parent = ComputeTask(function=fail)
    child = ComputeTask(function=noop, after=[parent], retries=5)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([parent, child])
        await session.wait_tasks([child], timeout=60)
    assert isinstance(child.exception, DependencyError)


async def test_a_child_waits_for_the_retries_of_its_parent() -> None:
    backend = ManualBackend()
    parent = ComputeTask(function=noop, retries=1)
    child = ComputeTask(function=collect, args=(parent,))
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child])
        backend.deliver(parent, "FAILED", exception=OSError())
        await backend.handed(2)
        assert child.state == "WAITING"
        backend.deliver(parent, "DONE", return_value=1)
        await backend.handed(3)
        assert backend.given == [parent, parent, child]
        backend.deliver(child, "DONE")
        await child


async def test_a_childs_own_retries_and_timeout_start_with_it() -> None:
    backend = ManualBackend()
    parent = ComputeTask(function=noop)
    child = ComputeTask(function=collect, args=(parent,), retries=1, timeout=0.01)
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child])
        await asyncio.sleep(0.05)  # longer than the child's timeout, which has not begun
        assert child.state == "WAITING"
        backend.deliver(parent, "DONE", return_value="value")
        await backend.handed(2)
        backend.deliver(child, "RUNNING")
        await backend.handed(3)  # it took too long, and is run again
        backend.deliver(child, "RUNNING")
        await session.wait_tasks([child], timeout=60)
    assert isinstance(child.exception, TaskTimeoutError)


async def test_a_retry_has_its_parents_results_again() -> None:
    runs: list[int] = []

    def flaky(value: int) -> int:
        runs.append(value)
        if len(runs) < 3:
            raise OSError
        return value

    parent = ComputeTask(function=add, args=(5,))
    child = ComputeTask(function=flaky, args=(parent,), retries=2)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([parent, child])
        await child
    assert runs == [5, 5, 5]


async def test_a_waiting_child_can_be_canceled() -> None:
    backend = ManualBackend()
    parent = ComputeTask(function=noop)
    child = ComputeTask(function=noop, after=[parent])
    grandchild = ComputeTask(function=noop, after=[child])
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child, grandchild])
        assert await session.cancel(child) is True
        await session.wait_tasks([grandchild], timeout=60)
        assert isinstance(grandchild.exception, DependencyError)
        backend.deliver(parent, "DONE")
        await parent
        await backend.heard()
        assert backend.given == [parent]
    assert child.state == "CANCELED"


async def test_a_failure_runs_down_a_long_chain() -> None:
    root = ComputeTask(function=fail)
    chain = links(3000, after=root)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([root, *chain])
        await session.wait_tasks(chain, timeout=60)
    assert {task.state for task in chain} == {"FAILED"}
    assert isinstance(chain[-1].exception, DependencyError)


@pytest.mark.parametrize(
    "cross", [lambda thing: pickle.loads(pickle.dumps(thing)), copy.copy, copy.deepcopy]
)
async def test_what_is_left_of_a_long_chain_crosses(cross: Callable[[Any], Any]) -> None:
    importlib.import_module("distributed")  # from then on causes of exceptions are pickled too
    first, good = ComputeTask(function=fail), ComputeTask(function=add)
    bad = [first, *links(2_000, after=first)]
    sums = [good]
    for _ in range(1_000):
        sums.append(ComputeTask(function=add, args=(sums[-1], 1)))
        sums.append(ComputeTask(function=sum, args=([sums[-1], 1],)))
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([*bad, *sums])
        await session.wait_tasks([*bad, *sums])
    error = cross(bad[-1].exception)
    assert str(error) == str(bad[-1].exception)
    assert (error.parent, type(error.root)) == (bad[-2].uid, KeyError)
    assert (error.cause.uid, type(error.cause.root)) == (bad[-2].uid, KeyError)
    task, fine = cross(bad[-1]), cross(sums[-1])
    assert [parent.uid for parent in task.after] == [bad[-2].uid]
    assert str(task.exception) == str(error)
    parent = fine.args[0][0]
    assert (parent.uid, parent.state) == (sums[-2].uid, "DONE")
    assert (fine.result(), parent.result()) == (2_000, 1_999)


async def test_a_new_graph_crosses_whole() -> None:
    parent = ComputeTask(function=add, args=(1, 2))
    child = ComputeTask(function=add, args=(parent, 4), after=[parent])
    tasks = pickle.loads(pickle.dumps([parent, child]))
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks(tasks)
        await tasks[1]
    assert tasks[1].return_value == 7


async def test_the_message_of_a_deep_failure_is_short() -> None:
    root = ComputeTask(function=fail)
    chain = links(200, after=root)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([root, *chain])
        await session.wait_tasks(chain, timeout=60)
        stderr = chain[-1].stderr
    assert len(str(chain[-1].exception)) < 300
    assert "KeyError: 'as it was told to'" in str(chain[-1].exception)
    error = chain[-1].exception
    assert isinstance(error, DependencyError)
    assert error.root is root.exception
    assert stderr is not None


# ---------------------------------------------------------------------- graphs that are wrong


def ring(number: int, name: str = "r") -> list[ComputeTask]:
    tasks = [ComputeTask(function=noop, uid=f"{name}{n}") for n in range(number)]
    for place, task in enumerate(tasks):
        task.after = (tasks[place - 1],)
    return tasks


@pytest.mark.parametrize("number", [1, 2, 3, 50])
async def test_a_cycle_is_refused_and_named(number: int) -> None:
    tasks = ring(number)
    good = ComputeTask(function=noop)
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError, match="waits for itself") as caught:
            await session.submit_tasks([*tasks, good])
        assert set(caught.value.errors) == {task.uid for task in tasks}
        path = caught.value.errors["r0"].partition(": ")[2].split(" -> ")
        assert path[0] == path[-1]
        assert set(path) == {task.uid for task in tasks}
        assert (await good).state == "DONE"
        assert session.get_statistics()["counts"] == {"DONE": 1}
        for task in tasks:
            assert task.state == "NEW"
            with pytest.raises(RuntimeError, match="not submitted"):
                await task


async def test_what_hangs_on_a_cycle_is_refused_with_it() -> None:
    tasks = [*ring(3, "a"), *ring(2, "b")]
    child = ComputeTask(function=noop, after=[tasks[0]], uid="child")
    grandchild = ComputeTask(function=add, args=(child,), uid="grandchild")
    good = [ComputeTask(function=noop) for _ in range(2)]
    good[1].after = (good[0],)
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError) as caught:
            await session.submit_tasks([grandchild, child, *tasks, *good])
        assert set(caught.value.errors) == {t.uid for t in [*tasks, child, grandchild]}
        assert "depends on task 'a0', which was refused" in caught.value.errors["child"]
        await session.wait_tasks(good)


async def test_many_cycles_are_found_in_good_time() -> None:
    """In linear time, that is: quadratic, this would take minutes."""
    tasks = [task for number in range(10_000) for task in ring(2, f"{number}-")]
    behind = links(10_000, after=tasks[0])
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError) as caught:
            await session.submit_tasks([*reversed(behind), *tasks])
    assert len(caught.value.errors) == 30_000
    assert len(str(caught.value)) < 5000  # some, and how many more


async def test_a_parent_that_was_not_submitted() -> None:
    parent = ComputeTask(function=noop, uid="parent")
    child = ComputeTask(function=add, args=([parent],), uid="child")
    grandchild = ComputeTask(function=noop, after=[child], uid="grandchild")
    good = ComputeTask(function=noop)
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError) as caught:
            await session.submit_tasks([grandchild, child, good])
        assert "'parent', which is not in this session; submit it" in caught.value.errors["child"]
        assert set(caught.value.errors) == {"child", "grandchild"}
        assert (await good).state == "DONE"
        # Once it is, they can be submitted.
        await session.submit_tasks([grandchild, parent, child])
        await grandchild


async def test_a_parent_that_was_refused_in_the_same_batch() -> None:
    parent = ComputeTask(function=noop, uid="parent", backend="nowhere")
    child = ComputeTask(function=noop, after=[parent], uid="child")
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError) as caught:
            await session.submit_tasks([child, parent])
    assert set(caught.value.errors) == {"parent", "child"}


async def test_a_parent_of_another_session() -> None:
    """Its result is as good as any once it is there; but nobody here would hear of its end."""
    ended, running = ComputeTask(function=add, args=(2,)), ComputeTask(function=noop)
    threads, manual = ConcurrentExecutionBackend(), ManualBackend()
    async with Session([ConcurrentExecutionBackend()]) as here, Session([threads]) as there:
        there.add_backend(manual)
        running.backend = "manual"
        await there.submit_tasks([ended, running])
        await ended
        good = ComputeTask(function=add, args=(ended, 1))
        bad = ComputeTask(function=noop, after=[running])
        with pytest.raises(TaskValidationError, match="not in this session"):
            await here.submit_tasks([bad, good])
        assert (await good).return_value == 3


async def test_a_parent_that_was_forgotten() -> None:
    parent = ComputeTask(function=add, args=(2,))
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([parent])
        await parent
        session.forget([parent])
        child = ComputeTask(function=add, args=(parent, 1))
        await session.submit_tasks([child])
        assert (await child).return_value == 3


async def test_a_child_with_a_bad_backend_is_refused_at_submit() -> None:
    parent = ComputeTask(function=noop)
    child = ComputeTask(function=noop, after=[parent], backend="nowhere", uid="child")
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError, match="no backend 'nowhere'"):
            await session.submit_tasks([parent, child])
        await parent


# ---------------------------------------------------------------------- a graph with a meaning


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize("make", [set, frozenset, lambda tasks: Pair(*tasks)])
async def test_a_task_where_no_result_can_take_its_place_is_refused(
    make: Callable[[list[ComputeTask]], Any],
) -> None:
    """Results need not hash, and two equal ones would be one in a set; the others run."""
    one, two = ComputeTask(function=add, args=(1,)), ComputeTask(function=add, args=(1,))
    child = ComputeTask(function=len, args=(make([one, two]),))
    after = ComputeTask(function=noop, after=[one])
    async with Session([ConcurrentExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError, match="use a list, tuple or dict") as caught:
            await session.submit_tasks([one, two, child, after])
        assert set(caught.value.errors) == {child.uid}
        await asyncio.gather(one, two, after)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise AttributeError("no words")


def fail_without_words() -> None:
    raise Unspeakable


@pytest.mark.parametrize("ended", [False, True])
async def test_a_parent_whose_error_cannot_be_told(ended: bool) -> None:
    parent = ComputeTask(function=fail_without_words)
    child, other = ComputeTask(function=noop, after=[parent]), ComputeTask(function=noop)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([parent])
        if ended:
            await session.wait_tasks([parent])
        await session.submit_tasks([child, other])
        await session.wait_tasks([parent, child, other], timeout=30)
    assert isinstance(child.exception, DependencyError)
    assert child.exception.root is parent.exception
    assert "Unspeakable" in str(child.exception)
    assert other.state == "DONE"


async def test_arguments_that_went_bad_while_their_task_waited() -> None:
    """The child fails, and its own children with it; nothing waits for ever."""
    backend, parent, stray = ManualBackend(), ComputeTask(function=noop), ComputeTask(function=noop)
    child = ComputeTask(function=collect, args=[parent])
    last = ComputeTask(function=noop, after=[child])
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child, last])
        child.args.append({stray})  # type: ignore[attr-defined]
        backend.deliver(parent, "DONE")
        await session.wait_tasks([child, last], timeout=30)
    assert isinstance(child.exception, TaskValidationError)
    assert isinstance(last.exception, DependencyError)


@pytest.mark.parametrize("seed", range(3))
async def test_a_random_graph_computes_what_python_computes(seed: int) -> None:
    choose = random.Random(seed)
    expected: list[int] = []
    tasks: list[ComputeTask] = []
    for number in range(150):
        parents = choose.sample(range(number), min(number, choose.randrange(4)))
        expected.append((number + sum(expected[p] for p in parents)) % 10_007)
        tasks.append(ComputeTask(function=_modular, args=(number, [tasks[p] for p in parents])))
    shuffled = choose.sample(tasks, len(tasks))
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks(shuffled)
        await session.wait_tasks(tasks, timeout=60)
    assert [task.return_value for task in tasks] == expected


def _modular(number: int, values: list[int]) -> int:
    return (number + sum(values)) % 10_007
