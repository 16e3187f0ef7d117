"""What of the Dask backend runs on the scheduler: a plugin that tells in bursts how keys end.

Dask's own way is a message and a coroutine per key on the client. The scheduler needs rhapsody
installed, since this is pickled by reference.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # typed or not, depending on the release of distributed

    class SchedulerPlugin: ...

else:
    from distributed.diagnostics.plugin import SchedulerPlugin

__all__ = ["CompletionNotifier", "unheard", "whereabouts"]

#: Seconds for which news is held back to go out as one message, per key that is still to end, and
#: the least and most of it: a stream of short calls costs few messages, and a lone task or a chain,
#: each waiting for the one before, is not held up.
CADENCE = (0.0005, 0.002, 0.05)


_ENDED = ("memory", "erred")


class CompletionNotifier(SchedulerPlugin):
    """Tells one client how its keys end, and what the cluster has, in bursts.

    A burst is an event of the topic `name`: a dict with `ended`, a list of (key, word, seconds,
    bytes) where word is `memory`, `erred` or `gone`; `stuck`, keys that no worker may take, and
    `unstuck`; `workers`, how many there are; `offers`, the resources that they advertise.
    """

    def __init__(self, name: str, client: str) -> None:
        self.name = name
        self.client = client

    async def start(self, scheduler: Any) -> None:
        """Called by Dask when the scheduler has the plugin."""
        self.scheduler = scheduler
        self.loop = asyncio.get_running_loop()
        self.mine: dict[str, bool] = {}  # keys of the client: whether their end was told
        self.open = 0  # how many of them have not ended
        self.stuck: set[str] = set()
        self.news: dict[str, Any] = {}
        self.armed = False
        self.next_at = 0.0  # when the next message may go
        self.greeted = False

    def update_graph(self, scheduler: Any, *, client: str, keys: Any, **_: Any) -> None:
        """Note the keys that our client wants."""
        if client == self.client:
            self.mine.update(dict.fromkeys(keys, False))
            self.open += len(keys)
            for key in keys:
                # One that others had computed before makes no transition any more.
                if (task := scheduler.tasks.get(key)) is not None and task.state in _ENDED:
                    self._end(key, task.state, 0.0, 0)
            if not self.greeted:  # not earlier: the client may not have subscribed yet
                self.greeted = True
                self._tell_workers()

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Note how a key of ours ends, or that it cannot begin."""
        if key not in self.mine:
            return
        if finish in _ENDED:
            nbytes = kwargs.get("nbytes") or 0
            self._end(key, finish, _seconds(kwargs.get("startstops")), nbytes)
        elif finish == "no-worker":
            self.stuck.add(key)
            self._tell("stuck", key)
        elif finish == "processing":
            if self.mine[key]:  # its result was lost, and is computed again
                self.mine[key] = False
                self.open += 1
            if key in self.stuck:
                self.stuck.discard(key)
                self._tell("unstuck", key)
        elif finish == "forgotten":
            self.stuck.discard(key)
            if not self.mine.pop(key):
                self.open -= 1
                self._tell("ended", (key, "gone", 0.0, 0))

    def _end(self, key: Any, word: str, seconds: float, nbytes: int) -> None:
        self.open -= not self.mine[key]
        self.mine[key] = True
        self._tell("ended", (key, word, seconds, nbytes))

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Say how many workers there are, and what they advertise."""
        self._tell_workers()

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Say how many workers there are, and what they advertise."""
        self._tell_workers()

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Our client has gone, killed perhaps: take both plugins off, and so the children.

        Should only its connection be broken, it hears of it by the event that it waits on.
        """
        if client == self.client:
            # What `distributed.Event` calls from elsewhere; cleared, it leaves nothing behind.
            scheduler.handlers["event_set"](name=self.name)
            scheduler.handlers["event_clear"](name=self.name)
            scheduler.remove_plugin(name=self.name)
            self.leaving = asyncio.ensure_future(
                scheduler.unregister_worker_plugin(comm=None, name=self.name)
            )

    def _tell_workers(self) -> None:
        if not self.armed:
            self._arm()
        self.news["workers"] = None

    def _tell(self, kind: str, what: Any) -> None:
        if not self.armed:
            self._arm()
        self.news.setdefault(kind, []).append(what)

    def _arm(self) -> None:
        self.armed = True
        wait = self.next_at - time.monotonic()
        # In a turn of its own even when at once: more of the same message is on its way.
        self.loop.call_later(max(wait, 0.0), self._flush)

    def _flush(self) -> None:
        self.armed = False
        news, self.news = self.news, {}
        each, least, most = CADENCE
        self.next_at = time.monotonic() + min(max(each * self.open, least), most)
        if "workers" in news or "stuck" in news:
            workers = list(self.scheduler.workers.values())
            news["workers"] = len(workers)
            news["offers"] = list({repr(w.resources): dict(w.resources) for w in workers}.values())
        if self.client in self.scheduler.clients:
            self.scheduler.log_event(self.name, news)


def _seconds(startstops: Any) -> float:
    """How long the worker computed, from what it told the scheduler."""
    for entry in startstops or ():
        if entry["action"] == "compute":
            return float(entry["stop"] - entry["start"])
    return 0.0


def whereabouts(keys: list[str], dask_scheduler: Any = None) -> dict[str, list[str]]:
    """The keys that each worker has been given, by its address; for `run_on_scheduler`."""
    found: dict[str, list[str]] = {address: [] for address in dask_scheduler.workers}
    for key in keys:
        task = dask_scheduler.tasks.get(key)
        if task is not None and task.processing_on is not None:
            found[task.processing_on.address].append(key)
    return found


def unheard(name: str, keys: list[str], dask_scheduler: Any = None) -> list[str] | None:
    """Those keys that the plugin of this name does not know; None where it is not there any more.

    For `run_on_scheduler`.
    """
    herald = dask_scheduler.plugins.get(name)
    return None if herald is None else [key for key in keys if key not in herald.mine]
