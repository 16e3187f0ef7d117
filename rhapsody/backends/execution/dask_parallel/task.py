"""What the backend keeps of each task that Dask has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rhapsody.runtime.errors import BackendError
from rhapsody.runtime.task import Task

from .messages import CompletedKey
from .options import DASK_OPTIONS, worker_names
from .protocols import Future

__all__ = [
    "DaskTask",
    "GraphKey",
    "PendingTasks",
    "TaskResult",
    "with_descendants",
]


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
        return GraphKey(self.depth, function, repr(self.resources), repr(self.map_options()))

    def map_options(self) -> dict[str, Any]:
        """Return the options that `Client.map` takes as keyword arguments."""
        found = {
            name: self.options[name]
            for name in _GRAPH_OPTIONS
            if self.options.get(name) is not None
        }
        if isinstance(found.get("workers"), (int, tuple)):  # `Client.map` takes neither
            found["workers"] = worker_names(found["workers"])
        return found

    def cancel_timer(self) -> None:
        """Called when a worker may run it after all, or it has ended."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


# Options that hold for a whole graph; of the others each task has its own.
_GRAPH_OPTIONS = sorted(DASK_OPTIONS.keys() - {"key", "resources"})


class GraphKey(NamedTuple):
    """Tasks of equal ones can be submitted in one graph; sorted, parents come first."""

    depth: int
    function: str
    resources: str = ""
    options: str = ""


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
