"""Runs on the scheduler: a plugin that reports in bursts which keys have completed.

Dask itself sends a message per key, for which its client starts a coroutine. The scheduler needs
rhapsody installed, because the plugin is pickled by reference.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal

from .messages import CompletedKey, Message
from .protocols import Scheduler

if TYPE_CHECKING:  # typed or not, depending on the release of distributed

    class SchedulerPlugin: ...

else:
    from distributed.diagnostics.plugin import SchedulerPlugin

__all__ = ["CompletionNotifier", "assigned_keys", "unknown_keys"]

# Seconds between two messages: so many for each key that has not completed, within bounds. A stream
# of short calls then costs few messages, and a single task, or a chain of them, is not delayed.
_INTERVAL_PER_KEY = 0.0005
_MIN_INTERVAL = 0.002
_MAX_INTERVAL = 0.05

# The states in which a key has completed.
_COMPLETED = ("memory", "erred")


class CompletionNotifier(SchedulerPlugin):
    """Sends one client a `Message` about its keys and the cluster's workers, in bursts.

    Args:
        name: of this plugin, and of the topic of its messages.
        client: the id of the client.
    """

    def __init__(self, name: str, client: str) -> None:
        self.name = name
        self.client = client

    async def start(self, scheduler: Scheduler) -> None:
        """Called by Dask when the plugin is installed."""
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self.keys: dict[str, bool] = {}  # of the client: whether it was told of their completion
        self._incomplete = 0  # how many were not
        self._unrunnable: set[str] = set()
        self._message: Message = {}  # the next one
        self._workers_changed = False  # since the last one
        self._scheduled = False  # whether the next one is
        self._earliest = 0.0  # when it may go, as of time.monotonic()
        self._has_graph = False

    def update_graph(
        self, scheduler: Scheduler, *, client: str, keys: Collection[str], **_: Any
    ) -> None:
        """Called by Dask when a client has submitted keys."""
        if client != self.client:
            return
        self.keys.update(dict.fromkeys(keys, False))
        self._incomplete += len(keys)
        for key in keys:
            # One that another client had computed before makes no transition.
            if (task := scheduler.tasks.get(key)) is not None and task.state in _COMPLETED:
                self._add_completed(key, task.state, 0.0, 0)
        if not self._has_graph:  # the client may not have subscribed to the topic before
            self._has_graph = True
            self._add_workers()

    def transition(self, key: str, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Called by Dask when a key changes its state."""
        if key not in self.keys:
            return
        if finish in _COMPLETED:
            nbytes = kwargs.get("nbytes") or 0
            self._add_completed(key, finish, _compute_seconds(kwargs.get("startstops")), nbytes)
        elif finish == "no-worker":
            self._unrunnable.add(key)
            self._add_key("unrunnable", key)
        elif finish == "processing":
            if self.keys[key]:  # its result was lost, and is computed again
                self.keys[key] = False
                self._incomplete += 1
            if key in self._unrunnable:
                self._unrunnable.discard(key)
                self._add_key("runnable", key)
        elif finish == "forgotten":
            self._unrunnable.discard(key)
            if self.keys[key]:
                del self.keys[key]
            else:
                self._add_completed(key, finish, 0.0, 0)
                del self.keys[key]

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Called by Dask when a worker has joined."""
        self._add_workers()

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Called by Dask when a worker has left."""
        self._add_workers()

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Called by Dask when a client has gone, perhaps killed.

        If it is ours, both plugins are removed, and with the workers' the child processes.
        """
        if client == self.client:
            # If only the connection was broken, the client learns of it by the event on which it
            # waits. The handlers are those that `distributed.Event` calls; clearing it leaves
            # nothing behind.
            scheduler.handlers["event_set"](name=self.name)
            scheduler.handlers["event_clear"](name=self.name)
            scheduler.remove_plugin(name=self.name)
            self._unregistering = asyncio.ensure_future(
                scheduler.unregister_worker_plugin(comm=None, name=self.name)
            )

    # ------------------------------------------------------------------ the next message

    def _add_completed(self, key: str, status: str, seconds: float, nbytes: int) -> None:
        self._schedule()
        self._incomplete -= not self.keys[key]
        self.keys[key] = True
        completed = self._message.setdefault("completed", [])
        completed.append(CompletedKey(key, status, seconds, nbytes))

    def _add_key(self, kind: Literal["unrunnable", "runnable"], key: str) -> None:
        self._schedule()
        self._message.setdefault(kind, []).append(key)

    def _add_workers(self) -> None:
        self._schedule()
        self._workers_changed = True

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            wait = self._earliest - time.monotonic()
            # Never in this turn of the loop: more for the same message is about to be added.
            self._loop.call_later(max(wait, 0.0), self._send)

    def _send(self) -> None:
        self._scheduled = False
        message, self._message = self._message, {}
        interval = max(_INTERVAL_PER_KEY * self._incomplete, _MIN_INTERVAL)
        self._earliest = time.monotonic() + min(interval, _MAX_INTERVAL)
        if self._workers_changed or "unrunnable" in message:
            self._workers_changed = False
            workers = list(self._scheduler.workers.values())
            message["worker_count"] = len(workers)
            message["advertised"] = list(
                {repr(worker.resources): dict(worker.resources) for worker in workers}.values()
            )
        if self.client in self._scheduler.clients:
            self._scheduler.log_event(self.name, message)


def _compute_seconds(startstops: Iterable[dict[str, Any]] | None) -> float:
    """Return how long a key was computed, by what its worker reported to the scheduler."""
    for entry in startstops or ():
        if entry["action"] == "compute":
            return float(entry["stop"] - entry["start"])
    return 0.0


# ---------------------------------------------------------------------- for `run_on_scheduler`


def assigned_keys(keys: list[str], dask_scheduler: Scheduler) -> dict[str, list[str]]:
    """Return which of these keys are assigned to each worker, by its address."""
    found: dict[str, list[str]] = {address: [] for address in dask_scheduler.workers}
    for key in keys:
        task = dask_scheduler.tasks.get(key)
        if task is not None and task.processing_on is not None:
            found[task.processing_on.address].append(key)
    return found


def unknown_keys(name: str, keys: list[str], dask_scheduler: Scheduler) -> list[str] | None:
    """Return which of these keys the plugin `name` does not know; None if it was removed."""
    notifier = dask_scheduler.plugins.get(name)
    return None if notifier is None else [key for key in keys if key not in notifier.keys]
