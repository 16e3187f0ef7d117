"""The contract of an executor: how tasks of a backend get to processes, and what it reports.

Dragon is not called on the event loop's thread, because any call may block for good once a node is
lost. What an executor's threads learn they report, as one of the classes below.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .node.context import GRACE, RunContext
from .placement import NodeAllocator
from .task import DragonTask

__all__ = [
    "Executor",
    "ExecutorEvent",
    "ExecutorFailed",
    "ProcessesExited",
    "ProcessesStarted",
    "QueuedExecutor",
    "Report",
    "TaskCancelled",
    "TaskFailed",
    "TaskRefused",
]


class ProcessesStarted(NamedTuple):
    """The processes of a job run."""

    task: DragonTask


class ProcessesExited(NamedTuple):
    """The processes of a job have ended."""

    task: DragonTask
    exit_codes: list[int]  # in rank order


class TaskCancelled(NamedTuple):
    """A task was stopped, or kept from starting."""

    task: DragonTask


class TaskRefused(NamedTuple):
    """Dragon did not take a task."""

    task: DragonTask
    error: BaseException


class TaskFailed(NamedTuple):
    """Dragon took a task and reports an error that is not the task's own."""

    task: DragonTask
    error: BaseException


class ExecutorFailed(NamedTuple):
    """The executor cannot go on."""

    error: BaseException


TaskEvent = ProcessesStarted | ProcessesExited | TaskCancelled | TaskRefused | TaskFailed
ExecutorEvent = TaskEvent | ExecutorFailed
# Called on any thread of an executor; the first argument is the executor.
Report = Callable[["Executor", ExecutorEvent], None]


class Executor(ABC):
    """Brings tasks to processes.

    Args:
        number: by which tasks, workers and messages name it; unique in its backend.
        context: of the backend.
        report: called for each event, on any thread.

    Attributes:
        workers: how many tasks run at once, by host; known when it is open.
    """

    def __init__(self, number: int, context: RunContext, report: Report) -> None:
        self.number = number
        self.workers: dict[str, int] = {}
        self._context = context
        self._report = report
        self._allocator: NodeAllocator
        self._closing = False
        self._withdrawn: set[DragonTask] = set()

    @abstractmethod
    def open(self, allocator: NodeAllocator) -> None:
        """Get ready to run tasks on these nodes. Blocks."""

    @abstractmethod
    def submit(self, tasks: Sequence[DragonTask]) -> None:
        """Take tasks; does not block."""

    @abstractmethod
    def withdraw(self, task: DragonTask) -> bool:
        """Keep a task from being given to Dragon; False where it is there already. May block."""

    def drain(self) -> list[DragonTask]:
        """Give back the tasks that wait here, if any do; Batch has its own queue. May block."""
        return []

    @abstractmethod
    def close(self) -> None:
        """End everything that runs. Blocks, for good where a node is lost."""

    @abstractmethod
    def abandon(self) -> None:
        """Leave everything as it is, without a call of Dragon that could block."""

    def cancel_open(self) -> None:
        """End it although `open` has not returned; does not block."""
        self.abandon()


class QueuedExecutor(Executor):
    """An executor whose tasks wait in order, and one thread that starts them.

    It has one thread alone because Dragon's global services, in 0.15.0, lose an answer now and then
    where several threads wait for one.
    """

    def __init__(self, number: int, context: RunContext, report: Report) -> None:
        super().__init__(number, context, report)
        self._changed = threading.Condition()
        self._waiting: deque[DragonTask] = deque()
        self._thread = threading.Thread(target=self._run, daemon=True, name="dragon-executor")

    @abstractmethod
    def hosts_of(self, task: DragonTask) -> set[str]:
        """Return the nodes that a task was sent to."""

    @abstractmethod
    def _step(self) -> None:
        """Wait until there is something to do, and do it; return at once when closing."""

    def submit(self, tasks: Sequence[DragonTask]) -> None:
        """Take tasks; does not block."""
        with self._changed:
            self._waiting += tasks
            self._changed.notify_all()

    def abandon(self) -> None:
        """Let the thread end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _stop_thread(self) -> None:
        self.abandon()
        if self._thread.is_alive():
            self._thread.join(GRACE)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._step()
        except Exception as error:  # Dragon's own, of any class
            if not self._closing:
                self._report(self, ExecutorFailed(error))
