"""The contract of a backend, and all of it that is not its engine's.

A backend in a package of its own subclasses `BaseExecutionBackend`, says in `kinds` and
`option_keys` what it can run, overrides the five hooks `_start`, `_submit`, `_cancel`, `_stop` and
`_check`, finds what a task runs with `inputs_of` or `command_of`, and reports what its engine says
with `deliver`, from any thread: RUNNING when a task starts, and how it ended. A task's `timeout`
counts from RUNNING on, so that an engine that leaves it out runs tasks without one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rhapsody.runtime.arguments import Task, command_of, inputs_of, kind_of
from rhapsody.runtime.errors import BackendError, TaskValidationError
from rhapsody.runtime.text import safe_str

from .constants import BackendMainStates, StateMapper

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BaseBackend", "BaseExecutionBackend", "Event", "Task", "kind_of"]

logger = logging.getLogger(__name__)

# (task or its uid, state, result fields); in the queue also (list of tasks, state, None).
# Times in the fields, `started` and `ended`, are seconds
# of time.monotonic() in this process.
Event = tuple[Any, str, "Mapping[str, Any] | None"]

_TERMINAL = StateMapper.terminal_states
# Events taken per turn of the loop: a turn of about 2 ms, so that a burst of any size leaves the
# loop free for others in between.
_BURST = 1024


class BaseExecutionBackend:
    """Lifecycle, delivery of events, and checks, written once for every engine.

    Started by `await backend`, `async with backend`, `await Backend.create(...)`, or by the first
    submit of a session; stopped by `shutdown`. It belongs to the event loop in which it is started.
    """

    #: kinds of tasks that the engine runs
    kinds: ClassVar[frozenset[str]] = frozenset({"function", "executable"})
    #: accepted keys of `task_backend_specific_kwargs`
    option_keys: ClassVar[frozenset[str]] = frozenset()
    #: whether a function without options, resources and parents runs here in any case, so that
    #: `_check` need not be asked about each of very many
    takes_plain_functions: ClassVar[bool] = False
    #: whether the engine itself makes a task wait for others that it has, named in `after` or left
    #: in place among the bound arguments; it then delivers DependencyError for their children
    native_dependencies: ClassVar[bool] = False
    supports_implicit_data_linking: ClassVar[bool] = False
    supports_explicit_data_linking: ClassVar[bool] = False

    #: `inputs_of(task) -> (args, kwargs)` of a function, `command_of(task, shell=False) -> [text]`
    #: of an executable: with the results of parents in their places
    inputs_of = staticmethod(inputs_of)
    command_of = staticmethod(command_of)

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_attached = False
        self.attached_to: list[str] = []  # uids of the sessions and engines, the latest last
        self.dropped_events = 0
        self._work_dir: str | None = None
        self._main_state = BackendMainStates.INITIALIZED
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._live: dict[str, Task] = {}
        self._links: dict[str, str] = {}  # made for data dependencies: what each points to, by path
        self._events: deque[Event] = deque()
        self._armed = False
        self._callback: Callable[[Task, str], Any] | None = None
        self._listener: Callable[[Sequence[Event]], None] = self._apply
        self._make_work_dir: Callable[[], str] = os.getcwd

    # ------------------------------------------------------------------ hooks for an engine

    async def _start(self) -> None:
        """Bring the engine up; raise BackendError if it cannot be."""

    async def _submit(self, tasks: list[Task]) -> None:
        """Hand tasks, each checked, to the engine; deliver RUNNING of each when it starts."""
        raise NotImplementedError

    async def _cancel(self, task: Task) -> bool:
        """Stop a task and deliver CANCELED; True only when it is known to be stopped."""
        return False

    async def _stop(self) -> None:
        """Bring the engine down, in bounded time, with what still runs on it."""

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        """Raise TaskValidationError or ResourceError for a task that the engine cannot run."""

    # ------------------------------------------------------------------ lifecycle

    def __await__(self) -> Generator[Any, None, Self]:
        return self._started().__await__()

    async def __aenter__(self) -> Self:
        return await self._started()

    async def __aexit__(self, *exc: object) -> None:
        await self.shutdown()

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> Self:
        """Return a started backend made with these arguments."""
        return await cls(*args, **kwargs)._started()

    async def _started(self) -> Self:
        if self._starting is not None and self._loop is not asyncio.get_running_loop():
            # Its engine would report to a loop where nobody listens, and the tasks never end.
            raise BackendError(
                f"backend '{self.name}' was started in another event loop; make a new one in each"
                " asyncio.run()",
                backend=self.name,
            )
        if self._main_state is BackendMainStates.INITIALIZED and self._stopping is None:
            if self._starting is None:
                self._loop = asyncio.get_running_loop()
                self._starting = self._loop.create_task(self._start())
            starting = self._starting
            try:
                await asyncio.shield(starting)
            except BaseException:
                if starting.done():
                    self._starting = None  # a later await may try again
                raise
            if self._stopping is None:
                self._main_state = BackendMainStates.RUNNING
        if self._main_state is not BackendMainStates.RUNNING or self._stopping is not None:
            raise BackendError(f"backend '{self.name}' is shut down", backend=self.name)
        return self

    async def shutdown(self) -> None:
        """Stop what runs, then the engine. A second call waits for the first, then does nothing."""
        if self._stopping is None:
            if self._main_state is BackendMainStates.INITIALIZED and self._starting is None:
                self._main_state = BackendMainStates.SHUTDOWN
                return
            self._stopping = asyncio.get_running_loop().create_task(self._shut_down())
        await asyncio.shield(self._stopping)

    async def _shut_down(self) -> None:
        if self._starting is not None:
            await asyncio.wait([self._starting])
        self._main_state = BackendMainStates.SHUTDOWN
        try:
            await self._stop()
        finally:
            self._flush()
            left = BackendError(
                f"backend '{self.name}' was shut down while the task ran, and could not stop it",
                backend=self.name,
            )
            self.deliver_burst([(t, "FAILED", {"exception": left}) for t in self._live.values()])
            self._flush()

    def state(self) -> str:
        """Return `INITIALIZED`, `RUNNING` or `SHUTDOWN`."""
        return self._main_state.value

    @property
    def work_dir(self) -> str:
        """Folder for the files that tasks leave: the session's own, else the current folder."""
        if self._work_dir is None:
            self._work_dir = self._make_work_dir()
        return self._work_dir

    def attach(
        self,
        uid: str,
        listener: Callable[[Sequence[Event]], None],
        make_work_dir: Callable[[], str],
    ) -> None:
        """Make a session the one that hears of this backend's events, if it is not already.

        Raises:
            BackendError: tasks of another owner are still in flight.
        """
        if listener == self._listener:
            return
        if self._live:
            raise BackendError(
                f"backend '{self.name}' still runs {len(self._live)} tasks of"
                f" {self.attached_to[-1] if self.attached_to else 'another owner'}",
                backend=self.name,
            )
        self.is_attached = True
        self.attached_to.append(uid)
        self._listener = listener
        self._work_dir = None
        self._make_work_dir = make_work_dir

    # ------------------------------------------------------------------ tasks

    def check(self, task: Task) -> None:
        """Raise for a task that this backend cannot run.

        Raises:
            TaskValidationError: its kind or one of its options is not this backend's.
            ResourceError: it asks for more than there is.
        """
        kind = kind_of(task)
        if kind not in self.kinds:
            raise TaskValidationError(
                f"task '{task['uid']}' is of kind '{kind}', and backend '{self.name}'"
                f" runs {' and '.join(sorted(self.kinds))} tasks only"
            )
        options = task.get("task_backend_specific_kwargs") or {}
        if unknown := options.keys() - self.option_keys:
            raise TaskValidationError(
                f"task '{task['uid']}': backend '{self.name}' does not know"
                f" {', '.join(sorted(map(repr, unknown)))} in task_backend_specific_kwargs;"
                f" accepted: {', '.join(sorted(self.option_keys)) or 'none'}"
            )
        self._check(task, options)

    async def submit_tasks(self, tasks: Iterable[Task]) -> None:
        """Check tasks and hand them to the engine.

        Raises:
            TaskValidationError, ResourceError: the first task that cannot be run; then none was
                handed over.
            BackendError: the backend is not there any more.
        """
        await self._started()
        live = self._live
        batch: list[Task] = []
        unasked = self.takes_plain_functions and "function" in self.kinds
        try:
            for task in tasks:
                if type(task) is dict:
                    self.check(task)
                    uid = task["uid"]
                else:
                    uid = task.uid
                    if not unasked or task._options is not None or task.function is None:
                        self.check(task)
                if uid in live:
                    raise TaskValidationError(f"task '{uid}' is already with backend '{self.name}'")
                live[uid] = task
                batch.append(task)
            await self._submit(batch)
        except BaseException:
            for task in batch:
                live.pop(task["uid"], None)
            raise

    def holds(self, task: Task) -> bool:
        """Whether a task was handed over, and has not ended as far as has been heard."""
        return self._live.get(task["uid"]) is task

    async def cancel_task(self, uid: str) -> bool:
        """Stop a task; True when it is known to be stopped, False for one that is not here."""
        task = self._live.get(uid)
        if task is None:
            return False
        stopped = await self._cancel(task)
        self._flush()
        return stopped

    async def cancel_all_tasks(self) -> int:
        """Stop every task in flight; returns how many were stopped."""
        return sum(await asyncio.gather(*map(self.cancel_task, list(self._live))))

    def abandon(self, uid: str) -> None:
        """Take no more events for a task: its owner has settled it otherwise."""
        self._live.pop(uid, None)

    # ------------------------------------------------------------------ delivery

    def deliver(self, task: Task, state: str, **fields: Any) -> None:
        """Report the state of a task (or of its uid) with its results. Safe from any thread."""
        self.deliver_burst(((task, state, fields or None),))

    def deliver_burst(self, events: Iterable[Event]) -> None:
        """Report many states at once. Safe from any thread; costs at most one wake of the loop."""
        self._events.extend(events)
        if not self._armed:
            self._armed = True
            self._wake()

    def deliver_all(self, tasks: list[Task], state: str) -> None:
        """Report one state of many tasks, without results: a burst as one object in the queue."""
        for start in range(0, len(tasks), _BURST):
            self._events.append((tasks[start : start + _BURST], state, None))
        if not self._armed:
            self._armed = True
            self._wake()

    def _wake(self) -> None:
        if self._loop is None:
            self._drop_all()
            raise BackendError(f"backend '{self.name}' reports before it is started")
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # the loop is closed, and nobody is left to hear of it
            self._drop_all()

    def _drop_all(self) -> None:
        self._armed = False
        self.dropped_events += len(self._events)
        self._events.clear()

    def _drain(self) -> None:
        # First the flag, then the events: what comes in between arms a wake that finds nothing.
        self._armed = False
        events = self._events
        fresh: list[Event] = []
        taken = 0
        while events and taken < _BURST:
            event = events.popleft()
            if type(event[0]) is list:
                taken += len(event[0])
                fresh += self._accept_all(event[0], event[1])
            else:
                taken += 1
                self._accept(event, fresh)
        if events and not self._armed:
            self._armed = True
            self._wake()
        if fresh:
            try:
                self._listener(fresh)
            finally:
                if self._callback is not None:
                    self._call_back(fresh)

    def _accept(self, event: Event, fresh: list[Event]) -> None:
        """Drop the event of a task that is not in flight, a late or a duplicate one for example."""
        task, state, fields = event
        uid = task if type(task) is str else task["uid"] if type(task) is dict else task.uid
        known = self._live.pop(uid, None) if state in _TERMINAL else self._live.get(uid)
        if known is None:
            self.dropped_events += 1
        else:
            fresh.append(event if known is task else (known, state, fields))

    def _accept_all(self, tasks: list[Task], state: str) -> list[Event]:
        known = self._live.pop if state in _TERMINAL else self._live.get
        fresh: list[Event] = [
            (mine, state, None)
            for task in tasks
            if (mine := known(task["uid"] if type(task) is dict else task.uid, None)) is not None
        ]
        self.dropped_events += len(tasks) - len(fresh)
        return fresh

    def _flush(self) -> None:
        """Deliver what has been reported, now. On the loop's thread only."""
        while self._events:
            self._drain()

    def _apply(self, burst: Sequence[Event]) -> None:
        """Write states and results into tasks that no session watches over."""
        for task, state, fields in burst:
            try:
                _write(task, state, fields or {})
            except Exception:  # of a mapping that is not ours
                logger.exception("task '%s' cannot be written to", task["uid"])

    def _call_back(self, burst: Sequence[Event]) -> None:
        callback = self._callback
        assert callback is not None
        for task, state, _ in burst:
            try:
                callback(task, state)
            except Exception:
                # The author's code; the tasks behind this one must still be heard of.
                logger.exception("callback of backend '%s' failed for %s", self.name, task["uid"])

    # ------------------------------------------------------------------ what frameworks call

    def register_callback(self, func: Callable[[Task, str], Any]) -> None:
        """Call `func(task, state)` on the loop's thread for each event, in place of an earlier one.

        Raises:
            TypeError: `func` is not callable.
        """
        if not callable(func):
            raise TypeError(f"a callback must be callable as func(task, state), not {func!r}")
        self._callback = func

    def task_state_cb(self, task: Task, state: str) -> None:
        """Report the state of a task: `deliver`, as frameworks know it."""
        self.deliver(task, state)

    def get_task_states_map(self) -> StateMapper:
        """Return the map from the engine's task states to ours."""
        return StateMapper()

    def build_task(
        self, uid: str, task_desc: Mapping[str, Any], task_specific_kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a task that `submit_tasks` takes, checked, from its parts."""
        task = {**task_desc, "uid": uid, "task_backend_specific_kwargs": dict(task_specific_kwargs)}
        self.check(task)
        return task

    def link_explicit_data_deps(
        self,
        src_task: Task = None,
        dst_task: Task = None,
        file_name: str | None = None,
        file_path: str | None = None,
    ) -> dict[str, Any]:
        """Make a file of one task (or at `file_path`) visible to another, under its name.

        Returns a dict with `source` and `target`, paths on the file system that the tasks share.

        Raises:
            TaskValidationError: neither a producer nor a path, or no file name is given; or another
                file has that name already, other than a link made here before, which is replaced.
        """
        name = file_name or (os.path.basename(file_path) if file_path else None)
        if name is None or (src_task is None and file_path is None):
            raise TaskValidationError(
                "a data dependency needs a file_path, or a src_task and a file_name"
            )
        source = os.path.abspath(file_path or os.path.join(self._folder(src_task), name))
        target = os.path.abspath(os.path.join(self._folder(dst_task), os.path.basename(name)))
        if source != target:
            self._link(source, target)
        return {"source": source, "target": target}

    def _link(self, source: str, target: str) -> None:
        there = os.readlink(target) if os.path.islink(target) else None
        if there == source:
            return
        if there is not None and there == self._links.get(target):
            os.unlink(target)  # a task's that came before
        elif os.path.lexists(target):
            raise TaskValidationError(f"'{target}' exists, and is not a link to '{source}'")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(source, target)
        self._links[target] = source

    def link_implicit_data_deps(self, src_task: Task, dst_task: Task) -> dict[str, Any]:
        """Make what the producer says it writes (`output_files`) visible to the consumer.

        Returns a dict with `target`, a list of paths.
        """
        names = src_task.get("output_files") or []
        links = [self.link_explicit_data_deps(src_task, dst_task, name) for name in names]
        return {"target": [link["target"] for link in links]}

    def _folder(self, task: Task) -> str:
        """The folder in which a task runs."""
        if task is None:
            return os.getcwd()
        options, need = task.get("task_backend_specific_kwargs") or {}, task.get("resources")
        return os.fspath(options.get("cwd") or (need and need.cwd) or os.getcwd())


_TIMES = frozenset({"started", "ended"})
# What frameworks read from a task that has ended, whatever it was.
_RESULTS = ("return_value", "stdout", "stderr", "exit_code", "exception")


def _write(task: Task, state: str, fields: Mapping[str, Any]) -> None:
    """Write a state and results into a task."""
    results = {name: value for name, value in fields.items() if name not in _TIMES}
    if isinstance(task, dict) and state in _TERMINAL:
        if kind_of(task) == "function":
            results["exit_code"] = 0 if state == "DONE" else 1
            if state == "DONE":
                results["stdout"] = safe_str(results.get("return_value"))
        results = {**dict.fromkeys(_RESULTS), **results}
    task.update(results)
    task["state"] = state


BaseBackend = BaseExecutionBackend
