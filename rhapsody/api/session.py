"""The session: what an author submits to, waits on, and closes.

It takes tasks in and finds their backends; their way from there to their end is `flow`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.runtime.errors import RhapsodyError, SessionError, TaskValidationError
from rhapsody.runtime.text import describe_error

from .dependencies import find_parents, hold_no_tasks, parents_of
from .routing import combine_errors, duplicate_error, route, task_label
from .task import TERMINAL, BaseTask, ComputeTask, as_task
from .task_manager import CHUNK, TaskManager, timeout_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Session", "observers"]

#: Called with each new session; the command line follows the sessions of a script by it.
observers: list[Callable[[Session], None]] = []

#: of a session, or one of them
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
        self._backends = self._manager.backends
        self._tasks = self._manager.tasks
        self._closing: asyncio.Task[None] | None = None
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
        if self._closing is not None:
            raise SessionError(f"session '{self.uid}' is closed")
        if not isinstance(backend, BaseExecutionBackend):
            raise SessionError(f"a backend must be a BaseExecutionBackend, not {backend!r}")
        if backend.name in self._backends:
            raise SessionError(
                f"session '{self.uid}' has a backend named '{backend.name}' already;"
                " give one of them another name="
            )
        self._manager.add(backend)

    @property
    def backends(self) -> dict[str, BaseExecutionBackend]:
        """The backends by name, in the order in which they are tried."""
        return dict(self._backends)

    @property
    def closed(self) -> bool:
        """Whether the session has been closed, and has settled all its tasks."""
        return self._closing is not None and self._closing.done()

    @property
    def dropped_events(self) -> int:
        """How many late and duplicate reports of its backends the session did not believe."""
        return self._manager.dropped_events

    @property
    def path(self) -> Path:
        """The session's own folder, below `work_dir`; made when it is first asked for.

        It is named by the uid, with a number behind it where an earlier run has left one.

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
        # Apart from the loop: only there does FileExistsError say that the next number may do.
        self.work_dir.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = self.work_dir / (f"{self.uid}.{number}" if number else self.uid)
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
        raise AssertionError("numbers do not end")

    # ------------------------------------------------------------------ submit

    async def submit_tasks(
        self, tasks: Iterable[BaseTask | dict[str, Any]]
    ) -> list[asyncio.Future[Any]]:
        """Submit tasks; returns their futures, in order.

        A future's result is the task itself. Canceling a future gives up waiting for it; it is
        `cancel` that stops a task.

        Raises:
            TaskValidationError: some tasks were refused, which its `errors` names; the others
                were submitted, and run.
            ResourceError: the same, where they were all refused for want of resources.
            SessionError: the session is closed, has no backend, belongs to another event loop (that
                of its first submit), or `tasks` is not a list of tasks.

        Where it is interrupted (canceled, or by an error of `tasks` itself), tasks that were not
        handed over by then are CANCELED or still NEW; the others run.
        """
        if self._closing is not None:
            raise SessionError(f"session '{self.uid}' is closed")
        if not self._backends:
            raise SessionError(f"session '{self.uid}' has no backend; give it backends=[...]")
        if isinstance(tasks, (BaseTask, Mapping, str)) or not isinstance(tasks, Iterable):
            raise SessionError(f"submit_tasks takes a list of tasks, not {type(tasks).__name__}")
        self._manager.enter()
        futures: list[asyncio.Future[Any]] = []
        refused: dict[str, RhapsodyError] = {}
        related: list[BaseTask] = []
        under_way: list[asyncio.Task[None]] = []
        pending = iter(tasks)
        seen = 0
        try:
            while chunk := list(itertools.islice(pending, CHUNK)):
                groups = self._admit(chunk, futures, related, refused, seen)
                seen += len(chunk)
                await self._manager.dispatcher.dispatch(groups, under_way)
                await asyncio.sleep(0)  # a submit of any size leaves the loop to others in between
                if self._closing is not None:
                    raise SessionError(f"session '{self.uid}' was closed during a submit")
            if related:
                await self._manager.relate(related, refused, under_way)
            if under_way:
                await asyncio.wait(under_way)
        except BaseException:
            self._manager.settle(
                [(task, "CANCELED", None) for task in related if task.state == "NEW"]
            )
            await self._manager.dispatcher.take_back(under_way)
            raise
        if refused:
            raise combine_errors(refused)
        return futures

    def _admit(
        self,
        chunk: list[Any],
        futures: list[asyncio.Future[Any]],
        related: list[BaseTask],
        refused: dict[str, RhapsodyError],
        first: int,
    ) -> dict[str, list[BaseTask]]:
        """Take tasks in; returns those that can be handed over, by backend.

        The others go to `related`, those with parents, or to `refused`. `first` is the place of
        the chunk in its submit.
        """
        loop, known, now = asyncio.get_running_loop(), self._tasks, time.monotonic()
        before = len(futures)
        default = next(iter(self._backends.values()))
        groups: dict[str, list[BaseTask]] = {default.name: []}
        group = groups[default.name]
        functions = "function" in default.kinds and default.takes_plain_functions
        for number, task in enumerate(chunk, first):
            # A function without options or parents: nothing to look up, nothing to refuse.
            if (
                type(task) is ComputeTask
                and task._options is None
                and task.backend is None
                and task.function is not None
                and task.state == "NEW"
                and functions
                and (not task.args or hold_no_tasks(task.args))
                and (not task._kwargs or hold_no_tasks(task._kwargs.values()))
                and known.setdefault(task.uid, task) is task
            ):
                task.backend = default.name
                task.state = "SUBMITTED"
                group.append(task)
            else:
                try:
                    task = self._examine(task, groups, related)
                except RhapsodyError as error:
                    refused[task_label(task, number)] = error
                    continue
                except Exception as error:  # a backend's own check, which may be anyone's
                    name = task_label(task, number)
                    refused[name] = TaskValidationError(
                        f"task '{name}' is refused: {describe_error(error)}"
                    )
                    refused[name].__cause__ = error
                    continue
                known[task.uid] = task
            task._submitted = now
            task._future = asyncio.Future(loop=loop)
            futures.append(task._future)
        self._manager.admitted += len(futures) - before
        return groups

    def _examine(
        self, given: Any, groups: dict[str, list[BaseTask]], related: list[BaseTask]
    ) -> BaseTask:
        """Find the place of a task that is not of the plainest kind.

        Raises:
            TaskValidationError, ResourceError: it is refused.
        """
        task = as_task(given)
        if task.uid in self._tasks or task.state != "NEW":
            raise TaskValidationError(duplicate_error(task, self._tasks))
        if task._options is not None:
            find_parents(task, self._tasks)
        backend = route(task, self._backends)
        if parents_of(task):
            related.append(task)
        else:
            groups.setdefault(backend.name, []).append(task)
            task.state = "SUBMITTED"
        if task._options is not None and (task.retries or timeout_of(task)):
            self._manager.record(task).retries = task.retries
        return task

    # ------------------------------------------------------------------ cancel and wait

    async def cancel(self, task: BaseTask | dict[str, Any]) -> bool:
        """Stop a task; True when it is CANCELED, which means that it is known to be stopped.

        False where it has ended already, or where its backend cannot stop it: then it runs on.

        Raises:
            SessionError: the task is not in this session.
        """
        found = self._find(task)
        if not found.done():
            self._manager.enter()
        return await self._manager.cancel(found)

    def _find(self, task: Any) -> BaseTask:
        uid = task.get("uid") if isinstance(task, (BaseTask, dict)) else None
        found = self._tasks.get(uid) if isinstance(uid, str) else None
        if found is None or (isinstance(task, BaseTask) and found is not task):
            raise SessionError(
                f"{task!r} was not submitted to session '{self.uid}', or was forgotten"
            )
        return found

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
        # Bursts settle many at once, so that few of a long list are ever waited for.
        for given in tasks:
            if type(given) is ComputeTask and given.state in TERMINAL:
                continue
            task = self._find(given)
            while task.state not in TERMINAL:
                self._manager.enter()
                await asyncio.wait((task._waitable(),))

    async def as_completed(self, tasks: Tasks) -> AsyncIterator[BaseTask]:
        """Yield tasks as they end, however they end.

        Raises:
            SessionError: a task is not in this session.
        """
        found = [self._find(task) for task in _listed(tasks)]
        ended: deque[BaseTask] = deque()
        bell = asyncio.Event()
        if not all(task.done() for task in found):
            self._manager.enter()

        def note(task: BaseTask, _: Any = None) -> None:
            if task.done():
                ended.append(task)
                bell.set()
            else:  # to begin with, or because the author canceled the future and not the task
                task._waitable().add_done_callback(partial(note, task))

        for task in found:
            note(task)
        for _ in found:
            while not ended:
                bell.clear()
                await bell.wait()
            yield ended.popleft()._submitted_object()

    async def map(
        self, function: Callable[..., Any], iterable: Iterable[Any], **task_fields: Any
    ) -> list[Any]:
        """Run `function(item)` for each item; returns the return values, in order.

        `task_fields` go to each task (`backend=`, `retries=`, ...).

        Raises:
            Exception: what the first failed call raised, in the order of the items.
            TaskValidationError: as `ComputeTask` and `submit_tasks`.
            SessionError: `iterable` is none, or `task_fields` say what is run, which `map` does.
        """
        items: Any = iterable  # as authors write it
        if not isinstance(items, Iterable):
            raise SessionError(f"map takes a list of items, not {items!r}")
        if own := {"args", "executable"} & task_fields.keys():
            raise SessionError(f"map says itself what a task runs; {min(own)}= is not accepted")
        tasks = [ComputeTask(function=function, args=(i,), **task_fields) for i in iterable]
        await self.submit_tasks(tasks)
        await self.wait_tasks(tasks)
        for task in tasks:
            if task.state != "DONE":
                await task
        return [task.return_value for task in tasks]

    def forget(self, tasks: Tasks) -> None:
        """Let go of settled tasks, so that a long-lived session does not grow.

        Their counts stay in the statistics, and their uids may be used again.

        Raises:
            SessionError: a task has not ended, or is not in this session; then none is forgotten.
        """
        found = [self._find(task) for task in _listed(tasks)]
        for task in found:
            if not task.done():
                raise SessionError(f"task '{task.uid}' is {task.state}: it cannot be forgotten yet")
        for task in found:
            self._tasks.pop(task.uid, None)

    def get_statistics(self) -> dict[str, Any]:
        """Return counts and mean times of the tasks; cheap, and safe from any thread.

        `counts`: a Counter of states, PENDING for those that wait or are queued; `backends`:
        the same by backend's name, without PENDING; `summary`: `avg_total`, `avg_queue` and
        `avg_execution` of the ended tasks, in seconds.
        """
        return self._manager.statistics()

    # ------------------------------------------------------------------ close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop what still runs, shut the backends down, and settle every future.

        A second call waits for the first, then does nothing.
        """
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._manager.close())
        await asyncio.shield(self._closing)


def _check_uid(uid: Any) -> str:
    if not isinstance(uid, str) or uid in ("", ".", "..") or "/" in uid or "\0" in uid:
        raise SessionError(f"uid must be a text that can name a folder, not {uid!r}")
    return uid


def _listed(tasks: Any) -> list[Any]:
    """The tasks of a list, or the one that was given in place of a list."""
    if isinstance(tasks, (BaseTask, dict)):
        return [tasks]
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise SessionError(f"a task or a list of tasks is needed, not {tasks!r}")
    return list(tasks)
