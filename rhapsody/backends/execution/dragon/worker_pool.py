"""The executor of V2: a pool of worker processes, with a queue to each node, kept at its size."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from rhapsody.runtime import serialization

from .executor import QueuedExecutor, Report
from .node.context import NativeQueue, RunContext
from .node.messages import WorkerLost, WorkerUp, pack_pool_task, spill
from .node.pool_worker import run_worker
from .placement import NodeAllocator, spread
from .processes import end_processes, host_policy
from .task import DragonTask

__all__ = ["WorkerPool"]

# Bytes of a task above which it goes through a file: a message lies in shared memory.
_LARGEST_MESSAGE = 1 << 20
_START = 60.0  # seconds for all workers to come up
_WATCH_EVERY = 1.0  # seconds between two looks at workers that have not come up yet
_FAILED_STARTS = 3  # workers in a row that ended before they were up
# Tasks in a node's queue, at most, and for how many seconds there shall be work in it: longer than
# the reports of ends take to come and the next tasks to go.
_LONGEST_QUEUE = 1024
_WORK_AHEAD = 0.02


class _Node:
    """The workers of one node, and their queue."""

    def __init__(self, queue: NativeQueue, workers: int) -> None:
        self.queue = queue
        self.workers = workers
        self.load = 0  # tasks that were sent and have not ended
        self._ended = 0
        self._since = 0.0
        self._rate = 0  # tasks that end within `_WORK_AHEAD`

    def room(self) -> int:
        """Return how many more tasks may go there: one for every worker, and some that wait.

        Few wait, because another node cannot take what waits here, and a cancel has to ask for it.
        """
        if time.monotonic() - self._since > 2 * _WORK_AHEAD:
            self._rate = 0  # what runs now may take longer
        waiting = min(max(1, self._rate), _LONGEST_QUEUE - self.workers)
        return self.workers + waiting - self.load

    @property
    def load_per_worker(self) -> float:
        """How many tasks there are for each worker."""
        return self.load / self.workers

    def on_ended(self) -> None:
        """Count a task that has ended."""
        self.load -= 1
        self._ended += 1
        now = time.monotonic()
        if (passed := now - self._since) > _WORK_AHEAD:
            self._rate = round(self._ended * _WORK_AHEAD / passed)
            self._ended, self._since = 0, now


class _WorkerKey(NamedTuple):
    """How the agents name a worker."""

    hostname: str
    pid: int


class WorkerPool(QueuedExecutor):
    """A pool of worker processes, which is kept at its size.

    Args:
        number: of the executor.
        context: of the backend.
        report: called for each event, on the thread of the pool.
        size: how many workers on all nodes together; None for one on each granted core.
        cwd: the folder that they start in.
        work_dir: returns the folder for tasks that are too large for a message.
    """

    def __init__(
        self,
        number: int,
        context: RunContext,
        report: Report,
        size: int | None,
        cwd: str,
        work_dir: Callable[[], str],
    ) -> None:
        super().__init__(number, context, report)
        self._size = size
        self._cwd = cwd
        self._work_dir = work_dir
        self._nodes: dict[str, _Node] = {}
        self._sent: dict[int, str] = {}  # the hosts that tasks were sent to, by number
        self._missing: list[str] = []  # hosts, a worker of which has to be replaced
        self._starting: dict[int, str] = {}  # hosts of workers that are not up yet, by puid
        self._up: dict[_WorkerKey, WorkerUp] = {}
        self._failed_starts = 0

    # ------------------------------------------------------------------ from other threads

    def open(self, allocator: NodeAllocator) -> None:
        """Start the workers, and wait until they are up. Blocks.

        Raises:
            TimeoutError: a worker ended, or did not come up in time.
        """
        native = importlib.import_module("dragon.native.queue")
        cores = allocator.nodes.cores
        self.workers = spread(self._size or sum(cores.values()), cores)
        for host, workers in self.workers.items():
            # On the node that reads it, so that an idle worker asks no other.
            queue = native.Queue(maxsize=_LONGEST_QUEUE, policy=host_policy(host))
            self._nodes[host] = _Node(queue, workers)
        for host, workers in self.workers.items():
            for _ in range(workers):
                self._start_worker(host)
        deadline = time.monotonic() + _START
        while self._starting:
            with self._changed:
                self._changed.wait_for(lambda: not self._starting, _WATCH_EVERY)
            self._find_failed_starts()
            if self._missing or time.monotonic() > deadline:
                raise TimeoutError(
                    f"of {sum(self.workers.values())} workers {len(self._up)} came up, and"
                    f" {len(self._missing)} ended before; their output is on stderr"
                )
        self._thread.start()

    def withdraw(self, task: DragonTask) -> bool:
        """Keep a task from being sent to a node; False where it was."""
        with self._changed:
            if task.number in self._sent:
                return False
            self._withdrawn.add(task)
            return True

    def drain(self) -> list[DragonTask]:
        """Give back the tasks that were not sent to a node."""
        with self._changed:
            drained = list(self._waiting)
            self._waiting.clear()
        return drained

    def hosts_of(self, task: DragonTask) -> set[str]:
        """Return the node that a task was sent to."""
        host = self._sent.get(task.number)
        return set() if host is None else {host}

    def on_task_ended(self, task: DragonTask) -> None:
        """Take note that a task has ended: its node has room for another."""
        with self._changed:
            if (host := self._sent.pop(task.number, None)) is not None:
                self._nodes[host].on_ended()
                if self._waiting:
                    self._changed.notify_all()

    def on_worker_up(self, worker: WorkerUp) -> None:
        """Take note that a worker takes tasks."""
        with self._changed:
            self._up[_WorkerKey(worker.hostname, worker.pid)] = worker
            self._starting.pop(worker.puid, None)
            self._failed_starts = 0
            self._changed.notify_all()

    def on_worker_lost(self, lost: WorkerLost) -> None:
        """Replace a worker that has died, if it was up; the pool watches the others itself."""
        with self._changed:
            if (worker := self._up.pop(_WorkerKey(lost.hostname, lost.pid), None)) is not None:
                self._missing.append(worker.host)
                self._changed.notify_all()

    def close(self) -> None:
        """End the workers, with what they run. Blocks, for good where a node is lost."""
        self._stop_thread()
        end_processes([*(worker.puid for worker in self._up.values()), *self._starting])
        for node in self._nodes.values():
            node.queue.destroy()

    # ------------------------------------------------------------------ the thread

    def _step(self) -> None:
        with self._changed:
            timeout = _WATCH_EVERY if self._starting else None
            self._changed.wait_for(self._has_work, timeout)
            if self._closing:
                return
            missing, self._missing = self._missing, []
            assigned = self._assign()
        for task, host in assigned:
            self._send(task, host)
        for host in missing:
            self._start_worker(host)
        if self._starting:
            self._find_failed_starts()

    def _has_work(self) -> bool:
        if self._closing or self._missing:
            return True
        return bool(self._waiting) and any(node.room() > 0 for node in self._nodes.values())

    def _assign(self) -> list[tuple[DragonTask, str]]:
        """Take the tasks that there is room for, each with the host that has the least to do."""
        assigned: list[tuple[DragonTask, str]] = []
        room = {host: node.room() for host, node in self._nodes.items()}
        while self._waiting:
            free = [host for host, left in room.items() if left > 0]
            if not free:
                break
            host = min(free, key=lambda host: self._nodes[host].load_per_worker)
            task = self._waiting.popleft()
            if task.ended or task in self._withdrawn:
                self._withdrawn.discard(task)
                continue
            room[host] -= 1
            self._nodes[host].load += 1
            self._sent[task.number] = host
            assigned.append((task, host))
        return assigned

    def _send(self, task: DragonTask, host: str) -> None:
        assert task.payload is not None
        path = os.path.join(self._work_dir(), f".{task.number}.task")
        data = spill(task.payload, path, _LARGEST_MESSAGE)
        self._nodes[host].queue.put(pack_pool_task(task.number, data))

    def _start_worker(self, host: str) -> None:
        native = importlib.import_module("dragon.native.process")
        tasks = serialization.dumps(self._nodes[host].queue, "queue")
        worker = native.Process(
            target=run_worker,
            args=(self._context, self.number, tasks, host),
            cwd=self._cwd,
            policy=host_policy(host),
        )
        worker.start()
        with self._changed:
            # It may be quicker than we are.
            if not any((up.puid, up.host) == (worker.puid, host) for up in self._up.values()):
                self._starting[worker.puid] = host

    def _find_failed_starts(self) -> None:
        """Find workers that ended before they were up: those no agent knows."""
        process = importlib.import_module("dragon.globalservices.process")
        if not (starting := list(self._starting)):
            return
        exited, _ = process.multi_join(starting, timeout=0)
        with self._changed:
            for puid, _ in exited or ():
                if (host := self._starting.pop(puid, None)) is not None:
                    self._missing.append(host)
                    self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS:
            raise RuntimeError(f"{self._failed_starts} workers in a row ended before they were up")
