"""A task on its way through Dask, and what it asks of the cluster in Dask's terms."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rhapsody.runtime.arguments import Task

from .options import DASK_OPTIONS, worker_names

__all__ = ["DaskTask", "Ending", "describe", "describe_all", "fits", "wanted"]


class DaskTask:
    """What the backend keeps of a task from its submit until its owner has heard of its end."""

    __slots__ = (
        "call", "captured", "children", "failure", "future", "held", "key", "options", "parents",
        "runner", "seconds", "stopping", "task", "timer", "uid", "wants", "wave", "worker",
    )  # fmt: skip

    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        self.task = task
        self.uid: str = task["uid"]
        self.options = options
        self.key = ""
        self.runner: Callable[..., Any] | None = None
        self.call: Any = None  # what the runner gets; let go of when Dask has it
        self.future: Any = None
        self.wants: dict[str, float] = {}
        self.captured = False
        self.parents: list[DaskTask] = []  # those whose results Dask hands over itself
        self.children: list[DaskTask] = []
        self.wave = 0  # above those of its parents: they are given to Dask first
        self.worker: str | None = None  # the address of the last one that started it
        self.seconds = 0.0  # that it computed
        self.failure: BaseException | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.stopping = False  # its workers have been told to stop it,
        self.held: tuple[str, str, float, int] | None = None  # and this came meanwhile

    def is_stopping(self) -> bool:
        """Whether it, or one that it depends on, is being stopped."""
        seen = {self}
        queue = [self]
        while queue:
            flight = queue.pop()
            if flight.stopping:
                return True
            queue += [parent for parent in flight.parents if parent not in seen]
            seen.update(flight.parents)
        return False

    def group(self) -> tuple[Any, ...]:
        """Tasks with equal ones can travel in one graph."""
        options = self.options
        if not options and not self.wants:
            return self.wave, self.runner.__name__ if self.runner else ""
        shared = DASK_OPTIONS.keys() - {"key"}
        rest = [(name, repr(value)) for name, value in options.items() if name in shared]
        return (
            self.wave,
            self.runner.__name__ if self.runner else "",
            repr(self.wants),
            *sorted(rest),
        )

    def dask_options(self) -> dict[str, Any]:
        """Keyword arguments of `Client.map`."""
        names = ("priority", "retries", "workers", "allow_other_workers")
        found = {name: self.options[name] for name in names if self.options.get(name) is not None}
        if isinstance(found.get("workers"), (int, tuple)):  # `Client.map` takes neither
            found["workers"] = worker_names(found["workers"])
        return found

    def stop_timer(self) -> None:
        """A worker has taken it after all."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def descent(flights: Iterable[DaskTask]) -> list[DaskTask]:
    """Return these flights and all that depend on them, each once, parents first."""
    found: dict[DaskTask, None] = dict.fromkeys(flights)
    queue = list(found)
    while queue:
        for child in queue.pop().children:
            if child not in found:
                found[child] = None
                queue.append(child)
    return sorted(found, key=lambda flight: flight.wave)


#: a flight, its terminal state, and the result fields
Ending = tuple[DaskTask, str, "dict[str, Any] | None"]


# ---------------------------------------------------------------------- resources


def wanted(task: Task, options: Mapping[str, Any]) -> dict[str, float]:
    """What a task asks of one worker: Dask's own resources, else `Resources` in its terms.

    `CPU` (where it is more than the one that a worker's thread stands for), `GPU`, and `MEMORY` in
    bytes: the names that Dask's documentation uses.
    """
    own = options.get("resources")
    if own is not None:
        return dict(own)
    need = task.get("resources")
    if need is None:
        return {}
    asked = {"CPU": need.cores if need.cores > 1 else 0, "GPU": need.gpus, "MEMORY": need.memory}
    return {name: value for name, value in asked.items() if value}


def fits(wants: Mapping[str, float], offer: Mapping[str, float]) -> bool:
    """Whether a worker with this offer can take it."""
    return all(offer.get(name, 0) >= amount for name, amount in wants.items())


def describe(offer: Mapping[str, float]) -> str:
    """Return `CPU=2, GPU=1`, or `nothing`."""
    return ", ".join(f"{name}={amount:g}" for name, amount in sorted(offer.items())) or "nothing"


def describe_all(offers: Iterable[Mapping[str, float]]) -> str:
    """Return what the different kinds of workers advertise, `; ` between them."""
    return "; ".join(map(describe, offers)) or "nothing"
