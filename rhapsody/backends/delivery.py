"""Delivery of an engine's events: from any thread to the event loop, and one end for each task."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast, final

from rhapsody.runtime.errors import BackendError
from rhapsody.runtime.task import Event, EventTuple, Fields, Task, kind_of
from rhapsody.runtime.text import safe_str

from .constants import DONE, TERMINAL_STATES

__all__ = ["Delivery", "Listener"]

logger = logging.getLogger(__name__)

#: An `Event`, or its fields.
Reported = tuple[Task | str, str, Fields | None]
#: Called on the loop's thread with events, in their order.
Listener = Callable[[Sequence[EventTuple]], None]

# Events taken per turn of the loop: a turn of about 2 ms, so that a burst of any size leaves the
# loop free for others in between.
_BURST = 1024


@final
class _SameState(NamedTuple):
    """One state of several tasks, without results."""

    tasks: Sequence[Task]
    state: str


class Delivery:
    """Takes an engine's reports to a listener and a callback; a part of `BaseExecutionBackend`.

    Reports of tasks that are not in flight, late and duplicate ones for example, are dropped and
    counted in `dropped_events`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dropped_events = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: dict[str, Task] = {}  # tasks in flight, by uid
        self._reports: deque[Reported | _SameState] = deque()
        self._wake_pending = False
        self._callback: Callable[[Any, str], object] | None = None
        self._listener: Listener = _write_results

    # ------------------------------------------------------------------ from any thread

    def deliver(self, task: Task | str, state: str, **fields: Any) -> None:
        """Report the state of a task (or of its uid) with its results. Safe from any thread."""
        self.deliver_burst((Event(task, state, fields or None),))

    def deliver_burst(self, events: Iterable[Reported]) -> None:
        """Report many states at once. Safe from any thread; costs at most one wake of the loop."""
        self._reports.extend(events)
        if not self._wake_pending:
            self._wake()

    def deliver_all(self, tasks: Sequence[Task], state: str) -> None:
        """Report one state of many tasks, without results. Safe from any thread."""
        for start in range(0, len(tasks), _BURST):
            self._reports.append(_SameState(tasks[start : start + _BURST], state))
        if not self._wake_pending:
            self._wake()

    def _wake(self) -> None:
        self._wake_pending = True
        if self._loop is None:
            self._drop_all()
            raise BackendError(f"backend '{self.name}' reports before it is started")
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # the loop is closed, so that nobody can receive them
            self._drop_all()

    def _drop_all(self) -> None:
        self._wake_pending = False
        self.dropped_events += len(self._reports)
        self._reports.clear()

    # ------------------------------------------------------------------ on the loop's thread

    def holds(self, task: Task) -> bool:
        """Whether a task was handed over, and no end of it has been delivered yet."""
        return self._live.get(task["uid"]) is task

    def abandon(self, uid: str) -> None:
        """Take no more events for a task: its owner has settled it otherwise."""
        self._live.pop(uid, None)

    def _flush(self) -> None:
        """Deliver what has been reported, now."""
        while self._reports:
            self._drain()

    def _drain(self) -> None:
        # First the flag, then the reports: one that comes in between causes a wake that finds none.
        self._wake_pending = False
        reports, live = self._reports, self._live
        burst: list[Reported] = []
        taken = 0
        while reports and taken < _BURST:
            report = reports.popleft()
            if type(report) is _SameState:
                taken += len(report.tasks)
                burst += self._accept_all(report)
                continue
            taken += 1
            named, state, fields = report
            # type(), since isinstance() takes 45 ns for a task and this 20, of 4 us for all of it.
            kind = type(named)
            uid: str = named if kind is str else named["uid"] if kind is dict else named.uid  # type: ignore[assignment,index,union-attr]
            task = live.pop(uid, None) if state in TERMINAL_STATES else live.get(uid)
            if task is None:
                self.dropped_events += 1
            else:
                burst.append(report if task is named else (task, state, fields))
        if reports and not self._wake_pending:
            self._wake()
        if burst:
            events = cast("list[EventTuple]", burst)  # each with the task itself by now
            try:
                self._listener(events)
            finally:
                if self._callback is not None:
                    self._call_back(events)

    def _accept_all(self, report: _SameState) -> list[EventTuple]:
        """Return the events of those tasks that are in flight."""
        tasks, state = report
        find = self._live.pop if state in TERMINAL_STATES else self._live.get
        burst: list[EventTuple] = [
            (found, state, None)
            for task in tasks
            if (found := find(task["uid"] if type(task) is dict else task.uid, None))  # type: ignore[union-attr]
            is not None
        ]
        self.dropped_events += len(tasks) - len(burst)
        return burst

    def _call_back(self, burst: Sequence[EventTuple]) -> None:
        callback = self._callback
        assert callback is not None
        for task, state, _ in burst:
            try:
                callback(task, state)
            except Exception:  # the author's code; the tasks after this one are reported too
                logger.exception("callback of backend '%s' failed for %s", self.name, task["uid"])


# ---------------------------------------------------------------------- without a session

# Fields that are not results: when the task ran.
_TIMES = frozenset({"started", "ended"})
# What frameworks read from a task that has ended, whatever its kind.
_RESULTS = ("return_value", "stdout", "stderr", "exit_code", "exception")


def _write_results(burst: Sequence[EventTuple]) -> None:
    """Listener where there is no session: write states and results into the tasks."""
    for task, state, fields in burst:
        try:
            _write(task, state, fields or {})
        except Exception:  # of a mapping that is not ours
            logger.exception("task '%s' cannot be written to", task["uid"])


def _write(task: Task, state: str, fields: Fields) -> None:
    results = {name: value for name, value in fields.items() if name not in _TIMES}
    if isinstance(task, dict) and state in TERMINAL_STATES:
        if kind_of(task) == "function":
            results["exit_code"] = 0 if state == DONE else 1
            if state == DONE:
                results["stdout"] = safe_str(results.get("return_value"))
        results = {**dict.fromkeys(_RESULTS), **results}
    task.update(results)
    task["state"] = state
