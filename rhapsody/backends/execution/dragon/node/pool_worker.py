"""A worker process of a pool: runs the tasks of its node's queue, and stops one at a signal."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue as queues
import signal
import socket
import time

from .context import NativeQueue, RunContext, stop_path
from .messages import WorkerUp, unpack_pool_task, unpack_task, unspill
from .worker import Revoked, Stopped, WorkerChannel

__all__ = ["run_worker"]

# Seconds between two looks for a task, of a worker that has just had one and of an idle one.
# Dragon's own wait for a message costs three times the CPU of the latter.
_LOOK_SOON = 0.0005
_LOOK_IDLE = 0.02


def run_worker(context: RunContext, executor: int, tasks: bytes, host: str) -> None:
    """Run tasks, one after another, until this process is ended.

    Args:
        context: of the backend.
        executor: the number of the pool.
        tasks: the pickled queue of the node's tasks.
        host: the node's name in Dragon.
    """
    _PoolWorker(context, executor, pickle.loads(tasks), host).run()


class _PoolWorker:
    def __init__(self, context: RunContext, executor: int, tasks: NativeQueue, host: str) -> None:
        self._tasks = tasks
        self._channel = WorkerChannel(context, executor)
        self._running = 0  # the number of the task that may be stopped
        signal.signal(signal.SIGUSR1, self._on_signal)
        parameters = importlib.import_module("dragon.infrastructure.parameters")
        puid = parameters.this_process.my_puid
        self._channel.send(WorkerUp(host, socket.gethostname(), os.getpid(), puid))

    def run(self) -> None:
        pause = _LOOK_SOON
        while True:
            try:
                item = self._tasks.get(timeout=0)
            except queues.Empty:
                time.sleep(pause)
                pause = min(pause * 1.5, _LOOK_IDLE)
                continue
            pause = _LOOK_SOON
            with contextlib.suppress(Revoked, Stopped):
                self._run_task(item)

    def _run_task(self, item: object) -> None:
        task = unpack_pool_task(item)
        began = time.monotonic()
        self._running = task.number
        try:
            self._channel.begin(task.number)
            message = unpack_task(unspill(task.data))
            if os.path.exists(stop_path(self._channel.directory, task.number)):
                return
            result = self._channel.run(task.number, message)
            self._running = 0  # from here on it has ended, and is not stopped any more
            self._channel.report_end(task.number, result, began)
        finally:
            self._running = 0
            self._channel.end()

    def _on_signal(self, *_: object) -> None:
        """Stop the task that runs, if it is to be stopped: the signal may be meant for another."""
        number = self._running
        if number and os.path.exists(stop_path(self._channel.directory, number)):
            self._running = 0  # once
            raise Stopped(number)
