"""The agent of a node: sends heartbeats and what its workers do, revokes and stops tasks.

It is a process of Dragon's on each node. A worker of a Batch or of a pool writes the number of the
task that it runs to a file in the node's directory, where the agent reads it: so the agent knows
what has started, and which task a worker that dies has taken with it.

A task is stopped on the node where it runs: what a worker of a pool runs by a signal to that
worker, which raises an exception in the task; processes of a task's own by their environment, in
which they carry its mark, as do all that they have started. What does not end is killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue as queues
import re
import select
import shutil
import signal
import socket
import time

from rhapsody.launch.dragon.pmix import can_load_pmix
from rhapsody.runtime.machine.hardware import granted_cores

from .context import (
    GRACE,
    TASK_VARIABLE,
    NativeQueue,
    RunContext,
    node_directory,
    revoked_path,
    stop_path,
    task_mark,
)
from .messages import (
    Heartbeat,
    LeaveRequest,
    NodeInfo,
    NodeMessage,
    RevokeReply,
    RevokeRequest,
    StopReply,
    StopRequest,
    TaskStarted,
    WorkerLost,
    pack_messages,
)

__all__ = ["run_agent"]

_HEARTBEAT_EVERY = 0.5  # seconds
# Seconds for which the agent waits for a worker's death before it looks for what has started.
_LOOK_EVERY = 0.1
# Seconds between the request to stop and SIGKILL, by the signal that asks: a worker, which gets
# SIGUSR1, may be stopping an executable itself.
_KILL_AFTER = {signal.SIGTERM: GRACE, signal.SIGUSR1: GRACE + 2.0}


def run_agent(context: RunContext, requests: bytes, host: str) -> None:
    """Run the agent of a node until it gets a `LeaveRequest`.

    Args:
        context: of the backend.
        requests: the pickled queue for requests to this agent.
        host: the node's name in Dragon, which is `localhost` where it is the only one.
    """
    _Agent(context, pickle.loads(requests), host).run()


class _Worker:
    """A worker process of this node, and a descriptor that tells when it ends."""

    def __init__(self, path: str) -> None:
        self.path = path
        _, executor, pid = os.path.basename(path).split("-")
        self.executor = int(executor)
        self.pid = int(pid)
        self.reported = 0  # the task that was last reported as started
        self.pidfd = -1
        with contextlib.suppress(ProcessLookupError):  # it died before it was ever seen
            self.pidfd = os.pidfd_open(self.pid)

    def task(self) -> int:
        """Return the number of the task that it runs; 0 for none."""
        with open(self.path, "rb") as file:
            return int.from_bytes(file.read(8), "big")


class _Stop:
    """A request to stop a task, while something of the task is on this node."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.signalled: set[int] = set()  # pids

    def send(self, pid: int, number: signal.Signals) -> None:
        """Signal a process once, and kill it when its time is over."""
        with contextlib.suppress(ProcessLookupError):
            if time.monotonic() - self.began > _KILL_AFTER[number]:
                os.kill(pid, signal.SIGKILL)
            elif pid not in self.signalled:
                os.kill(pid, number)
        self.signalled.add(pid)


class _Agent:
    def __init__(self, context: RunContext, requests: NativeQueue, host: str) -> None:
        self._context = context
        self._to_driver: NativeQueue = pickle.loads(context.queue)
        self._requests = requests
        self._host = host
        self._hostname = socket.gethostname()
        self._directory = node_directory(context)
        self._workers: dict[str, _Worker] = {}
        self._stops: dict[int, _Stop] = {}
        self._poll = select.poll()

    def run(self) -> None:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        # Dragon's own process on this node, which started this one, would load the same library.
        cpus = sorted(granted_cores(), key=_first_thread)
        self._send(NodeInfo(self._host, os.getpid(), cpus, can_load_pmix()))
        next_heartbeat = 0.0
        try:
            while True:
                dead = self._wait_for_deaths()
                messages: list[NodeMessage] = [*self._find_started(), *self._stop_tasks()]
                messages += [self._reap(worker) for worker in dead]
                while (request := self._next_request()) is not None:
                    if isinstance(request, LeaveRequest):
                        return
                    if isinstance(request, StopRequest):
                        self._begin_stop(request)
                    elif isinstance(request, RevokeRequest):
                        messages.append(self._revoke(request))
                if time.monotonic() >= next_heartbeat:
                    next_heartbeat = time.monotonic() + _HEARTBEAT_EVERY
                    messages.append(Heartbeat(self._host))
                if messages:
                    self._send(*messages)
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
            for pids in self._marked_processes().values():  # the backend has gone
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def _send(self, *messages: NodeMessage) -> None:
        self._to_driver.put(pack_messages(*messages))

    def _next_request(self) -> object:
        try:
            return self._requests.get(timeout=0)
        except queues.Empty:
            return None

    # ------------------------------------------------------------------ workers

    def _wait_for_deaths(self) -> list[_Worker]:
        """Wait, no longer than `_LOOK_EVERY`, until a worker ends; return those that have ended."""
        ended = {-1, *(fd for fd, _ in self._poll.poll(_LOOK_EVERY * 1000))}
        return [worker for worker in self._workers.values() if worker.pidfd in ended]

    def _find_workers(self) -> None:
        with os.scandir(self._directory) as entries:
            paths = [entry.path for entry in entries if entry.name.startswith("worker-")]
        for path in paths:
            if path not in self._workers:
                worker = self._workers[path] = _Worker(path)
                if worker.pidfd >= 0:
                    self._poll.register(worker.pidfd, select.POLLIN)

    def _find_started(self) -> list[NodeMessage]:
        self._find_workers()
        started: list[NodeMessage] = []
        for worker in self._workers.values():
            number = worker.task()
            if number and number != worker.reported:
                worker.reported = number
                started.append(TaskStarted(number, self._hostname))
        return started

    def _reap(self, worker: _Worker) -> NodeMessage:
        if worker.pidfd >= 0:
            self._poll.unregister(worker.pidfd)
            os.close(worker.pidfd)
        del self._workers[worker.path]
        number = worker.task()
        os.unlink(worker.path)
        return WorkerLost(number, self._hostname, worker.executor, worker.pid)

    # ------------------------------------------------------------------ requests

    def _revoke(self, request: RevokeRequest) -> NodeMessage:
        # First this file, then a look at the workers, who do it the other way round: so either
        # the worker sees that the task is revoked, or we see that it runs.
        with open(revoked_path(self._directory, request.executor, request.number), "wb"):
            pass
        self._find_workers()
        ours = [worker for worker in self._workers.values() if worker.executor == request.executor]
        return RevokeReply(request, self._host, [worker.task() for worker in ours])

    def _begin_stop(self, request: StopRequest) -> None:
        with open(stop_path(self._directory, request.number), "wb"):
            pass
        self._stops[request.number] = _Stop()

    def _stop_tasks(self) -> list[NodeMessage]:
        """Signal what shall be stopped, and answer for what does not run here any more."""
        if not self._stops:
            return []
        in_workers = {worker.task(): worker.pid for worker in self._workers.values()}
        marked = self._marked_processes()
        replies: list[NodeMessage] = []
        for number, stop in list(self._stops.items()):
            if number in in_workers:
                stop.send(in_workers[number], signal.SIGUSR1)
            for pid in marked.get(number, ()):
                stop.send(pid, signal.SIGTERM)
            if number not in in_workers and number not in marked:
                del self._stops[number]
                replies.append(StopReply(number, self._host, bool(stop.signalled)))
        return replies

    def _marked_processes(self) -> dict[int, list[int]]:
        """Return the pids of this node's processes that carry the mark of a task, by its number."""
        start = f"{TASK_VARIABLE}={task_mark(self._context, 0)[:-1]}".encode()
        found: dict[int, list[int]] = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and (environ := _environ(name)) is not None:
                for entry in environ.split(b"\0"):
                    if entry.startswith(start):
                        found.setdefault(int(entry[len(start) :]), []).append(int(name))
        return found


def _first_thread(cpu: int) -> tuple[int, int]:
    """Return a key that sorts the hardware threads of one core together."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
            return int(re.split("[,-]", file.read())[0]), cpu
    except (OSError, ValueError):  # no such file in a sandbox: then each thread is a core
        return cpu, cpu


def _environ(pid: str) -> bytes | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:  # it has ended, or is another user's
        return None
