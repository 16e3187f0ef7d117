"""Dependencies between tasks: which tasks wait for which, and the results that replace parents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from typing import Any

from rhapsody.runtime.arguments import CONTAINERS, elements, map_elements
from rhapsody.runtime.errors import TaskValidationError
from rhapsody.runtime.task import BoundInputs

from .task import BaseTask, ComputeTask

__all__ = ["bind", "find_parents", "hold_no_tasks", "parents_first", "parents_of"]

_ATOMS = frozenset({int, str, float, bool, bytes, complex, type(None)})

# Results replace tasks only in CONTAINERS: in a set they may not hash, or collapse where equal.
_CONTAINERS = (*CONTAINERS, set, frozenset)


def hold_no_tasks(values: Iterable[Any]) -> bool:
    """Whether the types of some arguments exclude that a task is among them."""
    return _ATOMS.issuperset(map(type, values))


def parents_of(task: BaseTask) -> list[BaseTask]:
    """Return the tasks that must end before this one: `after`, and those among its arguments.

    Arguments are searched at the top, and one level into lists, tuples and dicts.

    Raises:
        TaskValidationError: a task is in a container in which no result can replace it.
    """
    parents = list(task.after)
    if isinstance(task, ComputeTask):
        for value in (*task.args, *task._kwargs.values(), *task.get("arguments")):
            _check_container(task, value)
            parents += [inner for inner in elements(value) if isinstance(inner, BaseTask)]
    return parents


def _check_container(task: BaseTask, value: Any) -> None:
    """Raise for an argument in which a task is where its result cannot replace it."""
    if not isinstance(value, _CONTAINERS) or type(value) in CONTAINERS:
        return
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, BaseTask):
            raise TaskValidationError(
                f"task '{task.uid}': task '{inner.uid}' is in a {type(value).__name__},"
                " where its result cannot replace it; use a list, tuple or dict"
            )


def find_parents(task: BaseTask, known: Mapping[str, BaseTask]) -> None:
    """Replace plain dicts in `after` by the tasks that were made from them.

    Raises:
        TaskValidationError: a dict was not submitted.
    """
    given: tuple[Any, ...] = task.after
    if all(isinstance(parent, BaseTask) for parent in given):
        return
    parents = []
    for parent in given:
        found = parent
        if not isinstance(parent, BaseTask):
            uid = parent.get("uid")
            found = known.get(uid) if isinstance(uid, str) else None
            if found is None or found._submitted_object() is not parent:
                raise TaskValidationError(
                    f"task '{task.uid}': a dict in after= must have been submitted, and"
                    f" {'the one given was' if uid is None else f'{uid!r} was'} not; submit it"
                    " before its child"
                )
        parents.append(found)
    task.after = tuple(parents)


def bind(task: BaseTask) -> None:
    """Keep the arguments for the backend, with the results of ended parents in place of these.

    The author's own arguments stay as they are.

    Raises:
        TaskValidationError: as `parents_of`; the author may have changed the arguments meanwhile.
    """

    def bound(value: Any) -> Any:
        _check_container(task, value)
        return map_elements(value, _result)

    if isinstance(task, ComputeTask):
        task._bound = BoundInputs(
            args=tuple(map(bound, task.args)),
            kwargs={name: bound(value) for name, value in task._kwargs.items()},
            arguments=list(map(bound, task.get("arguments"))),
        )


def _result(value: Any) -> Any:
    # A parent that still runs is left, for an engine that knows dependencies itself.
    return value.result() if isinstance(value, BaseTask) and value.done() else value


def parents_first(
    parents: Mapping[BaseTask, Sequence[BaseTask]],
) -> tuple[list[BaseTask], dict[str, str]]:
    """Order tasks, given with their parents, so that parents come before their children.

    Tasks that wait for a cycle come last. Those in a cycle are left out, and returned by uid with a
    description of the cycle.
    """
    tasks = {task.uid: task for task in parents}
    graph = {
        task.uid: [parent.uid for parent in above if parent.uid in tasks]
        for task, above in parents.items()
    }
    places = {uid: place for place, uid in enumerate(graph)}
    if all(places[parent] < places[uid] for uid, above in graph.items() for parent in above):
        return list(parents), {}
    sorter = TopologicalSorter(graph)
    with suppress(CycleError):  # tasks outside cycles, and not behind one, are ordered all the same
        sorter.prepare()
    order: list[str] = []
    while ready := sorter.get_ready():
        order += ready
        sorter.done(*ready)
    behind, cycles = _stuck(graph, set(order)) if len(order) < len(graph) else ([], {})
    return [tasks[uid] for uid in (*order, *behind)], cycles


def _stuck(graph: Mapping[str, list[str]], free: set[str]) -> tuple[list[str], dict[str, str]]:
    """Return the tasks that wait for cycles, nearest first, and a description of each's cycle.

    `free` are those that wait for none. Each other one has a parent that is not free either, so
    that a walk from child to parent ends in a cycle. One walk from each, as far as no walk has been
    before: linear in their number.
    """
    behind: list[str] = []
    cycles: dict[str, str] = {}
    seen: set[str] = set()
    for start in graph:
        path: dict[str, None] = {}
        uid = start
        while uid not in free and uid not in seen and uid not in path:
            path[uid] = None
            uid = next(parent for parent in graph[uid] if parent not in free)
        walked = list(path)
        if uid in path:
            ring = walked[walked.index(uid) :]
            cycles.update(dict.fromkeys(ring, " -> ".join([*ring, uid])))
        behind += [uid for uid in reversed(walked) if uid not in cycles]
        seen.update(walked)
    return behind, cycles
