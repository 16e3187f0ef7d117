"""Runs tasks on a node: in the workers of a Batch or of a pool, and as ranks of a job.

A worker runs a function on its own thread, as one of Dragon's, so that the function can use what
Dragon offers; an executable runs as a child of that worker. The number of the task that it runs is
in a file of the node's directory, where the agent reads it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import threading
import time
from concurrent.futures import Future, wait

from rhapsody.runtime import serialization
from rhapsody.runtime.local.calls import call_function, strip_frames
from rhapsody.runtime.local.executables import (
    ExecutableRun,
    ExecutableRunner,
    Outcome,
    describe,
    start_error,
)

from .context import GRACE, NativeQueue, RunContext, node_directory, revoked_path
from .messages import (
    CallEnded,
    CallResult,
    ExecutableEnded,
    ExecutableResult,
    NodeMessage,
    RankEnded,
    TaskMessage,
    TaskResult,
    TaskStarted,
    pack_messages,
    spill,
    unpack_task,
)

__all__ = ["Revoked", "Stopped", "WorkerChannel", "run_rank", "run_task"]

# Bytes of a result above which it goes through a file: a queue's message lies in shared memory.
_LARGEST_RESULT = 16 << 20
# Dragon cancels by an exception that it raises in a thread, which gets it when it wakes: seconds.
_WAKE_EVERY = 0.1


class Revoked(Exception):  # noqa: N818 - nobody sees it as an error
    """Raised in place of a task that was cancelled before it started."""


class Stopped(BaseException):
    """Raised in a task that is cancelled while it runs, by a signal to its worker."""


class WorkerChannel:
    """What a worker process has for its tasks: the file of its task, and the way to the driver.

    Args:
        context: of the backend.
        executor: the number of the executor that the worker belongs to.
    """

    def __init__(self, context: RunContext, executor: int) -> None:
        self.directory = node_directory(context)
        self._queue: NativeQueue = pickle.loads(context.queue)
        self._executor = executor
        self._hostname = socket.gethostname()
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        path = os.path.join(self.directory, f"worker-{executor}-{os.getpid()}")
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._executables: _Executables | None = None

    def begin(self, number: int) -> None:
        """Write down a task, then see whether it is revoked; the agent does it the other way round.

        Raises:
            Revoked: it must not start.
        """
        os.pwrite(self._file, number.to_bytes(8, "big"), 0)
        if os.path.exists(revoked_path(self.directory, self._executor)) or os.path.exists(
            revoked_path(self.directory, self._executor, number)
        ):
            self.end()
            raise Revoked(number)

    def run(self, number: int, message: TaskMessage) -> TaskResult:
        """Run a task to its end."""
        if message.call is not None:
            return run_call(message.call, os.path.join(message.directory, f".{number}.result"))
        if self._executables is None:
            self._executables = _Executables()
        return self._executables.run(message)

    def end(self) -> None:
        """Write down that no task runs."""
        os.pwrite(self._file, bytes(8), 0)

    def report_end(self, number: int, result: TaskResult, began: float) -> None:
        """Send how a task ended that `began` at this time of `time.monotonic()`."""
        seconds = time.monotonic() - began
        if isinstance(result, CallResult):
            self.send(CallEnded(number, *result, self._hostname, seconds))
        else:
            self.send(ExecutableEnded(number, *result, self._hostname, seconds))

    def send(self, message: NodeMessage) -> None:
        """Send a message to the driver."""
        self._queue.put(pack_messages(message))


_channels: dict[tuple[RunContext, int], WorkerChannel] = {}


def run_task(context: RunContext, executor: int, number: int, data: bytes) -> None:
    """Run a task in this worker of a Batch, and send how it ended."""
    channel = _channels.get((context, executor))
    if channel is None:
        channel = _channels[context, executor] = WorkerChannel(context, executor)
    began = time.monotonic()
    channel.begin(number)
    try:
        channel.report_end(number, channel.run(number, unpack_task(data)), began)
    finally:
        channel.end()


def run_call(call: bytes, path: str) -> CallResult:
    """Run a pickled call; a large result goes to a file at `path`."""
    try:
        size = int.from_bytes(call[:4], "big")
        function = serialization.loads(call[4 : 4 + size], "function")
        args, kwargs = serialization.loads(call[4 + size :], "arguments of the function")
        data = serialization.dumps(call_function(function, args, kwargs), "result")
    except BaseException as error:
        # Dragon's own way to end a thread, and ours to end what a worker of a pool runs.
        if isinstance(error, Stopped) or type(error).__name__ == "_FunctionTaskCancelled":
            raise
        # SystemExit too: it is the function that ends, not the process.
        strip_frames(error)
        return CallResult(False, serialization.pack_exception(error))
    return CallResult(True, spill(data, path, _LARGEST_RESULT))


class _Executables:
    """Runs executables, one at a time, as children of this process.

    On an event loop of its own, so that this worker's thread wakes when Dragon cancels the task.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._runner: ExecutableRunner | None = None
        self._key: int | None = None  # of the run
        threading.Thread(target=self._loop.run_forever, daemon=True, name="rhapsody-local").start()

    def run(self, message: TaskMessage) -> ExecutableResult:
        """Run an executable to its end."""
        ended: Future[Outcome] = Future()
        self._loop.call_soon_threadsafe(self._start, message, ended)
        try:
            while not wait([ended], _WAKE_EVERY).done:
                pass
        except BaseException:
            # It is cancelled, which is true only when the child has ended.
            self._loop.call_soon_threadsafe(self._kill)
            wait([ended])
            raise
        error = ended.exception()
        if isinstance(error, Exception):
            packed = serialization.pack_exception(start_error(error, "dragon"))
            return ExecutableResult("FAILED", {"exception": packed})
        outcome = ended.result()
        fields = outcome.fields()
        if outcome.error is not None:
            fields["exception"] = serialization.pack_exception(outcome.error)
        for name in ("started", "ended"):  # of this machine's clock
            del fields[name]
        return ExecutableResult(outcome.state, fields)

    def _start(self, message: TaskMessage, ended: Future[Outcome]) -> None:
        assert message.executable is not None
        self._key = None
        try:
            if self._runner is None:
                self._runner = ExecutableRunner("dragon")
            run = ExecutableRun(describe(message.executable), message.directory)
            self._key, outcome = self._runner.start(run)
        except Exception as error:  # the task's own, such as a directory that is not there
            ended.set_exception(error)
            return

        def copy(outcome: asyncio.Future[Outcome]) -> None:
            if (error := outcome.exception()) is not None:
                ended.set_exception(error)
            else:
                ended.set_result(outcome.result())

        outcome.add_done_callback(copy)

    def _kill(self) -> None:
        if self._runner is not None and self._key is not None:
            self._runner.kill(self._key, GRACE)


def run_rank(context: RunContext, number: int, rank: int, call: bytes | str, path: str) -> None:
    """Run a function as a rank, in a process that Dragon started for it, and send its result.

    Args:
        context: of the backend.
        number: of the task.
        rank: of this process.
        call: the pickled call, or the path of a file with it, which all ranks read.
        path: where a large result goes, without the number of the rank.
    """
    queue: NativeQueue = pickle.loads(context.queue)
    if isinstance(call, str):
        with open(call, "rb") as file:
            call = file.read()
    queue.put(pack_messages(TaskStarted(number, socket.gethostname())))
    queue.put(pack_messages(RankEnded(number, rank, *run_call(call, f"{path}.{rank}"))))
