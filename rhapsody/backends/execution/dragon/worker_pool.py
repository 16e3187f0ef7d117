"""The crews of V1 and V2, which take the place of Batch: processes of a task's own, and a pool.

As in `batch`, nothing of Dragon's is called on the event loop's thread. Each crew has one
thread that calls Dragon's global services, which in 0.15.0 lose an answer now and then where
several threads wait for one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rhapsody.runtime import serialization

from .batch import BatchExecutor, Hear, NodeAgents, spilled
from .node import pool_worker as remote
from .node.worker import GRACE, RunContext
from .placement import NodeAllocator, on_host, on_place, spread
from .task import TEMPLATE_KEYS, DragonTask

__all__ = ["LegacyNodeAgents", "ProcessGroupExecutor", "WorkerPool"]

# Bytes of an order from which on it goes through a file: a message lies in shared memory.
_LARGEST_MESSAGE = 1 << 20
# Seconds between two questions whether processes have ended: after a change, and at most.
_ASK_SOON = 0.01
_ASK_AT_MOST = 0.1
_START = 60.0  # seconds for the workers of a pool to come up
_WATCH_EVERY = 1.0  # seconds between two looks at workers that have not come up yet
_FAILED_STARTS = 3  # workers in a row that ended before they were up
# What waits in a node's queue, at most, and for how many seconds there shall be work in it: more
# than the news of ends take to come and the next orders to go.
_QUEUE = 1024
_AHEAD = 0.02


class LegacyNodeAgents(NodeAgents):
    """News from the nodes, with agents that can stop tasks, and say how many cores are granted."""

    agent = staticmethod(remote.agent)

    def _cores(
        self, cores: Mapping[str, int], cpus: Mapping[str, Sequence[int]]
    ) -> Mapping[str, int]:
        return {host: len(found) for host, found in cpus.items()}

    def halt(self, number: int, hosts: Iterable[str]) -> None:
        """Ask agents to let a task run there no more; each answers when that is so."""
        for host in hosts:
            self._orders[host].put(("halt", number))


class _Thread:
    """What the thread of a crew waits for."""

    def __init__(self, name: str) -> None:
        self.changed = threading.Condition()
        self.closing = False
        self._name = name
        self._thread: threading.Thread | None = None

    def start(self, run: Any) -> None:
        self._thread = threading.Thread(target=run, daemon=True, name=self._name)
        self._thread.start()

    def let_go(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()

    def join(self, timeout: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout)


def _end_all(puids: list[int]) -> None:
    """SIGTERM, grace, SIGKILL for processes of Dragon's. Blocks until they have ended."""
    process: Any = importlib.import_module("dragon.globalservices.process")
    for number in (signal.SIGTERM, signal.SIGKILL):
        for puid in puids:
            process.kill(puid, sig=number, hide_stderr=True)
        if not puids:
            return
        _, said = process.multi_join(puids, timeout=GRACE, join_all=True)
        puids = [puid for puid in puids if said[str(puid)][0] != 0]
    if puids:
        raise TimeoutError(f"{len(puids)} processes do not end")


# ---------------------------------------------------------------------- V1


class _Gang:
    """The processes of one task."""

    def __init__(self, flight: DragonTask) -> None:
        self.flight = flight
        self.puids: list[int] = []  # in rank order
        self.codes: dict[int, int] = {}
        self.group: Any = None  # the ProcessGroup of an MPI job


class ProcessGroupExecutor(BatchExecutor):
    """Starts processes for each task, as many at once as there are cores."""

    def __init__(self, number: int, site: RunContext, hear: Hear) -> None:
        super().__init__(number, site, hear)
        self._thread = _Thread("dragon-gangs")
        self._waiting: deque[DragonTask] = deque()
        self._gangs: list[_Gang] = []
        self._needs_turn = False  # the first that waits, which another backend has

    def open(
        self, num_nodes: int | None, places: NodeAllocator, batch_kwargs: Mapping[str, Any]
    ) -> None:
        """Start the thread."""
        self.workers = dict(places.nodes.cores)
        self._places = places
        self._thread.start(self._run)

    def submit(self, flights: list[DragonTask]) -> None:
        """Queue tasks for the thread."""
        with self._thread.changed:
            self._waiting += flights
            self._thread.changed.notify_all()

    def drain(self) -> list[DragonTask]:
        """Take back what has not been started. Blocks while something is."""
        with self._lock:
            drained = list(self._waiting)
            self._waiting.clear()
        return drained

    def close(self) -> None:
        """End what runs. Blocks, for good where a node is lost."""
        self._thread.let_go()
        self._thread.join(GRACE)
        _end_all([puid for gang in self._gangs for puid in gang.puids if puid not in gang.codes])
        for gang in self._gangs:
            self._leave(gang)

    def abandon(self) -> None:
        """Let the thread end, and ask Dragon nothing more: the runtime is broken."""
        self._thread.let_go()

    def _run(self) -> None:
        nap = _ASK_SOON
        try:
            while True:
                with self._thread.changed:
                    to_ask = self._gangs or self._needs_turn
                    if not self._thread.closing and (to_ask or not self._waiting):
                        self._thread.changed.wait(nap if to_ask else None)
                    if self._thread.closing:
                        return
                changed = self._start_what_fits()
                changed |= self._see_who_ended()
                nap = _ASK_SOON if changed else min(nap * 1.3, _ASK_AT_MOST)
        except Exception as error:  # Dragon's own, of any class
            if not self._thread.closing:
                self._hear(self, None, "broken", error)

    # ------------------------------------------------------------------ the crew's thread

    def _start_what_fits(self) -> bool:
        """Start tasks in the order in which they came, so that a wide job is not overtaken."""
        started = False
        while not self._thread.closing:
            with self._lock:  # whoever withdraws waits until it is started, and known
                if not self._waiting:
                    break
                flight = self._waiting[0]
                said = "gone" if self._is_gone(flight) else self._places.take(flight)
                self._needs_turn = said == "no turn"
                if self._needs_turn or (said == "no room" and self._gangs):
                    return started
                self._waiting.popleft()
                self._withdrawn.discard(flight)
                if said == "taken":
                    self._start(_Gang(flight))
                    started = True
                elif said == "no room":
                    self._hear(self, flight, "refused", RuntimeError("no node has room for it"))
        return started

    def _start(self, gang: _Gang) -> None:
        gang.flight.handle = gang
        try:
            self._start_processes(gang)
        except Exception as error:  # what Dragon finds wrong with a task has any class
            for puid in gang.puids:  # of the ranks before
                _end_all([puid])
            self._leave(gang)
            self._hear(self, gang.flight, "refused", error)
        else:
            self._gangs.append(gang)
            self._hear(self, gang.flight, "begun", None)

    def _start_processes(self, gang: _Gang) -> None:
        native: Any = importlib.import_module("dragon.native.process")
        flight = gang.flight
        if flight.pmi and flight.ranks() > 1:
            ranks = range(flight.ranks())
            gang.group = _group(
                flight.pmi, [self._rank(native.ProcessTemplate, gang, rank) for rank in ranks]
            )
            # Those that run, then those that have ended: one may be in both. Numbered by rank.
            running, ended = gang.group.puids, gang.group.inactive_puids
            gang.puids = sorted({*running, *(puid for puid, _ in ended)})
            return
        for rank in range(flight.ranks()):
            process = self._rank(native.Process, gang, rank)
            process.start()
            gang.puids.append(process.puid)

    def _rank(self, kind: Any, gang: _Gang, rank: int) -> Any:
        """Make a process, or a template of one, for a rank."""
        flight = gang.flight
        fields = {k: v for k, v in flight.jobs[rank][1].items() if k in TEMPLATE_KEYS}
        fields["env"] = {**fields["env"], remote.MARK: remote.mark(self._site, flight.number)}
        fields["policy"] = on_place(flight.places[rank], fields.get("policy"))
        target, args = self._target(flight, rank)
        if flight.data is not None:
            # What a function prints goes where that of a pool's workers goes, not into files.
            for stream in ("stdout", "stderr"):
                if str(fields[stream]).endswith(f"/{flight.uid}.{rank}.{stream}"):
                    del fields[stream]
        return kind(target, args=args, **fields)

    def _see_who_ended(self) -> bool:
        process: Any = importlib.import_module("dragon.globalservices.process")
        puids = [puid for gang in self._gangs for puid in gang.puids if puid not in gang.codes]
        if not puids:
            return False
        exited, _ = process.multi_join(puids, timeout=0)
        codes = dict(exited or ())
        for gang in self._gangs[:]:
            gang.codes |= {puid: codes[puid] for puid in gang.puids if puid in codes}
            if len(gang.codes) == len(gang.puids):
                self._gangs.remove(gang)
                self._hear(self, gang.flight, "exited", [gang.codes[puid] for puid in gang.puids])
                self._leave(gang)
        return bool(codes)

    def _leave(self, gang: _Gang) -> None:
        if gang.group is not None:
            # The exit codes are known; a group over several nodes raises here in 0.15.0.
            with contextlib.suppress(Exception):
                gang.group.close()
        self._places.give_back(gang.flight)


def _group(pmi: str, templates: list[Any]) -> Any:
    """Start the ranks of an MPI job, which the PMI has to know of as a group."""
    native: Any = importlib.import_module("dragon.native.process_group")
    facts: Any = importlib.import_module("dragon.infrastructure.facts")
    # Its own look at exit codes costs a core, and forgets those of the other ranks.
    group = native.ProcessGroup(pmi=facts.PMIBackend.from_str(pmi), ignore_error_on_exit=True)
    for template in templates:
        group.add_process(1, template)
    group.init()
    group.start()
    return group


# ---------------------------------------------------------------------- V2


class _Node:
    """The workers of one node, and what they have to do."""

    def __init__(self, queue: Any, workers: int) -> None:
        self.queue = queue
        self.workers = workers
        self.load = 0  # orders that have not ended
        self._ended = 0
        self._since = 0.0
        self._pace = 0  # orders that end in the time for which there shall be work in the queue

    def room(self) -> int:
        """How many more orders may go there: for every worker one, and some that wait.

        Few wait, for what waits here no other node can take, and a cancel has to ask for.
        """
        if time.monotonic() - self._since > 2 * _AHEAD:
            self._pace = 0  # what runs now is of another kind
        return self.workers + min(max(1, self._pace), _QUEUE - self.workers) - self.load

    @property
    def share(self) -> float:
        """How much there is to do for each worker."""
        return self.load / self.workers

    def over(self) -> None:
        """An order has ended."""
        self.load -= 1
        self._ended += 1
        now = time.monotonic()
        if (passed := now - self._since) > _AHEAD:
            self._pace = round(self._ended * _AHEAD / passed)
            self._ended, self._since = 0, now


class WorkerPool(BatchExecutor):
    """A pool of worker processes, which is kept at its size.

    Args:
        size: how many workers on all nodes together; None for one on each granted core.
        cwd: the folder that they start in.
        folder: returns the one for orders that are too large for a message.
    """

    def __init__(
        self,
        number: int,
        site: RunContext,
        hear: Hear,
        size: int | None,
        cwd: str,
        folder: Callable[[], str],
    ) -> None:
        super().__init__(number, site, hear)
        self._size = size
        self._cwd = cwd
        self._folder = folder
        self._thread = _Thread("dragon-pool")
        self._nodes: dict[str, _Node] = {}
        self._waiting: deque[DragonTask] = deque()
        self._out: dict[int, str] = {}  # the hosts that orders went to, by number
        self._missing: list[str] = []  # hosts, a worker of which has to be replaced
        self._fresh: dict[int, str] = {}  # hosts by puid: started, and not up yet
        # By the name that a node has for itself, and pid: puid and host.
        self._up: dict[tuple[str, int], tuple[int, str]] = {}
        self._failed = 0

    # ------------------------------------------------------------------ from outside

    def open(
        self, num_nodes: int | None, places: NodeAllocator, batch_kwargs: Mapping[str, Any]
    ) -> None:
        """Start the workers, and wait until they are up. Blocks."""
        nodes = places.nodes
        native: Any = importlib.import_module("dragon.native.queue")
        self.workers = spread(self._size or sum(nodes.cores.values()), nodes.cores)
        for host, workers in self.workers.items():
            # On the node that reads it, so that an idle worker asks no other.
            queue = native.Queue(maxsize=_QUEUE, policy=on_host(host))
            self._nodes[host] = _Node(queue, workers)
        for host, workers in self.workers.items():
            for _ in range(workers):
                self._start_worker(host)
        deadline = time.monotonic() + _START
        while self._fresh:
            with self._thread.changed:
                self._thread.changed.wait_for(lambda: not self._fresh, _WATCH_EVERY)
            self._watch()
            if self._missing or time.monotonic() > deadline:
                raise TimeoutError(
                    f"of {sum(self.workers.values())} workers {len(self._up)} came up, and"
                    f" {len(self._missing)} ended before; what they said is on stderr"
                )
        self._thread.start(self._run)

    def submit(self, flights: list[DragonTask]) -> None:
        """Queue tasks for the thread."""
        with self._thread.changed:
            self._waiting += flights
            self._thread.changed.notify_all()

    def withdraw(self, flight: DragonTask) -> bool:
        """Take a task back; False where a worker may have it already."""
        with self._thread.changed:
            if flight.number in self._out:
                return False
            self._withdrawn.add(flight)
            return True

    def drain(self) -> list[DragonTask]:
        """Take back what no node has been sent."""
        with self._thread.changed:
            drained = list(self._waiting)
            self._waiting.clear()
        return drained

    def hosts_of(self, flight: DragonTask) -> list[str]:
        """The node that a task went to."""
        host = self._out.get(flight.number)
        return [] if host is None else [host]

    def over(self, flight: DragonTask) -> None:
        """A task has ended."""
        with self._thread.changed:
            if (host := self._out.pop(flight.number, None)) is not None:
                self._nodes[host].over()
                if self._waiting:
                    self._thread.changed.notify_all()

    def on_up(self, host: str, name: str, pid: int, puid: int) -> None:
        """A worker has come up, on a host that calls itself by this name."""
        with self._thread.changed:
            self._up[name, pid] = puid, host
            self._fresh.pop(puid, None)
            self._failed = 0
            self._thread.changed.notify_all()

    def replace(self, name: str, pid: int) -> None:
        """A worker has died; one that had not come up is seen by its crew."""
        with self._thread.changed:
            if (worker := self._up.pop((name, pid), None)) is not None:
                self._missing.append(worker[1])
                self._thread.changed.notify_all()

    def close(self) -> None:
        """End the workers, with what they run. Blocks, for good where a node is lost."""
        self._thread.let_go()
        self._thread.join(GRACE)
        _end_all([*(puid for puid, _ in self._up.values()), *self._fresh])
        for node in self._nodes.values():
            node.queue.destroy()

    def abandon(self) -> None:
        """Let the thread end, and ask Dragon nothing more: the runtime is broken."""
        self._thread.let_go()

    # ------------------------------------------------------------------ the crew's thread

    def _run(self) -> None:
        try:
            while True:
                with self._thread.changed:
                    watched = _WATCH_EVERY if self._fresh else None
                    self._thread.changed.wait_for(self._something_to_do, watched)
                    if self._thread.closing:
                        return
                    missing, self._missing = self._missing, []
                    orders = self._assign()
                for flight, host in orders:
                    self._send(flight, host)
                for host in missing:
                    self._start_worker(host)
                if self._fresh:
                    self._watch()
        except Exception as error:  # Dragon's own, of any class
            if not self._thread.closing:
                self._hear(self, None, "broken", error)

    def _something_to_do(self) -> bool:
        if self._thread.closing or self._missing:
            return True
        return bool(self._waiting) and any(node.room() > 0 for node in self._nodes.values())

    def _assign(self) -> list[tuple[DragonTask, str]]:
        """Take what there is room for, and say where it goes: to the node with the least to do."""
        orders: list[tuple[DragonTask, str]] = []
        room = {host: node.room() for host, node in self._nodes.items()}
        while self._waiting:
            free = [host for host, left in room.items() if left > 0]
            if not free:
                break
            host = min(free, key=lambda host: self._nodes[host].share)
            flight = self._waiting.popleft()
            if flight.ended or flight in self._withdrawn:
                self._withdrawn.discard(flight)
                continue
            room[host] -= 1
            self._nodes[host].load += 1
            self._out[flight.number] = host
            orders.append((flight, host))
        return orders

    def _send(self, flight: DragonTask, host: str) -> None:
        assert flight.data is not None
        path = os.path.join(self._folder(), f".{flight.number}.order")
        data = spilled(flight.data, path, _LARGEST_MESSAGE)
        self._nodes[host].queue.put(pickle.dumps((flight.number, data), pickle.HIGHEST_PROTOCOL))

    def _start_worker(self, host: str) -> None:
        native: Any = importlib.import_module("dragon.native.process")
        orders = serialization.dumps(self._nodes[host].queue, "queue")
        worker = native.Process(
            target=remote.work,
            args=(self._site, self.number, orders, host),
            cwd=self._cwd,
            policy=on_host(host),
        )
        worker.start()
        with self._thread.changed:
            if (worker.puid, host) not in self._up.values():  # it may be quicker than we are
                self._fresh[worker.puid] = host

    def _watch(self) -> None:
        """See whether fresh workers have ended before they were up: those no agent knows."""
        process: Any = importlib.import_module("dragon.globalservices.process")
        if not (fresh := list(self._fresh)):
            return
        exited, _ = process.multi_join(fresh, timeout=0)
        with self._thread.changed:
            for puid, _ in exited or ():
                if (host := self._fresh.pop(puid, None)) is not None:
                    self._missing.append(host)
                    self._failed += 1
        if self._failed >= _FAILED_STARTS:
            raise RuntimeError(f"{self._failed} workers in a row ended before they were up")
