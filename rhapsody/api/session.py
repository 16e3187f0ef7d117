"""The session: what an author submits to, waits on, and closes.

It checks what it is called with; the tasks themselves are the `TaskManager`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.backends.constants import DONE, TERMINAL_STATES
from rhapsody.runtime.errors import SessionError

from .statistics import SessionStatistics
from .task import BaseTask, ComputeTask
from .task_manager import TaskManager

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Session", "observers"]

#: Called with each new session: so the command line follows the sessions of a script.
observers: list[Callable[[Session], None]] = []

#: tasks of a session, or one of them
Tasks = Iterable[BaseTask | dict[str, Any]] | BaseTask | dict[str, Any]

_session_numbers = itertools.count()


class Session:
    """Runs tasks over its backends.

    Args:
        backends: backends to run on, started or not; a task that names none runs on the first
            that can run it.
        uid: made (`session.0000`, counting on within the process) where none is given.
        work_dir: folder below which the session keeps its files; `RHAPSODY_WORK_DIR`, else the
            current folder, where none is given.

    Raises:
        SessionError: two backends have one name, something is not a backend, the uid cannot
            name a folder, or the work_dir is no path.
        BackendError: a backend still runs tasks of another session.
    """

    def __init__(
        self,
        backends: Iterable[BaseExecutionBackend] | None = None,
        uid: str | None = None,
        work_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        path: Any = work_dir  # as authors write it
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise SessionError(f"work_dir must be the path of a folder, not {path!r}")
        self.uid = f"session.{next(_session_numbers):04d}" if uid is None else _check_uid(uid)
        self.work_dir = Path(work_dir or os.environ.get("RHAPSODY_WORK_DIR") or Path.cwd())
        self._path: Path | None = None
        self._manager = TaskManager(self.uid, lambda: str(self.path))
        given: Any = backends  # as authors write it
        if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
            raise SessionError(f"backends must be a list of backends, not {backends!r}")
        for backend in backends or ():
            self.add_backend(backend)
        for observer in observers:
            observer(self)

    # ------------------------------------------------------------------ backends and files

    def add_backend(self, backend: BaseExecutionBackend) -> None:
        """Add a backend; it is started by its first task where it is not started yet.

        Raises:
            SessionError: it is no backend, its name is taken, or the session is closed.
            BackendError: it still runs tasks of another session.
        """
        if self._manager.closing:
            raise SessionError(f"session '{self.uid}' is closed")
        if not isinstance(backend, BaseExecutionBackend):
            raise SessionError(f"a backend must be a BaseExecutionBackend, not {backend!r}")
        if backend.name in self._manager.backends:
            raise SessionError(
                f"session '{self.uid}' has a backend named '{backend.name}' already;"
                " give one of them another name="
            )
        self._manager.add(backend)

    @property
    def backends(self) -> dict[str, BaseExecutionBackend]:
        """The backends by name, in the order in which they are tried."""
        return dict(self._manager.backends)

    @property
    def closed(self) -> bool:
        """Whether the session has been closed, and has settled all its tasks."""
        return self._manager.closed

    @property
    def dropped_events(self) -> int:
        """Number of late and duplicate events of its backends that the session has dropped."""
        return self._manager.dropped_events

    @property
    def path(self) -> Path:
        """The session's own folder, below `work_dir`; made when it is first asked for.

        Its name is the uid, with a number appended where an earlier run has left such a folder.

        Raises:
            SessionError: `work_dir` cannot be made, or nothing can be made in it.
        """
        if self._path is None:
            try:
                self._path = self._make_path().absolute()
            except (OSError, ValueError) as error:  # the latter of a NUL
                raise SessionError(
                    f"session '{self.uid}' cannot make its folder in work_dir"
                    f" {str(self.work_dir)!r}: {error}"
                ) from error
        return self._path

    def _make_path(self) -> Path:
        # Not in the loop below, where a FileExistsError means that the next number is tried.
        self.work_dir.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = self.work_dir / (f"{self.uid}.{number}" if number else self.uid)
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
        raise AssertionError("the count does not end")

    # ------------------------------------------------------------------ submit

    async def submit_tasks(
        self, tasks: Iterable[BaseTask | dict[str, Any]]
    ) -> list[asyncio.Future[Any]]:
        """Submit tasks; returns their futures, in order.

        A future's result is the task itself. Canceling a future gives up waiting for it; it is
        `cancel` that stops a task.

        Raises:
            TaskValidationError: some tasks were refused, with why in its `errors`, by uid; the
                others were submitted, and run.
            ResourceError: the same, where each was refused for resources that no backend has.
            SessionError: the session is closed, has no backend, belongs to another event loop (that
                of its first submit), or `tasks` is not a list of tasks.

        Where the call is canceled, or `tasks` itself raises, the tasks that were not handed over by
        then are CANCELED or still NEW; the others run.
        """
        if self._manager.closing:
            raise SessionError(f"session '{self.uid}' is closed")
        if not self._manager.backends:
            raise SessionError(f"session '{self.uid}' has no backend; give it backends=[...]")
        if isinstance(tasks, (BaseTask, Mapping, str)) or not isinstance(tasks, Iterable):
            raise SessionError(f"submit_tasks takes a list of tasks, not {type(tasks).__name__}")
        return await self._manager.submit(tasks)

    # ------------------------------------------------------------------ cancel and wait

    async def cancel(self, task: BaseTask | dict[str, Any]) -> bool:
        """Stop a task; True when it is CANCELED: known to be stopped.

        False where it had ended already, or where its backend cannot stop it: then it runs on.

        Raises:
            SessionError: the task is not in this session.
        """
        return await self._manager.cancel(self._manager.find(task))

    async def wait_tasks(self, tasks: Tasks, timeout: float | None = None) -> list[Any]:
        """Wait until every task has ended, however it ended; returns the tasks.

        Raises:
            asyncio.TimeoutError: `timeout` seconds are over; the tasks run on.
            SessionError: a task is not in this session, or `timeout` is no number.
        """
        given = _listed(tasks)
        limit: Any = timeout  # as authors write it
        if limit is not None and (not isinstance(limit, (int, float)) or limit != limit):
            raise SessionError(f"timeout must be seconds, not {limit!r}")
        if timeout is None:
            await self._wait(given)
        else:
            await asyncio.wait_for(self._wait(given), timeout)
        return given

    async def _wait(self, tasks: list[Any]) -> None:
        # Many tasks settle in one turn of the loop, so that few of a long list are waited for.
        for given in tasks:
            if type(given) is ComputeTask and given.state in TERMINAL_STATES:
                continue
            task = self._manager.find(given)
            while not task.done():
                self._manager.enter()
                await asyncio.wait((task._waitable(),))

    async def as_completed(self, tasks: Tasks) -> AsyncIterator[BaseTask]:
        """Yield tasks as they end, however they end.

        Raises:
            SessionError: a task is not in this session.
        """
        found = [self._manager.find(task) for task in _listed(tasks)]
        ended: deque[BaseTask] = deque()
        one_ended = asyncio.Event()
        if not all(task.done() for task in found):
            self._manager.enter()

        def note(task: BaseTask, _: Any = None) -> None:
            if task.done():
                ended.append(task)
                one_ended.set()
            else:  # to begin with, or because the author canceled the future and not the task
                task._waitable().add_done_callback(partial(note, task))

        for task in found:
            note(task)
        for _ in found:
            while not ended:
                one_ended.clear()
                await one_ended.wait()
            yield ended.popleft()._submitted_object()

    async def map(
        self, function: Callable[..., Any], iterable: Iterable[Any], **task_fields: Any
    ) -> list[Any]:
        """Run `function(item)` for each item; returns the return values, in order.

        `task_fields` go to each task (`backend=`, `retries=`, ...).

        Raises:
            Exception: what the first failed call raised, in the order of the items.
            TaskValidationError: as `ComputeTask` and `submit_tasks`.
            SessionError: `iterable` is no iterable, or `args` or `executable` is in `task_fields`.
        """
        items: Any = iterable  # as authors write it
        if not isinstance(items, Iterable):
            raise SessionError(f"map takes a list of items, not {items!r}")
        if own := {"args", "executable"} & task_fields.keys():
            raise SessionError(f"map sets what a task runs itself; {min(own)}= is not accepted")
        tasks = [ComputeTask(function=function, args=(i,), **task_fields) for i in iterable]
        await self.submit_tasks(tasks)
        await self.wait_tasks(tasks)
        for task in tasks:
            if task.state != DONE:
                await task
        return [task.return_value for task in tasks]

    def forget(self, tasks: Tasks) -> None:
        """Let go of settled tasks, so that a long-lived session does not grow.

        Their counts stay in the statistics, and their uids may be used again.

        Raises:
            SessionError: a task has not ended, or is not in this session; then none is forgotten.
        """
        found = [self._manager.find(task) for task in _listed(tasks)]
        for task in found:
            if not task.done():
                raise SessionError(f"task '{task.uid}' is {task.state}: it cannot be forgotten yet")
        self._manager.forget(found)

    def get_statistics(self) -> SessionStatistics:
        """Return counts and mean times of the tasks; cheap, and safe from any thread.

        `counts`: a Counter of states, PENDING for those that wait or are queued; `backends`:
        the same by name of the backend, without PENDING; `summary`: `avg_total`, `avg_queue` and
        `avg_execution` of the ended tasks, in seconds.
        """
        return self._manager.statistics.report()

    # ------------------------------------------------------------------ close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop what still runs, shut the backends down, and settle every future.

        A second call waits for the first, then does nothing.
        """
        await self._manager.close()


def _check_uid(uid: Any) -> str:
    if not isinstance(uid, str) or uid in ("", ".", "..") or "/" in uid or "\0" in uid:
        raise SessionError(f"uid must be a str that can name a folder, not {uid!r}")
    return uid


def _listed(tasks: Any) -> list[Any]:
    """The tasks of a list, or the one that was given in place of a list."""
    if isinstance(tasks, (BaseTask, dict)):
        return [tasks]
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise SessionError(f"a task or a list of tasks is needed, not {tasks!r}")
    return list(tasks)
