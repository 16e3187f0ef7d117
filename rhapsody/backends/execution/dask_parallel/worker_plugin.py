"""Runs on Dask's workers: functions, executables, and the plugin `TaskTracker`.

`TaskTracker` knows which of our calls run on its worker, reports their starts, stops them, and owns
the child processes. Workers need rhapsody installed, since all of this is pickled by reference; the
backend imports this module when it starts, because it needs Dask.
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
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import cloudpickle
from distributed import get_worker

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import SerializationError
from rhapsody.runtime.local.calls import call_function, strip_frames
from rhapsody.runtime.local.executables import Executable, ExecutableRun, ExecutableRunner, Outcome
from rhapsody.runtime.text import argument_str

if TYPE_CHECKING:  # typed or not, depending on the release of distributed

    class WorkerPlugin:
        """Dask's base class of worker plugins."""

else:
    from distributed.diagnostics.plugin import WorkerPlugin

#: Seconds after which a call that still runs is reported as RUNNING: a burst of short calls ends
#: without a word about each start.
RUNNING_AFTER = 0.05
#: Seconds between SIGTERM and SIGKILL.
GRACE = 2.0


class Refused(Exception):  # noqa: N818 - nobody sees it as an error
    """Raised in place of a call that was cancelled before it started, or an executable's end."""


class CallFailed(Exception):  # noqa: N818 - it only carries the author's error
    """Carries what a call raised, packed, so that any exception crosses as what it is.

    Dask itself pickles exceptions too, but replaces those that will not, and those that say much.
    """

    def __init__(self, key: str, words: str, packed: bytes) -> None:
        super().__init__(key, words, packed)
        self.key = key
        self.words = words
        self.packed = packed

    def __repr__(self) -> str:  # what Dask writes into the worker's log
        return self.words

    __str__ = __repr__


class ProgramFailed(Exception):  # noqa: N818 - it only carries the outcome
    """Carries how an executable failed, so that what depends on it does not run."""

    def __init__(self, key: str, result: ProgramResult) -> None:
        super().__init__(key, result)
        self.key = key
        self.result = result

    def __repr__(self) -> str:
        outcome = self.result.outcome
        return f"exit code {outcome.exit_code}: {outcome.stderr[-500:].strip()}"

    __str__ = __repr__


def _failed(key: str, error: BaseException) -> CallFailed:
    words = f"{type(error).__name__}: {error}"
    return CallFailed(key, words[:500], serialization.pack_exception(error))


class Call:
    """A pickled function and its pickled arguments; opaque to Dask.

    Dask takes apart and searches the tuples, lists and dicts that it is given, and its scheduler
    unpickles what it is given, for which it would need the author's modules. Bytes spare both.
    """

    __slots__ = ("arguments", "function", "key", "plugin")

    def __init__(self, plugin: str, key: str, function: bytes, arguments: bytes) -> None:
        self.plugin = plugin
        self.key = key
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return Call, (self.plugin, self.key, self.function, self.arguments)


class Slot:
    """Holds the place of a parent's result among the arguments of a call."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.number,)


def fill(value: Any, parents: Sequence[Any]) -> Any:
    """Put the parents' results in their places: at the top, and one level into containers."""
    results = [p.outcome.stdout if isinstance(p, ProgramResult) else p for p in parents]

    def one(inner: Any) -> Any:
        return results[inner.number] if type(inner) is Slot else inner

    if type(value) in (list, tuple, set):
        return type(value)(one(inner) for inner in value)
    if type(value) is dict:
        return {name: one(inner) for name, inner in value.items()}
    return one(value)


# ---------------------------------------------------------------------- functions

# The last functions that this worker unpickled. A burst is of one function more often than not.
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
        with _host(call.plugin).running(call.key) as run:
            function = _load_function(call.function)
            args, kwargs = serialization.loads(call.arguments, "arguments of the function")
            if parents:
                args = [fill(value, parents) for value in args]
                kwargs = {name: fill(value, parents) for name, value in kwargs.items()}
            return _checked(call_function(function, args, kwargs, watch=run.watch))
    except Refused:
        raise
    except BaseException as error:
        # SystemExit too: it is the function that ends, not the worker.
        strip_frames(error)
        failure = _failed(call.key, error)
    # Not from within the except: Dask pickles what an exception was raised in the wake of, too.
    raise failure


_PLAIN = (int, float, str, bytes, bool, complex, type(None), bytearray)


def _checked(value: Any) -> Any:
    """Return the value, if it can be pickled.

    Dask learns only while it sends a result that this one can't be pickled, fails all that travel
    with it, and tries again and again. Buffers (arrays) are not copied for the test.
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
    words: list[str | Slot]  # a slot: what a parent printed
    folder: str  # of the client, for output files
    marker: str  # a file there, by which a worker knows that it sees that folder


async def run_program(sealed: OpaqueBytes, parents: Sequence[Any] = ()) -> ProgramResult:
    """Run an executable as a child of this worker's warden and return how it ended.

    On the worker's loop: the child has the task's slot, and no thread waits for it.

    Raises:
        ProgramFailed: its exit code is not 0, or it could not be started.
        Refused: it was stopped.
        CallFailed: it could not even be tried.
    """
    program = cast("Program", serialization.loads(sealed.data, "executable"))
    host = _host(program.plugin)
    try:
        with host.running(program.key, announce=False) as run:  # its child announces itself
            result = await host.spawn(run, program, parents)
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


def _fetch(path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    return data


def _shares(program: Program) -> bool:
    """Whether this worker sees the client's directory for output files."""
    return os.path.exists(program.marker)


def _execution(
    program: Program, parents: Sequence[Any], shares: bool, scratch: Callable[[], str]
) -> ExecutableRun:
    """Describe a run; `scratch` makes a directory of this worker."""
    words = [
        argument_str(fill(word, parents)) if isinstance(word, Slot) else word
        for word in program.words
    ]
    executable = program.executable._replace(words=words)
    # Ranks note failures in a directory of this worker: the task may run on another one, too.
    notes = scratch() if executable.ranks > 1 else None
    return ExecutableRun(executable, program.folder if shares else scratch(), notes)


# ---------------------------------------------------------------------- the worker's plugin


class _Run:
    """A call that runs; what `TaskTracker.stop` needs to stop it."""

    __slots__ = ("child", "ended", "key", "loop", "task")

    def __init__(self, key: str) -> None:
        self.key = key
        self.ended = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task[Any] | None = None
        self.child: int | None = None

    async def watch(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run the coroutine of an async function, where it can be cancelled."""
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        return await coroutine


class _Running:
    """Registers a call for as long as it runs."""

    __slots__ = ("announce", "host", "run")

    def __init__(self, host: TaskTracker, key: str, announce: bool) -> None:
        self.host = host
        self.run = _Run(key)
        self.announce = announce

    def __enter__(self) -> _Run:
        self.host._begin(self.run, self.announce)
        return self.run

    def __exit__(self, *exc: object) -> None:
        self.host._end(self.run)


def _host(name: str) -> TaskTracker:
    return cast("TaskTracker", get_worker().plugins[name])


class TaskTracker(WorkerPlugin):
    """Knows the calls that run on this worker, reports their starts, and stops them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, worker: Any) -> None:
        """Called by Dask when the worker has the plugin."""
        self.worker = worker
        self.lock = threading.Lock()
        self.runs: dict[str, _Run] = {}
        self.refused: dict[str, None] = {}  # cancelled before they started, the latest last
        self.fresh: list[str] = []  # started, and not reported yet
        self.runner: ExecutableRunner | None = None
        self.scratch: str | None = None

    async def teardown(self, worker: Any) -> None:
        """Called by Dask when the worker closes or the plugin goes: the children go too."""
        if self.runner is not None:
            await self.runner.close()
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """A task that the scheduler wants no more (its client has gone) loses its child."""
        if (finish == "released" or finish == "cancelled") and key in self.runs:
            child = self.runs[key].child
            if child is not None and self.runner is not None:
                self.runner.kill(child, GRACE)

    def running(self, key: str, *, announce: bool = True) -> _Running:
        """A context in which a call runs; entering it raises Refused for one that was cancelled."""
        return _Running(self, key, announce)

    def _begin(self, run: _Run, announce: bool) -> None:
        with self.lock:
            if self.refused and run.key in self.refused:
                del self.refused[run.key]
                raise Refused(run.key)
            self.runs[run.key] = run
        if announce:
            self._announce(run.key)

    def _announce(self, key: str) -> None:
        with self.lock:
            first = not self.fresh
            self.fresh.append(key)
        if first:
            loop = self.worker.loop.asyncio_loop
            loop.call_soon_threadsafe(loop.call_later, RUNNING_AFTER, self._report)

    def _end(self, run: _Run) -> None:
        with self.lock:
            if self.runs.get(run.key) is run:
                del self.runs[run.key]
        run.ended.set()

    def _report(self) -> None:
        """Tell the client which calls have started and still run."""
        with self.lock:
            fresh, self.fresh = self.fresh, []
            keys = [key for key in fresh if key in self.runs]
        if keys:
            self.worker.log_event(self.name, {"running": keys, "worker": self.worker.address})

    async def spawn(self, run: _Run, program: Program, parents: Sequence[Any]) -> ProgramResult:
        """Start a child and wait for its end."""
        if self.runner is None:
            self.runner = ExecutableRunner()
        shares = _shares(program)
        execution = _execution(program, parents, shares, self._scratch)
        announce = functools.partial(self._announce, program.key)
        run.child, ended = self.runner.start(execution, announce)
        try:
            outcome = await ended
        except asyncio.CancelledError:
            self.runner.kill(run.child, GRACE)
            raise
        host = socket.gethostname()
        if shares:
            return ProgramResult(outcome, host)
        files = (outcome.stdout_file, outcome.stderr_file)
        return ProgramResult(outcome, host, *[await asyncio.to_thread(_fetch, f) for f in files])

    def _scratch(self) -> str:
        """A folder of this worker, for outputs that a client elsewhere cannot have in its own."""
        if self.scratch is None:
            self.scratch = tempfile.mkdtemp(prefix="rhapsody-", dir=self.worker.local_directory)
        return self.scratch

    async def stop(self, keys: list[str], grace: float) -> dict[str, str]:
        """Stop calls; returns for each key that is here or was never seen what became of it.

        `stopped`: it ran and has ended; `busy`: it runs and can't be interrupted; `done`: its
        result is here; `absent`: it has not started here, and now never will.
        """
        found: dict[str, str] = {}
        runs: list[_Run] = []
        with self.lock:
            for key in keys:
                if (run := self.runs.get(key)) is not None:
                    runs.append(run)
                elif key in self.worker.data:
                    found[key] = "done"
                else:
                    self.refused[key] = None
                    found[key] = "absent"
            while len(self.refused) > 100_000:
                del self.refused[next(iter(self.refused))]
        for run, word in zip(
            runs, await asyncio.gather(*(self._stop(run, grace) for run in runs)), strict=True
        ):
            found[run.key] = word
        return found

    async def _stop(self, run: _Run, grace: float) -> str:
        if run.child is not None and self.runner is not None:
            self.runner.kill(run.child, grace)
        elif run.loop is not None and run.task is not None:
            with contextlib.suppress(RuntimeError):  # it ended just now, and its loop is closed
                run.loop.call_soon_threadsafe(run.task.cancel)
        else:
            return "busy"
        loop = asyncio.get_running_loop()
        ended = await loop.run_in_executor(None, run.ended.wait, grace + 5.0)
        return "stopped" if ended else "busy"


async def stop_calls(
    name: str, keys: list[str], grace: float, dask_worker: Any = None
) -> dict[str, str]:
    """What `Client.run` calls on each worker to stop calls there."""
    return await cast("TaskTracker", dask_worker.plugins[name]).stop(keys, grace)
