"""What the backend keeps of each task that Dask has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rhapsody.runtime.arguments import Task, kind_of
from rhapsody.runtime.errors import BackendError, TaskValidationError

from .messages import CompletedKey
from .protocols import Future

__all__ = [
    "DASK_KEYS",
    "PROGRAM_KEYS",
    "DaskTask",
    "GraphKey",
    "PendingTasks",
    "TaskResult",
    "check_options",
    "with_descendants",
]

#: options of executables; the others are Dask's own, and for every task
PROGRAM_KEYS = frozenset({"cwd", "env", "env_replace", "shell", "stdin"})
DASK_KEYS = frozenset({"resources", "priority", "retries", "workers", "allow_other_workers", "key"})


class DaskTask:
    """What the backend keeps of a task, from its submission until its owner has been told its end.

    Args:
        submitted: the task as the backend was given it.
        options: its `task_backend_specific_kwargs`.
    """

    __slots__ = (
        "captured", "children", "deferred", "depth", "failure", "function", "future", "key",
        "options", "parents", "payload", "resources", "seconds", "stopping", "submitted", "timer",
        "uid", "worker",
    )  # fmt: skip

    def __init__(self, submitted: Task, options: Mapping[str, Any]) -> None:
        self.submitted = submitted
        self.uid: str = submitted["uid"]
        self.options = options
        self.key = ""
        self.resources: dict[str, float] = {}  # that it requests of its worker
        self.function: Callable[..., Any] | None = None  # of `worker_plugin`, which runs it
        self.payload: object = None  # the argument of that; None when Dask has it
        self.captured = False  # whether `capture_stdio` was asked for
        self.future: Future | None = None
        self.parents: list[DaskTask] = []  # whose results Dask passes to it
        self.children: list[DaskTask] = []
        self.depth = 0  # greater than that of each parent
        self.worker: str | None = None  # the address of the one that started it last
        self.seconds = 0.0  # for which it was computed
        self.failure: BaseException | None = None
        self.timer: asyncio.TimerHandle | None = None  # until it is given up for want of a worker
        self.stopping = False  # workers have been asked to stop it
        self.deferred: CompletedKey | None = None  # arrived while it was being stopped

    def is_stopping(self) -> bool:
        """Whether workers have been asked to stop it, or a task that it depends on."""
        seen = {self}
        queue = [self]
        while queue:
            task = queue.pop()
            if task.stopping:
                return True
            queue += [parent for parent in task.parents if parent not in seen]
            seen.update(task.parents)
        return False

    def graph_key(self) -> GraphKey:
        """Return what tasks must have in common to be submitted in one graph."""
        function = self.function.__name__ if self.function else ""
        if not self.options and not self.resources:
            return GraphKey(self.depth, function)
        options = {
            name: repr(self.options[name]) for name in self.options if name in _GRAPH_OPTIONS
        }
        return GraphKey(self.depth, function, repr(self.resources), tuple(sorted(options.items())))

    def map_options(self) -> dict[str, Any]:
        """Return the options that `Client.map` takes as keyword arguments."""
        found = {
            name: self.options[name]
            for name in sorted(_GRAPH_OPTIONS)
            if self.options.get(name) is not None
        }
        if isinstance(found.get("workers"), (int, tuple)):  # `Client.map` takes neither
            found["workers"] = _names_of(found["workers"])
        return found

    def cancel_timer(self) -> None:
        """Called when a worker may run it after all, or it has ended."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


# Options that hold for a whole graph.
_GRAPH_OPTIONS = frozenset({"priority", "retries", "workers", "allow_other_workers"})


class GraphKey(NamedTuple):
    """Tasks of equal ones can be submitted in one graph; sorted, parents come first."""

    depth: int
    function: str
    resources: str = ""
    options: tuple[tuple[str, str], ...] = ()


class TaskResult(NamedTuple):
    """A task, its terminal state, and its result fields."""

    task: DaskTask
    state: str
    fields: dict[str, Any] | None = None


class PendingTasks:
    """The tasks that have not been settled, by Dask's key. On the client's loop.

    Args:
        report: called with the results of tasks that were settled.
    """

    def __init__(self, report: Callable[[list[TaskResult]], None]) -> None:
        self._report = report
        self._by_key: dict[str, DaskTask] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def add(self, task: DaskTask) -> None:
        """Take in a task that Dask is about to be given."""
        self._by_key[task.key] = task

    def get(self, key: str) -> DaskTask | None:
        """Return the task of a key, if it has not been settled."""
        return self._by_key.get(key)

    def discard(self, task: DaskTask) -> bool:
        """Remove a task without a result; False if it was not there, but settled already."""
        return self._by_key.pop(task.key, None) is not None

    def settle(self, results: Iterable[TaskResult]) -> None:
        """Report results, each for the first time that its task is settled."""
        self.report([result for result in results if self.discard(result.task)])

    def report(self, results: list[TaskResult]) -> None:
        """Report results of tasks that have been discarded for it."""
        for result in results:
            result.task.cancel_timer()
        if results:
            self._report(results)

    def fail_all(self, error: BackendError) -> None:
        """Settle all tasks with one error."""
        self.settle([TaskResult(t, "FAILED", {"exception": error}) for t in self._by_key.values()])


def with_descendants(tasks: Iterable[DaskTask]) -> list[DaskTask]:
    """Return tasks and all that depend on them, each once, parents first."""
    found: dict[DaskTask, None] = dict.fromkeys(tasks)
    queue = list(found)
    while queue:
        for child in queue.pop().children:
            if child not in found:
                found[child] = None
                queue.append(child)
    return sorted(found, key=lambda task: task.depth)


# ---------------------------------------------------------------------- options

_NUMBER = (int, float)
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "resources": ((Mapping,), "a dict of numbers, such as {'GPU': 1}"),
    "priority": (_NUMBER, "a number; higher runs earlier"),
    "retries": ((int,), "how many more times to run it"),
    "workers": (
        (str, int, list, tuple, set),
        "an address or name of a worker, or a list of them",
    ),
    "allow_other_workers": ((bool,), "True or False"),
    "key": ((str,), "a text that UTF-8 can hold"),
    "cwd": ((str, os.PathLike), "the path of a folder"),
    "env": ((Mapping,), "a dict of texts"),
    "env_replace": ((bool,), "True or False"),
    "shell": ((bool,), "True or False"),
    "stdin": ((str, bytes, Path), "a text or bytes, or the pathlib.Path of a file"),
}


def _is_text(value: object) -> bool:
    """Whether it can be a key, or stand in a message: anything else breaks the connection."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a file name that is no UTF-8
        return False
    return True


def _names_of(workers: Any) -> list[Any]:
    return [workers] if isinstance(workers, (str, int)) else list(workers)


def _are_workers(value: Any) -> bool:
    # Those of a `LocalCluster` are named by whole numbers.
    return all(type(name) is int or _is_text(name) for name in _names_of(value))


#: what else must hold of a value that is of the right type
_SENSIBLE: dict[str, Callable[[Any], bool]] = {
    "retries": lambda value: value >= 0,
    "workers": _are_workers,
    "key": _is_text,
}


def check_options(task: Task, options: Mapping[str, Any]) -> None:
    """Refuse options of wrong types, or for the wrong kind of task.

    Raises:
        TaskValidationError: says which, and what is accepted.
    """
    uid = task["uid"]
    for name, value in options.items():
        kinds, words = _KINDS[name]
        sensible = _SENSIBLE.get(name)
        if value is not None and not (
            isinstance(value, kinds) and (sensible is None or sensible(value))
        ):
            raise TaskValidationError(f"task '{uid}': {name} must be {words}, not {value!r}")
    for name, value in (options.get("resources") or {}).items():
        if not isinstance(name, str) or not isinstance(value, _NUMBER) or value < 0:
            raise TaskValidationError(
                f"task '{uid}': resources must map names to numbers, not {name!r}: {value!r}"
            )
    for name, value in (options.get("env") or {}).items():
        if not isinstance(name, str) or not isinstance(value, str) or "=" in name:
            raise TaskValidationError(
                f"task '{uid}': env must map texts to texts, not {name!r}: {value!r}"
            )
    if options.get("allow_other_workers") and options.get("workers") is None:
        raise TaskValidationError(f"task '{uid}': allow_other_workers needs workers")
    if kind_of(task) == "function":
        _check_function(uid, task.get("resources"), options)


def _check_function(uid: str, need: Any, options: Mapping[str, Any]) -> None:
    if wrong := PROGRAM_KEYS & options.keys():
        raise TaskValidationError(
            f"task '{uid}': {', '.join(sorted(wrong))} in task_backend_specific_kwargs are for"
            f" executables; a function takes {', '.join(sorted(DASK_KEYS))}"
        )
    if need is None:
        return
    if need.ranks > 1:
        raise TaskValidationError(
            f"task '{uid}': Dask runs a function as one rank, not {need.ranks}; make it an"
            " executable, or use a backend with MPI functions"
        )
    if need.env or need.cwd:
        raise TaskValidationError(
            f"task '{uid}': env and cwd belong to a process, and a Dask worker runs functions on"
            " its threads; set them for the workers, or make it an executable"
        )
