"""The contract of a backend, and all of it that does not depend on the engine.

A backend in a package of its own subclasses `BaseExecutionBackend`, lists in `kinds` and
`option_keys` what it can run, overrides the five hooks `_start`, `_submit`, `_cancel`, `_stop` and
`_check`, gets what a task runs from `inputs_of` or `command_of`, and reports with `deliver`, from
any thread: RUNNING when a task starts, and the state in which it ended. A task's `timeout` is
counted from RUNNING on: an engine that does not report it runs tasks without a timeout.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rhapsody.runtime.arguments import command_of, inputs_of
from rhapsody.runtime.errors import BackendError, TaskValidationError
from rhapsody.runtime.task import Event, Task, TaskObject, kind_of

from .constants import FAILED, BackendMainStates, StateMapper
from .data_links import DataLinks
from .delivery import Delivery, Listener

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BaseBackend", "BaseExecutionBackend", "Event", "Task", "kind_of"]


class BaseExecutionBackend(Delivery, DataLinks):
    """Lifecycle and checks, written once for every engine.

    Started by `await backend`, `async with backend`, `await Backend.create(...)`, or by the first
    submit of a session; stopped by `shutdown`. It belongs to the event loop in which it is started.
    """

    #: kinds of tasks that the engine runs
    kinds: ClassVar[frozenset[str]] = frozenset({"function", "executable"})
    #: accepted keys of `task_backend_specific_kwargs`
    option_keys: ClassVar[frozenset[str]] = frozenset()
    #: whether a function without options, resources and parents runs here in any case, so that a
    #: session need not call `check` for each of very many
    takes_plain_functions: ClassVar[bool] = False
    #: whether the engine itself makes a task wait for other tasks of this backend, named in `after`
    #: or left among the bound arguments; it then delivers DependencyError for their children
    native_dependencies: ClassVar[bool] = False
    supports_implicit_data_linking: ClassVar[bool] = False
    supports_explicit_data_linking: ClassVar[bool] = False

    #: `inputs_of(task) -> (args, kwargs)` of a function, `command_of(task, shell=False) -> [str]`
    #: of an executable: with the results of parents in their places
    inputs_of = staticmethod(inputs_of)
    command_of = staticmethod(command_of)

    def __init__(self, name: str) -> None:
        Delivery.__init__(self, name)
        DataLinks.__init__(self)
        self.is_attached = False
        self.attached_to: list[str] = []  # uids of the sessions and engines, the latest last
        self._work_dir: str | None = None
        self._make_work_dir: Callable[[], str] = os.getcwd
        self._main_state = BackendMainStates.INITIALIZED
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

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
            # Its engine reports to that loop, which may run no more: the tasks would never end.
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
            fields = {"exception": left}
            self.deliver_burst([Event(task, FAILED, fields) for task in self._live.values()])
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
        listener: Listener,
        make_work_dir: Callable[[], str],
    ) -> None:
        """Deliver this backend's events to a session's listener, if it does not already.

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
            BackendError: the backend cannot be started, or is shut down.
        """
        await self._started()  # first: some engines know what they have only then
        batch = list(tasks)
        for task in batch:
            self.check(task)
        await self._track_and_submit([task["uid"] for task in batch], batch)

    async def submit_checked(self, tasks: Sequence[TaskObject]) -> None:
        """Hand tasks to the engine that `check` has accepted since the backend was started.

        Raises:
            TaskValidationError: one of them is with this backend already; then none was handed
                over.
            BackendError: the backend cannot be started, or is shut down.
        """
        await self._started()
        await self._track_and_submit([task.uid for task in tasks], [*tasks])

    async def _track_and_submit(self, uids: list[str], tasks: list[Task]) -> None:
        live = self._live
        batch = dict(zip(uids, tasks, strict=True))
        if len(batch) < len(uids) or not live.keys().isdisjoint(batch):
            twice = next(uid for uid, count in Counter(uids).items() if count > 1 or uid in live)
            raise TaskValidationError(f"task '{twice}' is already with backend '{self.name}'")
        live.update(batch)
        try:
            await self._submit(tasks)
        except BaseException:
            for uid in batch:
                live.pop(uid, None)
            raise

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

    # ------------------------------------------------------------------ what frameworks call

    def register_callback(self, func: Callable[[Any, str], object]) -> None:
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


BaseBackend = BaseExecutionBackend
