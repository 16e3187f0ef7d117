"""The way of tasks from their submit to their end: hand over, wait for parents, settle, run again.

Everything here runs on the thread of one event loop. Most tasks have no retries, timeout or
relatives, and pass without a record of their own; the others have a `_Record` while in flight.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rhapsody.backends.base import BaseExecutionBackend, Event
from rhapsody.runtime.errors import (
    BackendError,
    DependencyError,
    ResourceError,
    RhapsodyError,
    SessionError,
    TaskTimeoutError,
    TaskValidationError,
)
from rhapsody.runtime.text import describe_error

from .dependencies import bind, parents_first, parents_of
from .dispatch import Dispatcher
from .routing import parent_refused
from .task import TERMINAL, BaseTask

__all__ = ["CHUNK", "TaskManager", "timeout_of"]

logger = logging.getLogger("rhapsody.session")

CHUNK = 1024  # tasks taken at once
# A retry cannot help against these.
_FINAL_ERRORS = (TaskValidationError, ResourceError, DependencyError, SessionError)


def timeout_of(task: BaseTask) -> float | None:
    """Seconds that a task may run: its timeout, else the walltime of its resources."""
    if task.timeout is None and task.resources is not None:
        return task.resources.walltime_seconds
    return task.timeout


class _Record:
    """What the session keeps of a task in flight that has retries, a timeout or relatives."""

    __slots__ = ("canceled", "children", "expired", "retries", "timer", "waiting")

    def __init__(self) -> None:
        self.retries = 0
        self.timer: asyncio.TimerHandle | None = None
        self.expired = False  # its time is up, and its backend was told to stop it
        self.canceled = False  # the author wants it stopped
        self.waiting: set[str] = set()  # uids of the parents that have not ended
        self.children: list[BaseTask] = []


class TaskManager:
    """Settles each task of a session exactly once.

    Args:
        owner: uid of the session.
        folder: returns the session's own folder.
    """

    def __init__(self, owner: str, folder: Callable[[], str]) -> None:
        self.owner = owner
        self.folder = folder
        self.backends: dict[str, BaseExecutionBackend] = {}
        self.tasks: dict[str, BaseTask] = {}
        self.closing = False
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first submit
        self.admitted = 0
        self.dropped_events = 0
        self._records: dict[str, _Record] = {}
        self._ready: list[BaseTask] = []
        self._background: set[asyncio.Task[Any]] = set()
        self._counts: dict[str, Counter[str]] = {}
        self._times = [0.0, 0.0, 0.0]  # seconds, summed: total, queue, execution
        self.dispatcher = Dispatcher(self)

    def add(self, backend: BaseExecutionBackend) -> None:
        """Take a backend in, and listen to it."""
        backend.attach(self.owner, self.settle, self.folder)
        self.backends[backend.name] = backend
        # Every key from the start: other threads read it, and it must not grow under them.
        self._counts[backend.name] = Counter(dict.fromkeys(("RUNNING", *TERMINAL), 0))

    def enter(self) -> None:
        """Make the running loop the session's, or see that it is.

        Raises:
            SessionError: it is another one, in which nobody would hear of the tasks.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise SessionError(
                f"session '{self.owner}' was used in another event loop; make a new session, with"
                " new backends, in each asyncio.run()"
            )

    def record(self, task: BaseTask) -> _Record:
        """Return a task's record, made when it is first needed."""
        return self._records.setdefault(task.uid, _Record())

    # ------------------------------------------------------------------ dependencies

    async def relate(
        self,
        tasks: list[BaseTask],
        refused: dict[str, RhapsodyError],
        under_way: list[asyncio.Task[None]],
    ) -> None:
        """Let children wait for their parents; refuse those in a cycle or without a parent here."""
        order, cycles = parents_first(tasks)
        bad: dict[str, RhapsodyError] = {
            uid: TaskValidationError(f"task '{uid}' waits for itself: {cycle}")
            for uid, cycle in cycles.items()
        }
        groups: dict[str, list[BaseTask]] = {}
        for place, task in enumerate(order, start=1):
            parents = parents_of(task)
            lost = [p for p in parents if not p.done() and self.tasks.get(p.uid) is not p]
            if lost := lost or [p for p in parents if p.uid in bad]:
                bad[task.uid] = parent_refused(
                    task, lost[0], bad.get(lost[0].uid, refused.get(lost[0].uid))
                )
            elif not task.done():  # the session may have been closed meanwhile
                self._place(task, parents, groups)
            if not place % CHUNK:
                await self.dispatcher.dispatch(groups, under_way)
                groups = {}
                await asyncio.sleep(0)
        for uid in bad:
            task = self.tasks.pop(uid)
            task._future = None
            self._records.pop(uid, None)
        self.admitted -= len(bad)
        refused.update(bad)
        await self.dispatcher.dispatch(groups, under_way)

    def _place(
        self, task: BaseTask, parents: list[BaseTask], groups: dict[str, list[BaseTask]]
    ) -> None:
        """Hand a child over if its parents allow it; else let it wait for them here."""
        assert task.backend is not None
        backend = self.backends[task.backend]
        waiting = [parent for parent in dict.fromkeys(parents) if not parent.done()]
        if waiting and not (
            backend.native_dependencies and all(self._is_with(p, task.backend) for p in waiting)
        ):
            task.state = "WAITING"
            self.record(task).waiting = {parent.uid for parent in waiting}
            for parent in waiting:
                self.record(parent).children.append(task)
        elif self._inherit(task):
            task.state = "SUBMITTED"
            groups.setdefault(task.backend, []).append(task)

    def _is_with(self, task: BaseTask, backend: str) -> bool:
        """Whether an engine has a task, and its first end is the last: it is not run again here."""
        record = self._records.get(task.uid)
        return (
            task.backend == backend
            and task.state in ("SUBMITTED", "RUNNING")
            and (record is None or not record.retries)
        )

    def _inherit(self, task: BaseTask) -> bool:
        """Take the parents' results in, or fail for the first of them that did not end DONE."""
        error: RhapsodyError | None = None
        try:
            for parent in parents_of(task):
                if parent.done() and parent.state != "DONE":
                    error = DependencyError(task.uid, parent.uid, parent.exception)
                    break
            else:
                bind(task)
        except Exception as why:  # an author's containers; what else waits must not wait for ever
            error = TaskValidationError(
                f"task '{task.uid}': its parents' results cannot take their places: {describe_error(why)}"
            )
            error.__cause__ = why
        if error is not None:
            self.settle([(task, "FAILED", {"exception": error})])
        return error is None

    def _release(self, task: BaseTask) -> None:
        """All parents have ended: hand the task over."""
        if not task.done() and self._inherit(task):
            self._send(task)

    def _send(self, task: BaseTask) -> None:
        """Hand a task over in the background, together with others that are ready by then."""
        self._ready.append(task)
        if len(self._ready) == 1:
            self.spawn(self._send_ready())

    async def _send_ready(self) -> None:
        ready, self._ready = self._ready, []
        groups: dict[str, list[BaseTask]] = {}
        for task in ready:
            if not task.done():
                task.state = "SUBMITTED" if task.state == "WAITING" else task.state
                groups.setdefault(task.backend or "", []).append(task)
        await self.dispatcher.dispatch(groups, [])

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something in the background; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ------------------------------------------------------------------ settle

    def settle(self, burst: Sequence[Event]) -> None:
        """Take events in: state, result fields, future, dependents - in that order."""
        now = time.monotonic()
        records = self._records
        plain, waited = 0, 0.0
        for task, state, fields in burst:
            try:
                if (
                    state == "DONE"
                    and fields is None
                    and task.state == "SUBMITTED"
                    and task._options is None
                    and not (records and task.uid in records)
                ):
                    # A burst of short tasks without results, and without the cases of the others.
                    task.state = "DONE"
                    plain += 1
                    waited += now - task._submitted
                    future = task._future
                    if not future.done():
                        future.set_result(task)
                elif state in TERMINAL:
                    self._end(task, state, fields, now)
                else:
                    self._begin(task, state, now)
            except Exception as error:  # of an author's dict, or a third party's report
                self._rescue(task, error)
        if plain:  # a burst with such is one backend's
            self._count(burst[0][0], "DONE", plain)
            self._times[0] += waited
            self._times[1] += waited

    def _begin(self, task: BaseTask, state: str, now: float) -> None:
        """Take in that a task runs."""
        if state == "RUNNING" and task.state == "SUBMITTED":
            task.state = state
            task._started = now
            self._count(task, state, 1)
            self._arm(task)
        elif state == "RUNNING" and task.uid in self._records and task.state == "RUNNING":
            self._arm(task)  # a retry
        else:
            self.dropped_events += 1

    def _end(
        self, task: BaseTask, state: str, fields: Mapping[str, Any] | None, now: float
    ) -> None:
        """Take in how a task ended."""
        old = task.state
        if old in TERMINAL:
            self.dropped_events += 1
            return
        if state == "FAILED" and (fields is None or fields.get("exception") is None):
            error = BackendError(
                f"backend '{task.backend}' says that the task failed, and not why",
                backend=task.backend,
            )
            fields = {**(fields or {}), "exception": error}
        record = self._records.get(task.uid) if self._records else None
        if record is not None:
            verdict = self._judge(task, record, state, fields)
            if verdict is None:
                return
            state, fields = verdict
        started = ended = None
        if fields is not None:
            for name, value in fields.items():
                if name == "started":
                    started = value
                elif name == "ended":
                    ended = value
                elif value is not None:
                    task[name] = value
        if started is None:
            started = task._started if old == "RUNNING" else now
        times = self._times
        times[0] += now - task._submitted
        times[1] += started - task._submitted
        times[2] += (ended or now) - started
        self._close_task(task, state)
        if record is not None:
            self._close_record(task, record)

    def _close_task(self, task: BaseTask, state: str) -> None:
        """Let a task be what it has come to, and tell who waits for it."""
        counts = self._counts[task.backend or ""]
        if task.state == "RUNNING":
            counts["RUNNING"] -= 1
        task.state = state
        counts[state] += 1
        task._bound = None
        if state == "DONE" and task._options is None:
            future = task._future
            assert future is not None
            if not future.done():
                future.set_result(task)
        else:
            self._tell(task)

    def _rescue(self, task: BaseTask, why: Exception) -> None:
        """End a task whose report could not be taken in: those behind it must be heard of too."""
        logger.error("task '%s' could not be settled as reported", task.uid, exc_info=why)
        if not task.done():
            task.exception = BackendError(
                f"the report of backend '{task.backend}' on task '{task.uid}' cannot be taken in:"
                f" {describe_error(why)}",
                backend=task.backend,
            )
            task.exception.__cause__ = why
            with suppress(Exception):  # it is an author's dict that takes nothing, and logged above
                self._close_task(task, "FAILED")
        task._settle_future()
        if (record := self._records.get(task.uid)) is not None:
            self._close_record(task, record)

    def _count(self, task: BaseTask, state: str, by: int) -> None:
        self._counts[task.backend or ""][state] += by

    def _tell(self, task: BaseTask) -> None:
        """Settle the future, and give a plain dict what its task has."""
        source = task._submitted_object()
        if source is not task:
            for name in ("backend", *task._outcome):
                source[name] = task[name]
        task._settle_future()

    def _judge(
        self, task: BaseTask, record: _Record, state: str, fields: Mapping[str, Any] | None
    ) -> tuple[str, Mapping[str, Any] | None] | None:
        """Return how a task with a record ends, or None where it is run again."""
        if record.timer is not None:
            record.timer.cancel()
            record.timer = None
        if record.expired and state == "CANCELED" and not record.canceled:
            error = TaskTimeoutError(task.uid, timeout_of(task) or 0.0)
            state, fields = "FAILED", {**(fields or {}), "exception": error}
        error_seen = (fields or {}).get("exception")
        again = (
            state == "FAILED"
            and record.retries > 0
            and not record.canceled
            and not self.closing
            and not isinstance(error_seen, _FINAL_ERRORS)
            and not (isinstance(error_seen, TaskTimeoutError) and not error_seen.stopped)
        )
        if not again:
            return state, fields
        record.retries -= 1
        record.expired = False
        logger.info("task '%s' is run again after %r", task.uid, error_seen)
        self._send(task)
        return None

    def _close_record(self, task: BaseTask, record: _Record) -> None:
        self._records.pop(task.uid, None)
        for child in record.children:
            waiting = self._records[child.uid].waiting if child.uid in self._records else set()
            waiting.discard(task.uid)
            if not waiting and not child.done():
                # In a turn of its own: a chain of failures as long as it likes stays off the stack.
                asyncio.get_running_loop().call_soon(self._release, child)

    # ------------------------------------------------------------------ timeout and cancel

    def _arm(self, task: BaseTask) -> None:
        """Start the clock of a task that has begun to run."""
        if task._options is None or (timeout := timeout_of(task)) is None:
            return
        record = self.record(task)
        if record.timer is None:
            loop = asyncio.get_running_loop()
            record.timer = loop.call_later(timeout, self._expire, task, record, timeout)

    def _expire(self, task: BaseTask, record: _Record, timeout: float) -> None:
        record.expired = True
        self.spawn(self._stop_expired(task, record, timeout))

    async def _stop_expired(self, task: BaseTask, record: _Record, timeout: float) -> None:
        backend = self.backends[task.backend or ""]
        try:
            stopped = await backend.cancel_task(task.uid)
        except Exception:  # an engine's; the author hears that the task was not stopped
            logger.exception("backend '%s' failed to stop task '%s'", backend.name, task.uid)
            stopped = False
        # It may have failed by itself meanwhile, and be on its way to another run.
        if not stopped and record.expired and not task.done():
            backend.abandon(task.uid)
            error = TaskTimeoutError(task.uid, timeout, stopped=False)
            self.settle([(task, "FAILED", {"exception": error})])

    async def cancel(self, task: BaseTask) -> bool:
        """Stop a task; True when it is CANCELED."""
        if task.done():
            return False
        if task.state == "WAITING":
            self.settle([(task, "CANCELED", None)])
            return True
        record = self.record(task)
        record.canceled = True
        backend = self.backends[task.backend or ""]
        if not backend.holds(task):  # not yet, or not again
            self.settle([(task, "CANCELED", None)])
            return True
        try:
            await backend.cancel_task(task.uid)
        finally:
            if not task.done():
                record.canceled = False
        return task.state == "CANCELED"

    def statistics(self) -> dict[str, Any]:
        """Return what `Session.get_statistics` does."""
        counts: Counter[str] = Counter()
        for counter in list(self._counts.values()):
            counts.update(counter)
        ended = sum(counts[state] for state in TERMINAL)
        total, queue, execution = self._times
        each = 1 / ended if ended else 0.0
        counts["PENDING"] = self.admitted - counts.total()
        return {
            "counts": +counts,
            "backends": {name: +counter for name, counter in list(self._counts.items())},
            "summary": {
                "avg_total": total * each,
                "avg_queue": queue * each,
                "avg_execution": execution * each,
            },
        }

    async def close(self) -> None:
        """Stop what still runs, shut the backends down, and settle every future."""
        self.closing = True
        left = [task for task in self.tasks.values() if not task.done()]
        if left:
            logger.warning("session '%s' closes with %d tasks not ended", self.owner, len(left))
        self.settle([(task, "CANCELED", None) for task in left if task.state == "WAITING"])
        results = await asyncio.gather(
            *(backend.shutdown() for backend in self.backends.values()), return_exceptions=True
        )
        while self._background:  # some send others
            await asyncio.wait(self._background)
        self.settle([(task, "CANCELED", None) for task in left if not task.done()])
        for name, result in zip(self.backends, results, strict=True):
            if isinstance(result, BaseException):
                logger.error("backend '%s' did not shut down cleanly: %r", name, result)
