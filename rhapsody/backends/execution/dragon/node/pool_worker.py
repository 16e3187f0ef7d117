"""What V1 and V2 have on the nodes beside V3: workers of a pool, and agents that stop tasks.

A task is stopped on the node where it runs: what a worker of a pool runs by a signal to that
worker, which raises an exception in the task; processes of a task's own by their environment, in
which they carry its mark, as do all that they have started. What does not go is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pickle
import queue as queues
import signal
import socket
import time
from typing import Any

from .worker import (
    GRACE,
    Revoked,
    RunContext,
    Stopped,
    TaskMessage,
    _Agent,
    _WorkerChannel,
    run_call,
)

__all__ = ["MARK", "agent", "mark", "work"]

#: the environment variable by which the processes of a task are found
MARK = "RHAPSODY_DRAGON_TASK"
# Seconds between the request to stop and SIGKILL: a worker may be stopping an executable itself.
_KILL_AFTER = {signal.SIGTERM: GRACE, signal.SIGUSR1: GRACE + 2.0}
# Seconds between two looks for an order, of a worker that has just had one and of an idle one.
# Dragon's own wait for a message costs three times the CPU of the latter.
_LOOK_SOON = 0.0005
_LOOK_IDLE = 0.02


def mark(site: RunContext, number: int) -> str:
    """What the processes of a task have in their environment."""
    return f"{hashlib.sha256(site.token.encode()).hexdigest()[:16]}-{number}"


def _halted(folder: str, number: int) -> str:
    return os.path.join(folder, f"halted-{number}")


# ---------------------------------------------------------------------- a worker of a pool


def work(site: RunContext, crew: int, orders: bytes, host: str) -> None:
    """Run orders, one after another, until this process is ended: a worker of a pool."""
    _PoolWorker(site, crew, pickle.loads(orders), host).run()


class _PoolWorker:
    def __init__(self, site: RunContext, crew: int, orders: Any, host: str) -> None:
        self.orders = orders
        self.name = socket.gethostname()
        self.desk = _WorkerChannel(site, crew)
        self.running = 0
        signal.signal(signal.SIGUSR1, self._on_signal)
        parameters: Any = importlib.import_module("dragon.infrastructure.parameters")
        puid = parameters.this_process.my_puid
        self.desk.send(("up", host, self.name, os.getpid(), puid))

    def run(self) -> None:
        nap = _LOOK_SOON
        while True:
            try:
                message = self.orders.get(timeout=0)
            except queues.Empty:
                time.sleep(nap)
                nap = min(nap * 1.5, _LOOK_IDLE)
                continue
            nap = _LOOK_SOON
            with contextlib.suppress(Revoked, Stopped):
                self._do(*pickle.loads(message))

    def _do(self, number: int, data: bytes | str) -> None:
        began = time.monotonic()
        self.running = number
        try:
            self.desk.begin(number)
            if os.path.exists(_halted(self.desk.folder, number)):
                return
            end = self._run(number, data)
            self.running = 0  # from here on it has ended, and is not stopped any more
            seconds = time.monotonic() - began
            self.desk.send(("ended", number, end, self.name, seconds))
        finally:
            self.running = 0
            self.desk.end()

    def _run(self, number: int, data: bytes | str) -> Any:
        if isinstance(data, str):  # it was too large for a message
            with open(data, "rb") as file:
                content = file.read()
            os.unlink(data)
            data = content
        order = TaskMessage(*pickle.loads(data))
        if order.call is not None:
            return run_call(order.call, os.path.join(order.folder, f".{number}.result"))
        return self.desk.local.run(order)

    def _on_signal(self, *_: Any) -> None:
        """Stop the task that runs, if it is one that shall be stopped: the signal may be late."""
        number = self.running
        if number and os.path.exists(_halted(self.desk.folder, number)):
            self.running = 0  # once
            raise Stopped(number)


# ---------------------------------------------------------------------- an agent that stops tasks


def agent(site: RunContext, orders: bytes, host: str) -> None:
    """As that of V3, and stop tasks: a process on each node."""
    _StoppingAgent(site, pickle.loads(orders), host).run()


class _Halt:
    """A task that shall not run on this node any more."""

    def __init__(self) -> None:
        self.asked = time.monotonic()
        self.told: set[int] = set()  # the processes that have had their signal

    def send(self, pid: int, number: signal.Signals) -> None:
        """Signal a process: once as asked, and SIGKILL when it has had its time."""
        with contextlib.suppress(ProcessLookupError):
            if time.monotonic() - self.asked > _KILL_AFTER[number]:
                os.kill(pid, signal.SIGKILL)
            elif pid not in self.told:
                os.kill(pid, number)
        self.told.add(pid)


class _StoppingAgent(_Agent):
    def __init__(self, site: RunContext, orders: Any, host: str) -> None:
        super().__init__(site, orders, host)
        self.prefix = mark(site, 0)[:-1]
        self.halts: dict[int, _Halt] = {}

    def run(self) -> None:
        try:
            super().run()
        finally:
            for pids in self._marked().values():  # of a backend that has gone
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def _order(self) -> Any:
        while isinstance(order := super()._order(), tuple) and order[0] == "halt":
            with open(_halted(self.folder, order[1]), "wb"):
                pass
            self.halts[order[1]] = _Halt()
        return order

    def _look(self) -> list[tuple[Any, ...]]:
        return super()._look() + (self._halt() if self.halts else [])

    def _halt(self) -> list[tuple[Any, ...]]:
        """Stop what shall be stopped, and tell of what does not run here any more."""
        running = {worker.runs(): worker.pid for worker in self.workers.values()}
        marked = self._marked()
        over: list[tuple[Any, ...]] = []
        for number, halt in list(self.halts.items()):
            if number in running:
                halt.send(running[number], signal.SIGUSR1)
            for pid in marked.get(number, ()):
                halt.send(pid, signal.SIGTERM)
            if number not in running and number not in marked:
                del self.halts[number]
                over.append(("halted", number, self.host, bool(halt.told)))
        return over

    def _marked(self) -> dict[int, list[int]]:
        """The processes of this node that carry the mark of a task, by its number."""
        start = f"{MARK}={self.prefix}".encode()
        found: dict[int, list[int]] = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and (environ := _environ(name)) is not None:
                for entry in environ.split(b"\0"):
                    if entry.startswith(start):
                        found.setdefault(int(entry[len(start) :]), []).append(int(name))
        return found


def _environ(pid: str) -> bytes | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:  # it has ended, or is another's
        return None
