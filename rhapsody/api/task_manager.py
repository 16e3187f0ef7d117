"""The life of a session's tasks: taken in, handed over, settled, run again, canceled.

The one owner of their states and futures; everything here runs on the thread of one event loop.
Most tasks have no retries, timeout or relatives, and need no record; the others have a `_Record`
while in flight.

Over 500 lines: whatever changes a state or a record is here, so that nothing else need be read to
know that each task ends once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.backends.constants import (
    CANCELED,
    DONE,
    FAILED,
    NEW,
    RUNNING,
    SUBMITTED,
    TERMINAL_STATES,
    WAITING,
)
from rhapsody.backends.delivery import Listener
from rhapsody.runtime.errors import (
    BackendError,
    DependencyError,
    ResourceError,
    RhapsodyError,
    SessionError,
    TaskTimeoutError,
    TaskValidationError,
)
from rhapsody.runtime.task import Fields
from rhapsody.runtime.text import describe_error

from .dependencies import bind, find_parents, hold_no_tasks, parents_first, parents_of
from .dispatch import Dispatcher, Groups
from .routing import combine_errors, duplicate_error, parent_error, route, task_label
from .statistics import Statistics
from .task import BaseTask, ComputeTask, as_task

__all__ = ["TaskManager"]

logger = logging.getLogger("rhapsody.session")

_CHUNK = 1024  # tasks taken in per turn of the loop
# A retry cannot help against these.
_FINAL_ERRORS = (TaskValidationError, ResourceError, DependencyError, SessionError)


def _timeout_of(task: BaseTask) -> float | None:
    """Seconds that a task may run: its timeout, else the walltime of its resources."""
    if task.timeout is None and task.resources is not None:
        return task.resources.walltime_seconds
    return task.timeout


@dataclass(slots=True)
class _Submit:
    """One call of `submit`."""

    futures: list[asyncio.Future[Any]] = field(default_factory=list)
    refused: dict[str, RhapsodyError] = field(default_factory=dict)  # by uid, or place in the call
    children: dict[BaseTask, list[BaseTask]] = field(default_factory=dict)  # and their parents
    submissions: list[asyncio.Task[None]] = field(default_factory=list)  # in the background


class _Record:
    """What is kept of a task in flight that has retries, a timeout or relatives."""

    __slots__ = ("canceled", "children", "expired", "parents", "retries", "timer", "waiting")

    def __init__(self) -> None:
        self.retries = 0  # left
        self.timer: asyncio.TimerHandle | None = None
        self.expired = False  # its time is up, and its backend was told to stop it
        self.canceled = False  # the author wants it stopped
        self.parents: list[BaseTask] = []  # while it waits for some of them
        self.waiting: set[str] = set()  # uids of the parents that have not ended
        self.children: list[BaseTask] = []  # that wait for this task


class TaskManager:
    """Settles each task of a session exactly once.

    Args:
        owner: uid of the session.
        folder: returns the session's own folder.
    """

    def __init__(self, owner: str, folder: Callable[[], str]) -> None:
        self.backends: dict[str, BaseExecutionBackend] = {}
        self.statistics = Statistics()
        self.dropped_events = 0
        self._owner = owner
        self._folder = folder
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first submit
        self._closing: asyncio.Task[None] | None = None
        self._tasks: dict[str, BaseTask] = {}
        self._records: dict[str, _Record] = {}
        self._ready: list[BaseTask] = []
        self._background: set[asyncio.Task[None]] = set()
        self._dispatcher = Dispatcher(self._attach, self._finish, self._spawn)

    def add(self, backend: BaseExecutionBackend) -> None:
        """Take a backend in, and listen to it.

        Raises:
            BackendError: it still runs tasks of another session.
        """
        self._attach(backend)
        self.backends[backend.name] = backend
        self.statistics.add_backend(backend.name)

    def _attach(self, backend: BaseExecutionBackend) -> None:
        # Only tasks of this session are handed over, so that it settles nothing else.
        backend.attach(self._owner, cast("Listener", self._settle), self._folder)

    def enter(self) -> None:
        """Make the running loop the session's, or see that it is.

        Raises:
            SessionError: it is another one, on which no event of the tasks would arrive.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise SessionError(
                f"session '{self._owner}' was used in another event loop; make a new session, with"
                " new backends, in each asyncio.run()"
            )

    def find(self, given: Any) -> BaseTask:
        """Return the task of this session that a task, or its plain dict, is.

        Raises:
            SessionError: it is none of this session.
        """
        uid = given.get("uid") if isinstance(given, (BaseTask, dict)) else None
        found = self._tasks.get(uid) if isinstance(uid, str) else None
        if found is None or (isinstance(given, BaseTask) and found is not given):
            raise SessionError(
                f"{given!r} was not submitted to session '{self._owner}', or was forgotten"
            )
        return found

    def forget(self, tasks: Iterable[BaseTask]) -> None:
        """Let go of settled tasks."""
        for task in tasks:
            self._tasks.pop(task.uid, None)

    def _record(self, task: BaseTask) -> _Record:
        """Return a task's record, made when it is first needed."""
        return self._records.setdefault(task.uid, _Record())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something in the background; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ------------------------------------------------------------------ submit

    async def submit(self, tasks: Iterable[Any]) -> list[asyncio.Future[Any]]:
        """Take tasks in and hand them over; see `Session.submit_tasks`."""
        self.enter()
        call = _Submit()
        pending = iter(tasks)
        place = 0
        try:
            while chunk := list(itertools.islice(pending, _CHUNK)):
                groups = self._admit(chunk, place, call)
                place += len(chunk)
                await self._dispatcher.dispatch(groups, call.submissions)
                await asyncio.sleep(0)  # a submit of any size leaves the loop to others in between
                if self._closing is not None:
                    raise SessionError(f"session '{self._owner}' was closed during a submit")
            if call.children:
                await self._relate(call)
            if call.submissions:
                await asyncio.wait(call.submissions)
        except BaseException:
            self._finish([task for task in call.children if task.state == NEW], CANCELED)
            await self._dispatcher.cancel(call.submissions)
            raise
        if call.refused:
            raise combine_errors(call.refused)
        return call.futures

    def _admit(self, chunk: list[Any], first: int, call: _Submit) -> Groups:
        """Take tasks in; returns those that can be handed over.

        The others go to `call.children`, those with parents, or to `call.refused`. `first` is the
        place of the chunk among the submitted tasks.
        """
        loop, known, now = asyncio.get_running_loop(), self._tasks, time.monotonic()
        futures = call.futures
        before = len(futures)
        default = next(iter(self.backends.values()))
        group: list[BaseTask] = []
        groups: Groups = {default: group}
        functions = "function" in default.kinds and default.takes_plain_functions
        for place, task in enumerate(chunk, first):
            # A function without options or parents: nothing to look up, nothing to refuse.
            if (
                type(task) is ComputeTask
                and task._options is None
                and task.backend is None
                and task.function is not None
                and task.state == NEW
                and functions
                and (not task.args or hold_no_tasks(task.args))
                and (not task._kwargs or hold_no_tasks(task._kwargs.values()))
                and known.setdefault(task.uid, task) is task
            ):
                task.backend = default.name
                task.state = SUBMITTED
                group.append(task)
            else:
                try:
                    task = self._examine(task, groups, call)
                except Exception as error:  # a third party's check may raise anything
                    label = task_label(task, place)
                    call.refused[label] = _as_refusal(error, label)
                    continue
                known[task.uid] = task
            task._submitted = now
            task._future = asyncio.Future(loop=loop)
            futures.append(task._future)
        self.statistics.admitted += len(futures) - before
        return groups

    def _examine(self, given: Any, groups: Groups, call: _Submit) -> BaseTask:
        """Check and route a task that is not of the plainest kind.

        Raises:
            TaskValidationError, ResourceError: it is refused.
        """
        task = as_task(given)
        if task.uid in self._tasks or task.state != NEW:
            raise duplicate_error(task, self._tasks)
        if task._options is not None:
            find_parents(task, self._tasks)
        backend = route(task, self.backends)
        if parents := parents_of(task):
            call.children[task] = parents
        else:
            groups.setdefault(backend, []).append(task)
            task.state = SUBMITTED
        if task._options is not None and (task.retries or _timeout_of(task)):
            self._record(task).retries = task.retries
        return task

    # ------------------------------------------------------------------ dependencies

    async def _relate(self, call: _Submit) -> None:
        """Let children wait for their parents; refuse those in a cycle or without a parent here."""
        order, cycles = parents_first(call.children)
        refused: dict[str, RhapsodyError] = {
            uid: TaskValidationError(f"task '{uid}' waits for itself: {cycle}")
            for uid, cycle in cycles.items()
        }
        groups: Groups = {}
        for place, task in enumerate(order, start=1):
            parents = call.children[task]
            lost = [p for p in parents if not p.done() and self._tasks.get(p.uid) is not p]
            if lost := lost or [p for p in parents if p.uid in refused]:
                cause = refused.get(lost[0].uid, call.refused.get(lost[0].uid))
                refused[task.uid] = parent_error(task, lost[0], cause)
            elif not task.done():  # the session may have been closed meanwhile
                self._place(task, parents, groups)
            if not place % _CHUNK:
                await self._dispatcher.dispatch(groups, call.submissions)
                groups = {}
                await asyncio.sleep(0)
        for uid in refused:
            self._tasks.pop(uid)._future = None
            self._records.pop(uid, None)
        self.statistics.admitted -= len(refused)
        call.refused.update(refused)
        await self._dispatcher.dispatch(groups, call.submissions)

    def _place(self, task: BaseTask, parents: list[BaseTask], groups: Groups) -> None:
        """Hand a child over if its parents allow it; else let it wait for them here."""
        backend = self._backend_of(task)
        unended = [parent for parent in dict.fromkeys(parents) if not parent.done()]
        if unended and not (
            backend.native_dependencies and all(self._is_with(p, backend) for p in unended)
        ):
            task.state = WAITING
            record = self._record(task)
            record.parents = parents
            record.waiting = {parent.uid for parent in unended}
            for parent in unended:
                self._record(parent).children.append(task)
        elif self._inherit(task, parents):
            task.state = SUBMITTED
            groups.setdefault(backend, []).append(task)

    def _backend_of(self, task: BaseTask) -> BaseExecutionBackend:
        return self.backends[task.backend or ""]

    def _is_with(self, task: BaseTask, backend: BaseExecutionBackend) -> bool:
        """Whether an engine has a task, and its first end is the last: it is not run again here."""
        record = self._records.get(task.uid)
        return (
            task.backend == backend.name
            and task.state in (SUBMITTED, RUNNING)
            and (record is None or not record.retries)
        )

    def _inherit(self, task: BaseTask, parents: list[BaseTask]) -> bool:
        """Bind the parents' results; False where the task FAILED for one that did not end DONE."""
        error: RhapsodyError | None = None
        try:
            for parent in parents:
                if parent.done() and parent.state != DONE:
                    error = DependencyError(task.uid, parent.uid, parent.exception)
                    break
            else:
                bind(task)
        except Exception as why:  # an author's containers; what else waits must not wait for ever
            error = TaskValidationError(
                f"task '{task.uid}': the results of its parents cannot be bound:"
                f" {describe_error(why)}"
            )
            error.__cause__ = why
        if error is not None:
            self._finish((task,), FAILED, error)
        return error is None

    def _release(self, child: BaseTask) -> None:
        """Hand over a task whose parents have all ended."""
        if child.done():
            return
        record = self._records[child.uid]
        parents, record.parents = record.parents, []
        if self._inherit(child, parents):
            self._send(child)

    def _send(self, task: BaseTask) -> None:
        """Hand a task over in the background, together with others that are ready by then."""
        self._ready.append(task)
        if len(self._ready) == 1:
            self._spawn(self._send_ready())

    async def _send_ready(self) -> None:
        ready, self._ready = self._ready, []
        groups: Groups = {}
        for task in ready:
            if not task.done():
                if task.state == WAITING:
                    task.state = SUBMITTED
                groups.setdefault(self._backend_of(task), []).append(task)
        # Since they were checked, the backend may have lost what they ask for.
        await self._dispatcher.dispatch(groups, [], recheck=True)

    # ------------------------------------------------------------------ settle

    def _settle(self, burst: Sequence[tuple[BaseTask, str, Fields | None]]) -> None:
        """Take events in: state, result fields, future, dependents - in that order."""
        now = time.monotonic()
        records = self._records
        plain, waited = 0, 0.0
        for task, state, fields in burst:
            try:
                if (
                    state == DONE
                    and fields is None
                    and task.state == SUBMITTED
                    and task._options is None
                    and not (records and task.uid in records)
                ):
                    # A burst of short tasks without results, and without the cases of the others.
                    task.state = DONE
                    plain += 1
                    waited += now - task._submitted
                    future = task._future
                    if future is not None and not future.done():
                        future.set_result(task)
                elif state in TERMINAL_STATES:
                    self._end(task, state, fields, now)
                else:
                    self._begin(task, state, now)
            except Exception as error:  # of an author's dict, or a third party's report
                self._rescue(task, error)
        if plain:  # a burst with such is one backend's
            self.statistics.add_done(burst[0][0].backend or "", plain, waited)

    def _finish(
        self, tasks: Iterable[BaseTask], state: str, error: BaseException | None = None
    ) -> None:
        """End those of some tasks that have not ended, without a report of their backend."""
        fields = None if error is None else {"exception": error}
        self._settle([(task, state, fields) for task in tasks if not task.done()])

    def _begin(self, task: BaseTask, state: str, now: float) -> None:
        """Take in that a task runs."""
        if state == RUNNING and task.state == SUBMITTED:
            task.state = RUNNING
            task._started = now
            self.statistics.add_start(task.backend or "")
            if task._options is not None:
                self._start_timer(task)
        elif state == RUNNING and task.state == RUNNING and task.uid in self._records:
            self._start_timer(task)  # a retry
        else:
            self.dropped_events += 1

    def _end(self, task: BaseTask, state: str, fields: Fields | None, now: float) -> None:
        """Take in how a task ended."""
        before = task.state
        if before in TERMINAL_STATES:
            self.dropped_events += 1
            return
        if state == FAILED and (fields is None or fields.get("exception") is None):
            error = BackendError(
                f"backend '{task.backend}' reports that the task failed, without its error",
                backend=task.backend,
            )
            fields = {**(fields or {}), "exception": error}
        record = self._records.get(task.uid) if self._records else None
        if record is not None:
            ending = self._judge(task, record, state, fields)
            if ending is None:
                return
            state, fields = ending
        started = ended = None
        if fields is not None:
            for name, value in fields.items():
                if name == "started":
                    started = value
                elif name == "ended":
                    ended = value
                elif name == "return_value":  # of most tasks; 10 ns in place of 120
                    task.return_value = value
                elif value is not None:
                    task[name] = value
        if started is None:
            started = task._started if before == RUNNING else now
        total, queue = now - task._submitted, started - task._submitted
        execution = (ended or now) - started
        self.statistics.add_end(task.backend or "", before, state, total, queue, execution)
        self._close_task(task, state)
        if record is not None:
            self._close_record(task, record)

    def _close_task(self, task: BaseTask, state: str) -> None:
        """Give a task its terminal state, and settle its future."""
        task.state = state
        task._bound = None
        if task._options is not None:
            task._copy_to_dict()
        task._settle_future()

    def _rescue(self, task: BaseTask, why: Exception) -> None:
        """End a task whose report could not be taken in, for those that wait for it."""
        logger.error("task '%s' could not be settled as reported", task.uid, exc_info=why)
        if not task.done():
            task.exception = BackendError(
                f"the report of backend '{task.backend}' on task '{task.uid}' cannot be taken in:"
                f" {describe_error(why)}",
                backend=task.backend,
            )
            task.exception.__cause__ = why
            self.statistics.add_end(task.backend or "", task.state, FAILED, 0.0, 0.0, 0.0)
            with suppress(Exception):  # an author's dict that cannot be written, logged above
                self._close_task(task, FAILED)
        task._settle_future()
        if (record := self._records.get(task.uid)) is not None:
            self._close_record(task, record)

    def _judge(
        self, task: BaseTask, record: _Record, state: str, fields: Fields | None
    ) -> tuple[str, Fields | None] | None:
        """Return how a task with a record ends, or None where it is run again."""
        if record.timer is not None:
            record.timer.cancel()
            record.timer = None
        if record.expired and state == CANCELED and not record.canceled:
            expired = TaskTimeoutError(task.uid, _timeout_of(task) or 0.0)
            state, fields = FAILED, {**(fields or {}), "exception": expired}
        error = (fields or {}).get("exception")
        again = (
            state == FAILED
            and record.retries > 0
            and not record.canceled
            and self._closing is None
            and not isinstance(error, _FINAL_ERRORS)
            and not (isinstance(error, TaskTimeoutError) and not error.stopped)
        )
        if not again:
            return state, fields
        record.retries -= 1
        record.expired = False
        logger.info("task '%s' is run again after %r", task.uid, error)
        self._send(task)
        return None

    def _close_record(self, task: BaseTask, record: _Record) -> None:
        self._records.pop(task.uid, None)
        for child in record.children:
            if child.done():
                continue
            waiting = self._records[child.uid].waiting
            waiting.discard(task.uid)
            if not waiting:
                # In a turn of its own: a chain of failures of any length stays off the stack.
                asyncio.get_running_loop().call_soon(self._release, child)

    # ------------------------------------------------------------------ timeout and cancel

    def _start_timer(self, task: BaseTask) -> None:
        """Count the timeout of a task that has begun to run."""
        if (timeout := _timeout_of(task)) is None:
            return
        record = self._record(task)
        if record.timer is None:
            loop = asyncio.get_running_loop()
            record.timer = loop.call_later(timeout, self._expire, task, record, timeout)

    def _expire(self, task: BaseTask, record: _Record, timeout: float) -> None:
        record.expired = True
        self._spawn(self._stop_expired(task, record, timeout))

    async def _stop_expired(self, task: BaseTask, record: _Record, timeout: float) -> None:
        backend = self._backend_of(task)
        try:
            stopped = await backend.cancel_task(task.uid)
        except Exception:  # an engine's; the author learns that the task was not stopped
            logger.exception("backend '%s' failed to stop task '%s'", backend.name, task.uid)
            stopped = False
        # It may have failed by itself meanwhile, and be about to run again.
        if not stopped and record.expired and not task.done():
            backend.abandon(task.uid)
            self._finish((task,), FAILED, TaskTimeoutError(task.uid, timeout, stopped=False))

    async def cancel(self, task: BaseTask) -> bool:
        """Stop a task; True when it is CANCELED."""
        if task.done():
            return False
        self.enter()
        if task.state == WAITING:
            self._finish((task,), CANCELED)
            return True
        record = self._record(task)
        record.canceled = True
        backend = self._backend_of(task)
        if not backend.holds(task):  # not yet, or not again
            self._finish((task,), CANCELED)
            return True
        try:
            await backend.cancel_task(task.uid)
        finally:
            if not task.done():
                record.canceled = False
        return task.state == CANCELED

    # ------------------------------------------------------------------ close

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing is not None

    @property
    def closed(self) -> bool:
        """Whether `close` was called, and every task has been settled."""
        return self._closing is not None and self._closing.done()

    async def close(self) -> None:
        """Stop what still runs, shut the backends down, and settle every future.

        A second call waits for the first, then does nothing.
        """
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        left = [task for task in self._tasks.values() if not task.done()]
        if left:
            logger.warning("session '%s' closes with %d tasks not ended", self._owner, len(left))
        self._finish([task for task in left if task.state == WAITING], CANCELED)
        backends = list(self.backends.values())
        results = await asyncio.gather(
            *(backend.shutdown() for backend in backends), return_exceptions=True
        )
        while self._background:  # some spawn others
            await asyncio.wait(self._background)
        self._finish(left, CANCELED)
        for backend, result in zip(backends, results, strict=True):
            if isinstance(result, BaseException):
                logger.error("backend '%s' did not shut down cleanly: %r", backend.name, result)


def _as_refusal(error: Exception, label: str) -> RhapsodyError:
    if isinstance(error, RhapsodyError):
        return error
    refusal = TaskValidationError(f"task '{label}' is refused: {describe_error(error)}")
    refusal.__cause__ = error
    return refusal
