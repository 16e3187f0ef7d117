"""Dependencies between tasks: who waits for whom, and what takes a parent's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from typing import Any

from rhapsody.runtime.arguments import CONTAINERS, map_elements
from rhapsody.runtime.errors import TaskValidationError

from .task import BaseTask, ComputeTask

__all__ = ["bind", "find_parents", "hold_no_tasks", "parents_first", "parents_of"]

_ATOMS = frozenset({int, str, float, bool, bytes, complex, type(None)})

# Of these only the open ones: results need not hash, and two of them may be equal, so that a set of
# them may be none, or smaller; and how a class of its own is made, is not known.
_CONTAINERS = (*CONTAINERS, set, frozenset)


def hold_no_tasks(values: Iterable[Any]) -> bool:
    """Whether it is plain at first sight that no task is among some arguments."""
    return _ATOMS.issuperset(map(type, values))


def parents_of(task: BaseTask) -> list[BaseTask]:
    """Return the tasks that must end before this one: `after`, and those among its arguments.

    Arguments are searched at the top, and one level into lists, tuples and dicts.

    Raises:
        TaskValidationError: a task stands where no result can take its place.
    """
    parents = list(task.after)
    if isinstance(task, ComputeTask):
        for value in (*task.args, *task._kwargs.values(), *task.get("arguments")):
            if isinstance(value, BaseTask):
                parents.append(value)
            elif isinstance(value, _CONTAINERS):
                inside = value.values() if isinstance(value, dict) else value
                found = [inner for inner in inside if isinstance(inner, BaseTask)]
                if found and type(value) not in CONTAINERS:
                    raise TaskValidationError(
                        f"task '{task.uid}': task '{found[0].uid}' is in a {type(value).__name__},"
                        " where its result cannot take its place; use a list, tuple or dict"
                    )
                parents += found
    return parents


def find_parents(task: BaseTask, known: Mapping[str, BaseTask]) -> None:
    """Put the tasks of plain dicts in the places of the dicts in `after`.

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
    """Keep the arguments for the backend with the results of DONE parents in the parents' places.

    The author's own arguments stay as they are.
    """
    if isinstance(task, ComputeTask):
        task._bound = {
            "args": tuple(map_elements(value, _result) for value in task.args),
            "kwargs": {name: map_elements(value, _result) for name, value in task._kwargs.items()},
            "arguments": [map_elements(value, _result) for value in task.get("arguments")],
        }


def _result(value: Any) -> Any:
    # A parent that still runs stays in its place, for an engine that knows dependencies itself.
    return value.result() if isinstance(value, BaseTask) and value.done() else value


def parents_first(tasks: Sequence[BaseTask]) -> tuple[list[BaseTask], dict[str, str]]:
    """Return tasks in an order in which parents stand before their children.

    Those behind a cycle come last. Tasks in a cycle are left out, and returned by uid with the
    cycle in words.
    """
    places = {task.uid: place for place, task in enumerate(tasks)}
    graph: dict[str, list[str]] = {}
    sorted_already = True
    for place, task in enumerate(tasks):
        graph[task.uid] = above = [p.uid for p in parents_of(task) if p.uid in places]
        sorted_already = sorted_already and all(places[uid] < place for uid in above)
    if sorted_already:
        return list(tasks), {}
    sorter = TopologicalSorter(graph)
    with suppress(CycleError):  # what is in no cycle, and behind none, is still to be had
        sorter.prepare()
    order: list[str] = []
    while ready := sorter.get_ready():
        order += ready
        sorter.done(*ready)
    behind, cycles = _stuck(graph, set(order)) if len(order) < len(graph) else ([], {})
    return [tasks[places[uid]] for uid in (*order, *behind)], cycles


def _stuck(graph: Mapping[str, list[str]], free: set[str]) -> tuple[list[str], dict[str, str]]:
    """Return those behind cycles, nearest first, and those in cycles with the cycle in words.

    Each that is not free has a parent that is not, so that a walk upwards ends in a cycle. One
    walk from each, only where none has been before: linear in their number.
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
