"""A worker process of a pool, as its driver holds it: started, written to, ended or reaped."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from . import pool_worker
from .children import Children
from .frames import FrameSocket, keep_from_forks
from .worker_termination import kill_group, workers

__all__ = ["WorkerProcess", "WorkerSpec", "start_worker"]

_EXIT_WAIT = 5.0  # seconds for an idle worker to run its exit handlers

# Each start of a process polls those before it, and an exit code can be read once only: of two
# threads that read it together one is told 255, or nothing.
_reaping = threading.Lock()


@dataclass(frozen=True)
class WorkerSpec:
    """How workers are made: as the arguments of `ProcessPoolExecutor` of these names."""

    mp_context: BaseContext
    initializer: Callable[..., Any] | None = None
    initargs: tuple[Any, ...] = ()
    max_tasks_per_child: int | None = None


def start_worker(
    spec: WorkerSpec, loop: asyncio.AbstractEventLoop, children: Children
) -> WorkerProcess:
    """Start a worker on the loop's thread, from another one.

    Not on the calling one: a process forked while another thread is inside `subprocess` inherits,
    and holds open, the pipe by which that one learns that its child has started.

    Raises:
        BaseException: whatever the system, the context's own start, or a Ctrl-C in it raises.
    """
    started: Future[WorkerProcess] = Future()

    def start() -> None:
        try:
            started.set_result(WorkerProcess(spec, loop, children))
        except BaseException as error:
            started.set_exception(error)

    loop.call_soon_threadsafe(start)
    return started.result()


class WorkerProcess:
    """A worker process and the connection to it. Made on the loop's thread.

    Args:
        spec: how to make it.
        loop: of the driver.
        children: guards its process group; used on the loop's thread only.
    """

    def __init__(
        self, spec: WorkerSpec, loop: asyncio.AbstractEventLoop, children: Children
    ) -> None:
        self._loop = loop
        self._children = children
        self._send_lock = threading.Lock()
        self.calls_done = 0
        ours, theirs = socket.socketpair()
        keep_from_forks(ours)
        try:
            self._process: BaseProcess = spec.mp_context.Process(  # type: ignore[attr-defined]
                target=pool_worker.main,
                args=(theirs, spec.initializer, spec.initargs),
                daemon=False,
            )
            with theirs, _reaping:
                self._process.start()
            assert self._process.pid is not None
            self.pid: int = self._process.pid
            children.guard(self.pid)
        except BaseException:
            ours.close()
            raise
        workers.add(self._process)
        self.connection = FrameSocket(ours)

    def send(self, kind: bytes, data: bytes = b"") -> None:
        """Send a frame, from any thread; lost where the worker has died, as its reader finds."""
        with self._send_lock:
            try:
                self.connection.send(kind, data)
            except OSError:
                return

    def reap(self) -> int | None:
        """Close the connection to a worker that has died; returns its exit code."""
        self._close()
        kill_group(self.pid, signal.SIGKILL)
        with _reaping:  # it was killed above, so that this takes no time
            self._process.join()
            code = self._process.exitcode
        self._unguard()
        return code

    def end(self) -> None:
        """Have an idle worker run its exit handlers and end; it is killed where it does not."""
        self.send(pool_worker.QUIT)
        self._process.join(_EXIT_WAIT)
        kill_group(self.pid, signal.SIGKILL)
        self._process.join()
        self._unguard()
        self._close()

    def _close(self) -> None:
        with self._send_lock:
            self.connection.sock.close()

    def _unguard(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._children.unguard, self.pid)
        except RuntimeError:  # the loop is closed, and the warden gone with it
            return
