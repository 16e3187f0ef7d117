"""Runs on Dask's workers: functions, executables, and a plugin that reports and stops them.

Workers need rhapsody installed, because all of this is pickled by reference. The backend imports
this module when it starts, because it needs Dask.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import cloudpickle
from distributed import get_worker

from rhapsody.runtime import serialization
from rhapsody.runtime.arguments import map_elements
from rhapsody.runtime.errors import SerializationError
from rhapsody.runtime.local.calls import call_function, strip_frames
from rhapsody.runtime.local.executables import Executable, ExecutableRun, ExecutableRunner, Outcome
from rhapsody.runtime.text import argument_str

from .messages import Message, StopResult
from .protocols import Worker

if TYPE_CHECKING:  # typed or not, depending on the release of distributed

    class WorkerPlugin:
        """Dask's base class of worker plugins."""

else:
    from distributed.diagnostics.plugin import WorkerPlugin

# Seconds after which a task that still runs is reported as RUNNING, so that short ones cost no
# message.
_RUNNING_AFTER = 0.05
#: Seconds between SIGTERM and SIGKILL.
GRACE = 2.0
# Cancelled keys that a worker remembers: each may yet be assigned to it, or never.
_REFUSED_KEPT = 100_000


class Refused(Exception):  # noqa: N818 - nobody sees it as an error
    """Raised for a task that was cancelled before it started, or an executable that was stopped."""


class CallFailed(Exception):  # noqa: N818 - it only carries the author's error
    """Carries the exception of a call, packed, so that it arrives with its type and attributes.

    Dask pickles exceptions too, but replaces those that cannot be pickled, or are large.

    Args:
        key: of the task.
        summary: its type and message, shortened; Dask writes it into the worker's log.
        packed: the result of `serialization.pack_exception`.
    """

    def __init__(self, key: str, summary: str, packed: bytes) -> None:
        super().__init__(key, summary, packed)
        self.key = key
        self.summary = summary
        self.packed = packed

    def __repr__(self) -> str:
        return self.summary

    __str__ = __repr__


class ProgramFailed(Exception):  # noqa: N818 - it only carries the outcome
    """Carries how an executable failed; raised, so that Dask does not run what depends on it."""

    def __init__(self, key: str, result: ProgramResult) -> None:
        super().__init__(key, result)
        self.key = key
        self.result = result

    def __repr__(self) -> str:
        outcome = self.result.outcome
        return f"exit code {outcome.exit_code}: {outcome.stderr[-500:].strip()}"

    __str__ = __repr__


def _failed(key: str, error: BaseException) -> CallFailed:
    summary = f"{type(error).__name__}: {error}"
    return CallFailed(key, summary[:500], serialization.pack_exception(error))


class Call:
    """A pickled function and its pickled arguments, which Dask does not look into.

    It would search lists, tuples and dicts for futures, and its scheduler would unpickle objects,
    for which it would need the author's modules.
    """

    __slots__ = ("arguments", "function", "key", "plugin")

    def __init__(self, plugin: str, key: str, function: bytes, arguments: bytes) -> None:
        self.plugin = plugin
        self.key = key
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return Call, (self.plugin, self.key, self.function, self.arguments)


class Placeholder:
    """Among the arguments of a task, for the result of its parent of this index."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return Placeholder, (self.index,)


def fill(value: Any, parents: Sequence[Any]) -> Any:
    """Replace placeholders in an argument, also as elements of it, by the parents' results."""

    def replace(inner: Any) -> Any:
        if type(inner) is not Placeholder:
            return inner
        result = parents[inner.index]
        return result.outcome.stdout if isinstance(result, ProgramResult) else result

    return map_elements(value, replace)


# ---------------------------------------------------------------------- functions

# The functions that this worker unpickled last: most bursts are calls of one function.
_functions: dict[bytes, Callable[..., Any]] = {}
_FUNCTIONS_KEPT = 128


def _load_function(blob: bytes) -> Callable[..., Any]:
    function = _functions.get(blob)
    if function is None:
        function = cast("Callable[..., Any]", cloudpickle.loads(blob))
        while len(_functions) >= _FUNCTIONS_KEPT:
            _functions.pop(next(iter(_functions)), None)
        _functions[blob] = function
    return function


def run_function(call: Call, parents: Sequence[Any] = ()) -> Any:
    """Run a call on this worker's thread and return its value.

    Raises:
        CallFailed: it raised, or it or its result cannot be pickled or unpickled.
    """
    try:
        with _tracker(call.plugin).running(call.key) as run:
            function = _load_function(call.function)
            args, kwargs = serialization.loads(call.arguments, "arguments of the function")
            if parents:
                args = [fill(value, parents) for value in args]
                kwargs = {name: fill(value, parents) for name, value in kwargs.items()}
            return _picklable(call_function(function, args, kwargs, watch=run.watch))
    except Refused:
        raise
    except BaseException as error:
        # SystemExit too: it is the function that ends, not the worker.
        strip_frames(error)
        failure = _failed(call.key, error)
    # Outside of the except clause: Dask would pickle the `__context__` of the exception, too.
    raise failure


_PLAIN = (int, float, str, bytes, bool, complex, type(None), bytearray)


def _picklable(value: Any) -> Any:
    """Return the value, if it can be pickled.

    Dask notices that a result cannot be pickled only when it sends it, fails all results that it
    sends together, and retries without end. Buffers (arrays) are not copied for this check.

    Raises:
        SerializationError: it cannot.
    """
    if type(value) not in _PLAIN:
        try:
            cloudpickle.dumps(value, protocol=5, buffer_callback=lambda buffer: None)
        except Exception as error:  # a user's __reduce__ may raise anything
            raise SerializationError(
                f"cannot pickle the result of type {type(value).__qualname__}:"
                f" {type(error).__name__}: {error}"
            ) from error
    return value


# ---------------------------------------------------------------------- executables


class ProgramResult(NamedTuple):
    """How an executable ended, and what its client cannot read for itself."""

    outcome: Outcome
    host: str
    # Outputs that went to files, whole, where this worker does not see the client's directory.
    stdout_bytes: bytes | None = None
    stderr_bytes: bytes | None = None


class Program(NamedTuple):
    """An executable to start on a worker; its command line is in `words`."""

    plugin: str
    key: str
    executable: Executable
    words: list[str | Placeholder]  # in place of one comes the stdout of that parent
    folder: str  # of the client, for output files
    marker: str  # a file in it: a worker that finds it shares the folder


async def run_program(pickled: OpaqueBytes, parents: Sequence[Any] = ()) -> ProgramResult:
    """Run a pickled `Program` as a child of this worker's warden, and return how it ended.

    A coroutine, so that Dask awaits it on the worker's loop: it occupies a place like any task, but
    no thread waits for the child.

    Raises:
        ProgramFailed: its exit code is not 0, or it could not be started.
        Refused: it was stopped.
        CallFailed: it could not be tried.
    """
    program = cast("Program", serialization.loads(pickled.data, "executable"))
    tracker = _tracker(program.plugin)
    try:
        with tracker.running(program.key, has_started=False) as run:
            result = await tracker.run_child(run, program, parents)
    except (Refused, asyncio.CancelledError):
        raise
    except Exception as error:
        failure: Exception = _failed(program.key, error)
    else:
        if result.outcome.state == "DONE":
            return result
        if result.outcome.state == "CANCELED":
            raise Refused(program.key)
        failure = ProgramFailed(program.key, result)
    raise failure


class OpaqueBytes:
    """Pickled bytes that Dask does not look into."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return OpaqueBytes, (self.data,)


def _take_file(path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    return data


def _shares_folder(program: Program) -> bool:
    """Whether this worker sees the client's directory for output files."""
    return os.path.exists(program.marker)


def _execution(
    program: Program, parents: Sequence[Any], shares: bool, scratch: Callable[[], str]
) -> ExecutableRun:
    """Describe a run; `scratch` makes a directory of this worker."""
    words = [
        argument_str(fill(word, parents)) if isinstance(word, Placeholder) else word
        for word in program.words
    ]
    executable = program.executable._replace(words=words)
    # Ranks note failures in a directory of this worker: the task may run on another one, too.
    notes = scratch() if executable.ranks > 1 else None
    return ExecutableRun(executable, program.folder if shares else scratch(), notes)


# ---------------------------------------------------------------------- the worker's plugin


class _Run:
    """A task that runs on this worker, with what `TaskTracker.stop` needs to stop it."""

    __slots__ = ("child", "ended", "key", "loop", "started", "task")

    def __init__(self, key: str) -> None:
        self.key = key
        self.started: float | None = None  # seconds of time.monotonic()
        self.ended = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None  # of an async function
        self.task: asyncio.Task[Any] | None = None
        self.child: int | None = None  # of an executable: the runner's number of it

    async def watch(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run the coroutine of an async function, where it can be cancelled."""
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        return await coroutine


def _tracker(name: str) -> TaskTracker:
    return cast("TaskTracker", get_worker().plugins[name])


class TaskTracker(WorkerPlugin):
    """Knows the backend's tasks that run on this worker, reports their starts, and stops them.

    Args:
        name: of this plugin, and of the topic of its messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, worker: Worker) -> None:
        """Called by Dask when the plugin is installed."""
        self._worker = worker
        self._lock = threading.Lock()  # functions run on the worker's threads
        self._runs: dict[str, _Run] = {}
        self._refused: dict[str, None] = {}  # cancelled before they started, the latest last
        self._unreported: dict[str, _Run] = {}  # those that have started, in this order
        self._report_scheduled = False
        self._runner: ExecutableRunner | None = None
        self._scratch: str | None = None

    async def teardown(self, worker: Worker) -> None:
        """Called by Dask when the worker closes or the plugin is removed: ends the children."""
        if self._runner is not None:
            await self._runner.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def transition(self, key: str, start: str, finish: str, **_: Any) -> None:
        """Called by Dask when a key changes its state here: ends the child of one that is let go.

        The scheduler does not want it any more, for instance because its client has gone.
        """
        if (finish == "released" or finish == "cancelled") and key in self._runs:
            child = self._runs[key].child
            if child is not None and self._runner is not None:
                self._runner.kill(child, GRACE)

    @contextlib.contextmanager
    def running(self, key: str, *, has_started: bool = True) -> Iterator[_Run]:
        """Register a task while it runs; an executable has started when its child has.

        Raises:
            Refused: it was cancelled before.
        """
        run = _Run(key)
        with self._lock:
            if self._refused and key in self._refused:
                del self._refused[key]
                raise Refused(key)
            self._runs[key] = run
        if has_started:
            self._on_start(run)
        try:
            yield run
        finally:
            with self._lock:
                if self._runs.get(key) is run:
                    del self._runs[key]
                if self._unreported.get(key) is run:
                    del self._unreported[key]
            run.ended.set()

    # ------------------------------------------------------------------ reports

    def _on_start(self, run: _Run) -> None:
        run.started = time.monotonic()
        with self._lock:
            self._unreported[run.key] = run
            schedule = not self._report_scheduled
            self._report_scheduled = True
        if schedule:
            loop = self._worker.loop.asyncio_loop
            loop.call_soon_threadsafe(loop.call_later, _RUNNING_AFTER, self._report)

    def _report(self) -> None:
        """Tell the client which tasks have run for `_RUNNING_AFTER`. On the worker's loop."""
        now = time.monotonic()
        due: list[str] = []
        wait: float | None = None
        with self._lock:
            for key, run in self._unreported.items():
                assert run.started is not None
                wait = run.started + _RUNNING_AFTER - now
                if wait > 0.001:  # timers may fire a little early
                    break
                due.append(key)
            else:
                wait = None
            for key in due:
                del self._unreported[key]
            self._report_scheduled = wait is not None
        if wait is not None:
            asyncio.get_running_loop().call_later(wait, self._report)
        if due:
            message: Message = {"running": due, "worker": self._worker.address}
            self._worker.log_event(self.name, message)

    # ------------------------------------------------------------------ executables

    async def run_child(self, run: _Run, program: Program, parents: Sequence[Any]) -> ProgramResult:
        """Start a child and wait for its end."""
        if self._runner is None:
            self._runner = ExecutableRunner()
        shares = _shares_folder(program)
        execution = _execution(program, parents, shares, self._scratch_folder)
        run.child, ended = self._runner.start(execution, functools.partial(self._on_start, run))
        try:
            outcome = await ended
        except asyncio.CancelledError:
            self._runner.kill(run.child, GRACE)
            raise
        host = socket.gethostname()
        if shares:
            return ProgramResult(outcome, host)
        files = (outcome.stdout_file, outcome.stderr_file)
        data = [await asyncio.to_thread(_take_file, path) for path in files]
        return ProgramResult(outcome, host, *data)

    def _scratch_folder(self) -> str:
        """Return a folder of this worker, for the outputs of clients whose folder it lacks."""
        if self._scratch is None:
            self._scratch = tempfile.mkdtemp(prefix="rhapsody-", dir=self._worker.local_directory)
        return self._scratch

    # ------------------------------------------------------------------ stop

    async def stop(self, keys: list[str], grace: float) -> dict[str, StopResult]:
        """Stop tasks, and refuse those that have not started; returns what became of each."""
        found: dict[str, StopResult] = {}
        runs: list[_Run] = []
        with self._lock:
            for key in keys:
                if (run := self._runs.get(key)) is not None:
                    runs.append(run)
                elif key in self._worker.data:
                    found[key] = StopResult.DONE
                else:
                    self._refused[key] = None
                    found[key] = StopResult.ABSENT
            while len(self._refused) > _REFUSED_KEPT:
                del self._refused[next(iter(self._refused))]
        results = await asyncio.gather(*(self._stop(run, grace) for run in runs))
        return {**found, **{run.key: result for run, result in zip(runs, results, strict=True)}}

    async def _stop(self, run: _Run, grace: float) -> StopResult:
        if run.child is not None and self._runner is not None:
            self._runner.kill(run.child, grace)
        elif run.loop is not None and run.task is not None:
            with contextlib.suppress(RuntimeError):  # it ended just now, and its loop is closed
                run.loop.call_soon_threadsafe(run.task.cancel)
        else:
            return StopResult.BUSY
        loop = asyncio.get_running_loop()
        ended = await loop.run_in_executor(None, run.ended.wait, grace + 5.0)
        return StopResult.STOPPED if ended else StopResult.BUSY


async def stop_calls(
    name: str, keys: list[str], grace: float, dask_worker: Worker
) -> dict[str, StopResult]:
    """Stop tasks on a worker; for `Client.run`."""
    return await cast("TaskTracker", dask_worker.plugins[name]).stop(keys, grace)
