"""The driver's side of the agents: starts them, sends requests, and reads what nodes report.

Everything here may block, and runs on threads of its own.
"""

from __future__ import annotations

import importlib
import logging
import queue as queues
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from rhapsody.runtime import serialization

from .node.agent import run_agent
from .node.context import NativeQueue, RunContext
from .node.messages import (
    Heartbeat,
    LeaveRequest,
    NodeInfo,
    NodeMessage,
    Request,
    RevokeRequest,
    StopRequest,
    unpack_messages,
)
from .placement import NodeAllocator
from .processes import host_policy
from .resources import Nodes
from .topology import find_nodes

__all__ = ["NodeAgents"]

logger = logging.getLogger(__name__)

_START = 60.0  # seconds for the first heartbeat of every node
# Seconds between two looks for messages, while tasks are in flight and while there are none.
# Dragon's own wait for a message costs more CPU, and cannot be ended.
_LOOK_EVERY = 0.005
_IDLE_EVERY = 0.1
_BURST = 256  # items of the queue that are read at once


class _Process(Protocol):
    """The method used here of `dragon.native.process.Process`."""

    def join(self, timeout: float) -> None: ...


class NodeAgents:
    """The agents of the nodes.

    Args:
        report: called with the messages of nodes, on a thread of its own.
        by_granted_cpus: count the ranks that run at once by granted CPUs, or as Batch does.

    Attributes:
        busy: set while tasks are in flight.
        info: what each agent told of its node.
        context: what processes on the nodes get; of an open backend, as is `allocator`.
    """

    def __init__(
        self, report: Callable[[list[NodeMessage]], None], *, by_granted_cpus: bool
    ) -> None:
        self._report = report
        self._by_granted_cpus = by_granted_cpus
        self._queue: NativeQueue
        self._requests: dict[str, NativeQueue] = {}
        self._agents: list[_Process] = []
        self._closing = threading.Event()
        self.busy = threading.Event()
        self._heartbeats: dict[str, float] = {}  # when the last came, by host
        self.info: dict[str, NodeInfo] = {}
        self.context = RunContext("", b"")
        self.allocator = NodeAllocator(Nodes({}, {}, {}))

    @property
    def nodes(self) -> Nodes:
        """What the nodes have."""
        return self.allocator.nodes

    def open(self, num_nodes: int | None) -> None:
        """Start an agent on each node, and wait for their first heartbeats. Blocks.

        Raises:
            TimeoutError: a node gives no sign of life.
        """
        native = importlib.import_module("dragon.native.queue")
        found = find_nodes(num_nodes)
        cores = {node.host: node.cores for node in found}
        gpus = {node.host: node.gpus for node in found}
        self._queue = native.Queue()
        self.context = RunContext(secrets.token_hex(16), serialization.dumps(self._queue, "queue"))
        for host in cores:
            # On the node that reads it: an idle agent asks no other node.
            self._requests[host] = native.Queue(policy=host_policy(host))
            self._start_agent(host)
        threading.Thread(target=self._read, daemon=True, name="dragon-messages").start()
        deadline = time.monotonic() + _START
        while missing := cores.keys() - self._heartbeats.keys():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no sign of life from {', '.join(sorted(missing))}")
            time.sleep(_LOOK_EVERY)
        cpus = {host: self.info[host].cpus for host in cores}
        without_pmix = [host for host in cores if not self.info[host].has_pmix]
        if self._by_granted_cpus:
            cores = {host: len(cpus[host]) for host in cores}
        self.allocator = NodeAllocator(Nodes(cores, gpus, cpus, without_pmix))

    def _start_agent(self, host: str) -> None:
        process = importlib.import_module("dragon.native.process")
        requests = serialization.dumps(self._requests[host], "queue")
        agent = process.Process(
            target=run_agent, args=(self.context, requests, host), policy=host_policy(host)
        )
        agent.start()
        self._agents.append(agent)

    def silent_hosts(self, timeout: float) -> list[str]:
        """Return the nodes that have not sent a heartbeat for so many seconds."""
        now = time.monotonic()
        return [host for host, last in self._heartbeats.items() if now - last > timeout]

    def forgive_silence(self) -> None:
        """Count the silence of each node from now on."""
        self._heartbeats.update(dict.fromkeys(self._heartbeats, time.monotonic()))

    def revoke(self, request: RevokeRequest) -> None:
        """Ask every agent to let a task, or all of an executor, not start; each replies. Blocks."""
        self._send(request, self._requests)

    def stop(self, number: int, hosts: Iterable[str]) -> None:
        """Ask agents to stop a task; each replies when nothing of it runs there. Blocks."""
        self._send(StopRequest(number), hosts)

    def _send(self, request: Request, hosts: Iterable[str]) -> None:
        for host in hosts:
            self._requests[host].put(request)

    def close(self) -> None:
        """Let the agents end. Blocks, for good where a node is lost."""
        self._closing.set()
        self._send(LeaveRequest(), self._requests)
        for agent in self._agents:
            agent.join(timeout=5.0)
        for queue in [*self._requests.values(), self._queue]:
            queue.destroy()

    def abandon(self) -> None:
        """Read no more: the runtime is broken, or left."""
        self._closing.set()
        self.allocator.close()

    def _read(self) -> None:
        while not self._closing.is_set():
            if messages := self._receive():
                if reports := [one for one in messages if not self._is_own(one)]:
                    self._report(reports)
            else:
                time.sleep(_LOOK_EVERY if self.busy.is_set() else _IDLE_EVERY)

    def _is_own(self, message: NodeMessage) -> bool:
        """Take what is about an agent itself."""
        if isinstance(message, Heartbeat):
            self._heartbeats[message.host] = time.monotonic()
        elif isinstance(message, NodeInfo):
            self.info[message.host] = message
        else:
            return False
        return True

    def _receive(self) -> list[NodeMessage]:
        messages: list[NodeMessage] = []
        for _ in range(_BURST):
            try:
                data = self._queue.get(timeout=0)
            except queues.Empty:
                break
            except Exception:
                if not self._closing.is_set():  # else the queue was destroyed, as it should be
                    logger.exception("messages of Dragon's nodes cannot be read any more")
                    self._closing.set()
                break
            messages += unpack_messages(data)
        return messages
