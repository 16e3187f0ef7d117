"""The driver's end of Dragon: Batches, the news from the nodes, and the threads that wait for both.

Nothing of Dragon's is called on the event loop's thread, because all of it may block for good once
a node is lost. What these threads hear they hand to the loop, as calls of `hear`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import pickle
import queue as queues
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rhapsody.runtime import serialization

from .node import worker as remote
from .placement import NodeAllocator, on_host, on_place
from .task import TEMPLATE_KEYS, DragonTask, Nodes
from .topology import find_nodes, workers_per_node

__all__ = ["BatchExecutor", "NodeAgents", "spilled"]

logger = logging.getLogger(__name__)

Hear = Callable[..., None]

# Bytes of shared memory for Batch's own results, per node: ours do not pass there.
_RESULTS = 128 << 20
# Bytes of a call from which on it goes through a file: Dragon takes 128 KiB for all arguments of a
# process.
_LARGEST_ARGUMENT = 64 << 10
_AGENT_START = 60.0  # seconds for the first beat of every node
# Seconds between two looks for news, while tasks are in flight and while there are none. Dragon's
# own wait for a message costs more CPU, and cannot be ended.
_LOOK_EVERY = 0.005
_IDLE_EVERY = 0.1
_BURST = 256  # messages taken at once
_POLL = 0.25  # seconds for which a thread waits for Batch, before it looks for what has begun
_LOOKED_AT = 64  # jobs of which it is looked whether they have begun, in their order


class NodeAgents:
    """The agents of the nodes and the news from there.

    Args:
        hear: called with a list of news, on a thread of its own.
        busy: says whether tasks are in flight.
    """

    agent = staticmethod(remote.agent)  # what runs on each node

    def __init__(self, hear: Callable[[list[tuple[Any, ...]]], None]) -> None:
        self._hear = hear
        self._queue: Any = None
        self._orders: dict[str, Any] = {}
        self._agents: list[Any] = []
        self._leaving = threading.Event()
        self.busy = threading.Event()
        self.beats: dict[str, float] = {}  # by host: when its last beat was heard
        self.facts: dict[str, dict[str, Any]] = {}  # by host: an agent's first word
        self.site = remote.RunContext("", b"")
        self.places = NodeAllocator(Nodes({}, {}, {}))

    def open(self, num_nodes: int | None) -> None:
        """Start an agent on each node, and wait for their first beats. Blocks."""
        native: Any = importlib.import_module("dragon.native.queue")
        found = find_nodes(num_nodes)
        cores = {node.host: node.cores for node in found}
        gpus = {node.host: node.gpus for node in found}
        self._queue = native.Queue()
        self.site = remote.RunContext(
            secrets.token_hex(16), serialization.dumps(self._queue, "queue")
        )
        for host in cores:
            # On the node that reads it: an agent that has nothing to do asks no other node.
            self._orders[host] = native.Queue(policy=on_host(host))
            self._start_agent(host)
        threading.Thread(target=self._read, daemon=True, name="dragon-news").start()
        deadline = time.monotonic() + _AGENT_START
        while missing := cores.keys() - self.beats.keys():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no sign of life from {', '.join(sorted(missing))}")
            time.sleep(_LOOK_EVERY)
        cpus = {host: self.facts[host]["cpus"] for host in cores}
        without_pmix = [host for host in cores if not self.facts[host]["pmix"]]
        self.places = NodeAllocator(Nodes(self._cores(cores, cpus), gpus, cpus, without_pmix))

    @property
    def nodes(self) -> Nodes:
        """What there is, when it is open."""
        return self.places.nodes

    def _cores(
        self, cores: Mapping[str, int], cpus: Mapping[str, Sequence[int]]
    ) -> Mapping[str, int]:
        """How many ranks each node can have at once: as Batch counts, or by its CPUs."""
        return cores

    def _start_agent(self, host: str) -> None:
        process: Any = importlib.import_module("dragon.native.process")
        orders = serialization.dumps(self._orders[host], "queue")
        agent = process.Process(
            target=self.agent, args=(self.site, orders, host), policy=on_host(host)
        )
        agent.start()
        self._agents.append(agent)

    def revoke(self, crew: int, number: int | None) -> None:
        """Ask the agents to let a task, or all of a crew, not begin; each answers with news."""
        for orders in self._orders.values():
            orders.put((crew, number))

    def close(self) -> None:
        """Let the agents go. Blocks, for good where a node is lost."""
        self._leaving.set()
        for orders in self._orders.values():
            orders.put("leave")
        for agent in self._agents:
            agent.join(timeout=5.0)
        for queue in [*self._orders.values(), self._queue]:
            queue.destroy()

    def abandon(self) -> None:
        """Read no more: the runtime is broken, or left."""
        self._leaving.set()
        self.places.leave()

    def _read(self) -> None:
        while not self._leaving.is_set():
            news = self._take()
            if news:
                now = time.monotonic()
                for one in news:
                    if one[0] == "beat":
                        self.beats[one[1]] = now
                    elif one[0] == "facts":
                        self.facts[one[1]] = one[2]
                self._hear(news)
            else:
                time.sleep(_LOOK_EVERY if self.busy.is_set() else _IDLE_EVERY)

    def _take(self) -> list[tuple[Any, ...]]:
        news: list[tuple[Any, ...]] = []
        for _ in range(_BURST):
            try:
                data = self._queue.get(timeout=0)
            except queues.Empty:
                break
            except Exception:
                if not self._leaving.is_set():  # else it was destroyed under us, as it should be
                    logger.exception("the news from Dragon's nodes cannot be read any more")
                    self._leaving.set()
                break
            news += pickle.loads(data)
        return news


class BatchExecutor:
    """One Batch with its workers, and the tasks that it has.

    A worker that a function took down is lost to its Batch for good. So a crew that has lost one
    gets no new tasks, and another crew takes its place.

    Args:
        number: tells it from the crews before it.
        site: what the nodes have to know.
        hear: called with (crew, flight, word, value) on one of the crew's threads.
    """

    def __init__(self, number: int, site: remote.RunContext, hear: Hear) -> None:
        self.number = number
        self.batch: Any = None
        self.flights: dict[str, DragonTask] = {}
        self.workers: dict[str, int] = {}
        self.retired = False
        self.leaving = False
        self._site = site
        self._hear = hear
        self._lock = threading.Lock()
        self._early: set[str] = set()  # ended before they were registered
        self._withdrawn: set[DragonTask] = set()
        self._unbegun: dict[str, DragonTask] = {}  # jobs, by the file that their first rank opens
        self._work: queues.SimpleQueue[list[DragonTask] | None] = queues.SimpleQueue()
        self._closing = False
        self._given_up = False
        self._places: NodeAllocator

    def open(
        self, num_nodes: int | None, places: NodeAllocator, batch_kwargs: Mapping[str, Any]
    ) -> None:
        """Make the Batch, and start the threads. Blocks."""
        batch: Any = importlib.import_module("dragon.workflows.batch.batch")
        nodes = places.nodes
        self._places = places
        places.on_free(self._look_again)
        settings = {
            "workers_per_node": workers_per_node(nodes.cores),
            "results_ddict_mem": _RESULTS * len(nodes.cores),
            **batch_kwargs,
        }
        made = batch.Batch(num_nodes=num_nodes, **settings)
        with self._lock:
            self.batch = made
            unwanted = self._given_up
        if unwanted:
            self.close()
            return
        topology = self.batch.topology()
        for hosts, workers in zip(topology.pool_hostnames, topology.workers_per_pool, strict=True):
            self.workers[hosts[0]] = workers
        threading.Thread(target=self._submit_all, daemon=True, name="dragon-submit").start()
        threading.Thread(target=self._poll, daemon=True, name="dragon-poll").start()

    def give_up(self) -> None:
        """Let a crew end that is still being opened, on a thread that nobody waits for."""
        with self._lock:
            self._given_up = True
            made = self.batch is not None
        if made:
            threading.Thread(target=self.close, daemon=True, name="dragon-close").start()

    def submit(self, flights: list[DragonTask]) -> None:
        """Hand over tasks, from any thread."""
        self._work.put(flights)

    def close(self) -> None:
        """End the Batch with what still runs there. Blocks, for good where a node is lost."""
        self._closing = True
        self._work.put(None)
        self.batch.terminate(timeout=5.0)
        for flight in list(self.flights.values()):
            self._places.give_back(flight)

    # ------------------------------------------------------------------ threads

    def _submit_all(self) -> None:
        waiting: deque[DragonTask] = (
            deque()
        )  # for places or a turn, in the order in which they came
        while (flights := self._work.get()) is not None:
            for flight in flights:
                if flight.pinned or flight.is_mpi_job:
                    waiting.append(flight)
                else:
                    self._submit_now(flight)
            while waiting and not self._closing:
                if not (self._is_gone(waiting[0]) or self._may_go(waiting[0])):
                    break
                self._submit_now(waiting.popleft())

    def _may_go(self, flight: DragonTask) -> bool:
        if flight.pinned:
            return self._places.take(flight) == "taken"
        return self._places.acquire_mpi_lock(flight)

    def _look_again(self) -> None:
        """NodeAllocator have become free."""
        if not self._closing:
            self._work.put([])

    def _is_gone(self, flight: DragonTask) -> bool:
        return flight.ended or flight in self._withdrawn

    def _submit_now(self, flight: DragonTask) -> None:
        with self._lock:
            early = self._submit_one(flight)
        if early:
            self._ended(early)

    def _submit_one(self, flight: DragonTask) -> str | None:
        """Give a task to Batch, unless it was withdrawn; its name there if it has ended already."""
        if self._is_gone(flight):
            self._places.give_back(flight)
            return None
        try:
            handle = self._submit(flight)
        except Exception as error:  # what Dragon finds wrong with a task has any class
            self._places.give_back(flight)
            self._hear(self, flight, "refused", error)
            return None
        flight.handle = handle
        self.flights[handle.uid] = flight
        if flight.jobs and isinstance(path := flight.jobs[0][1].get("stdout"), str):
            self._unbegun[path] = flight
        if handle.uid in self._early:
            self._early.remove(handle.uid)
            return str(handle.uid)
        return None

    def withdraw(self, flight: DragonTask) -> bool:
        """Let a task not go to Batch; False where it is there already. Blocks."""
        with self._lock:
            if flight.handle is not None:
                return False
            self._withdrawn.add(flight)
            return True

    def _submit(self, flight: DragonTask) -> Any:
        if not flight.jobs:
            return self.batch.function(
                remote.run_order, self._site, self.number, flight.number, flight.data
            )
        process: Any = importlib.import_module("dragon.native.process")
        facts: Any = importlib.import_module("dragon.infrastructure.facts")
        templates = []
        for rank, (count, fields) in enumerate(flight.jobs):
            target, args = self._target(flight, rank)
            kept = {k: v for k, v in fields.items() if k in TEMPLATE_KEYS}
            if flight.places:
                kept["policy"] = on_place(flight.places[rank], kept.get("policy"))
            template = process.ProcessTemplate(target, args=args, **kept)
            templates.append((count, template))
        templates[0][1].patience = remote.GroupJoinPatch()
        if len(templates) == 1:
            return self.batch.process(templates[0][1])
        pmi = facts.PMIBackend.from_str(flight.pmi) if flight.pmi else None
        return self.batch.options(pmi=pmi).job(templates)

    def _target(self, flight: DragonTask, rank: int) -> tuple[Any, tuple[Any, ...]]:
        if flight.data is None:
            from rhapsody.runtime.arguments import command_of

            name, *words = command_of(flight.task)
            if "stdin" in flight.jobs[rank][1]:
                return name, tuple(words)
            # Dragon leaves a pipe open there, at which who reads would wait for good (0.15.0).
            return "/bin/sh", ("-c", 'exec "$0" "$@" </dev/null', _found(name), *words)
        path = f"{flight.jobs[rank][1]['stdout']}.result"
        if flight.call is None:  # one for all ranks
            flight.call = spilled(flight.data, f"{path}.call", _LARGEST_ARGUMENT)
        return remote.run_rank, (self._site, flight.number, rank, flight.call, path)

    def _poll(self) -> None:
        while not self._closing:
            try:
                tuid = self.batch.poll(timeout=_POLL)
            except Exception as error:  # the Batch is broken, or gone
                if not self._closing:
                    self._hear(self, None, "broken", error)
                return
            if tuid is not None:
                self._ended(tuid)
            if self._unbegun:
                self._look_for_begun()

    def _look_for_begun(self) -> None:
        """Dragon opens the output files of a process when it starts it: this is how we hear."""
        with self._lock:
            first = list(itertools.islice(self._unbegun.items(), _LOOKED_AT))
        for path, flight in first:
            if flight.ended or os.path.exists(path):
                self._unbegun.pop(path, None)
                self._hear(self, flight, "begun", None)

    def _ended(self, tuid: str) -> None:
        """Batch says that a task has ended; how, it says of jobs, and of what never began."""
        with self._lock:
            flight = self.flights.pop(tuid, None)
            if flight is None:  # it ended before it was registered
                self._early.add(tuid)
                return
            if flight.jobs:
                self._unbegun.pop(str(flight.jobs[0][1].get("stdout")), None)
        self._places.give_back(flight)
        # Batch keeps every task for ever; there is no public way to let go of one. Read in 0.15.0.
        self.batch._task_log_tasks.pop(tuid, None)
        if flight.ended and not flight.jobs:
            return
        try:
            value = flight.handle.get(timeout=30.0)
        except Exception as error:  # a cancelled task's, or anything of Dragon's
            cancelled = type(error).__name__ == "TaskCancelledError"
            self._hear(self, flight, "cancelled" if cancelled else "failed", error)
        else:
            if flight.jobs:
                self._hear(self, flight, "exited", value)

    def abandon(self) -> None:
        """Leave the Batch as it is, for good: a call of its might never return."""
        self._closing = True
        self._work.put(None)
        if self.batch is None:  # Dragon still makes it, or never will
            return
        # At exit Batch would try to end it, and block, and a thread of its group would keep the
        # program from ending. There is no public way; read in 0.15.0.
        self.batch._unregister_atexit()
        self.batch.terminated = True
        if self.batch.grp is not None:
            self.batch.grp._exq_shutdown.set()

    def cancel(self, flight: DragonTask) -> bool:
        """Ask Batch to cancel a task; whether it takes the request. Blocks."""
        if flight.handle is None:
            return False
        with contextlib.suppress(queues.Empty):
            return bool(flight.handle.cancel(timeout=5.0))
        return False


def spilled(data: bytes, path: str, limit: int) -> bytes | str:
    """Put what is larger than a limit into a file, and return its path."""
    if len(data) <= limit:
        return data
    with open(path, "wb") as file:
        file.write(data)
    return path


def _found(executable: str) -> str:
    """The path of an executable, as Dragon finds it: here, not where it will run."""
    return os.path.abspath(shutil.which(executable) or executable)
