"""What the workers of the cluster advertise, and how long tasks wait for one that can run them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from rhapsody.runtime.errors import BackendError, ResourceError
from rhapsody.runtime.task import Task

from .connection import DaskConnection
from .task import DaskTask, PendingTasks, TaskResult

__all__ = ["WorkerCapacity", "requested_resources"]


class WorkerCapacity:
    """Fails tasks for which there is no worker, and is none expected. On the client's loop.

    Args:
        connection: to the cluster, which may be about to start workers.
        pending: the tasks that have not been settled.
        timeout: seconds that a task waits where a worker may yet come, and that all tasks wait
            where there is no worker at all.
    """

    def __init__(self, connection: DaskConnection, pending: PendingTasks, timeout: float) -> None:
        self.timeout = timeout
        self._connection = connection
        self._pending = pending
        self._worker_count: int | None = None  # not known yet
        self._advertised: list[dict[str, float]] = []
        self._ever_advertised: dict[str, dict[str, float]] = {}
        self._no_worker_timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Fail no more tasks."""
        if self._no_worker_timer is not None:
            self._no_worker_timer.cancel()
            self._no_worker_timer = None

    def update(self, worker_count: int, advertised: list[dict[str, float]]) -> None:
        """Note the workers that there are now, and the different resources that they advertise."""
        self._worker_count = worker_count
        self._advertised = advertised
        self._ever_advertised.update({repr(resources): resources for resources in advertised})
        if worker_count:
            self.close()
        else:
            self.start_timer()

    def start_timer(self) -> None:
        """If tasks are pending and there is no worker, start the time for which they all wait."""
        if self._worker_count == 0 and self._pending and self._no_worker_timer is None:
            loop = asyncio.get_running_loop()
            self._no_worker_timer = loop.call_later(self.timeout, self._fail_all)

    def _fail_all(self) -> None:
        self._no_worker_timer = None
        self._pending.fail_all(
            BackendError(
                f"the Dask cluster at {self._connection.scheduler_address} has had no worker for"
                f" {self.timeout:g} s (worker_timeout=)",
                backend=self._connection.name,
                host=self._connection.scheduler_host,
                transient=True,
            )
        )

    def on_unrunnable(self, task: DaskTask) -> None:
        """Fail a task that no worker may run: at once, or later where one may yet come."""
        named = task.options.get("workers")
        if self._worker_count == 0 or not (task.resources or named):
            return  # there is no worker at all, and the time of all tasks runs
        had_one = not named and any(
            _satisfies(resources, task.resources) for resources in self._ever_advertised.values()
        )
        if not had_one and not self._connection.may_grow():
            self._fail(task)
        elif task.timer is None:
            loop = asyncio.get_running_loop()
            task.timer = loop.call_later(self.timeout, self._fail, task)

    def _fail(self, task: DaskTask) -> None:
        waited = f" within {self.timeout:g} s" if task.timer is not None else ""
        request = _format(task.resources) if task.resources else "one of the workers that it names"
        workers = task.options.get("workers")
        where = f" on workers={workers!r}" if workers else ""
        advertised = "; ".join(map(_format, self._advertised)) or "nothing"
        error = ResourceError(
            f"task '{task.uid}' asks for {request}{where}, and no worker of the cluster could take"
            f" it{waited}; its {self._worker_count} workers advertise {advertised}"
        )
        self._pending.settle([TaskResult(task, "FAILED", {"exception": error})])


def requested_resources(task: Task, options: Mapping[str, Any]) -> dict[str, float]:
    """Return what a task requests of its worker: Dask's own resources, else its `Resources`.

    Those become `CPU` (only where it is more than the one of a worker's thread), `GPU`, and
    `MEMORY` in bytes, as in Dask's documentation.
    """
    own = options.get("resources")
    if own is not None:
        return dict(own)
    request = task.get("resources")
    if request is None:
        return {}
    found = {
        "CPU": request.cores if request.cores > 1 else 0,
        "GPU": request.gpus,
        "MEMORY": request.memory,
    }
    return {name: amount for name, amount in found.items() if amount}


def _satisfies(advertised: Mapping[str, float], request: Mapping[str, float]) -> bool:
    return all(advertised.get(name, 0) >= amount for name, amount in request.items())


def _format(resources: Mapping[str, float]) -> str:
    """Return `CPU=2, GPU=1`, or `nothing`."""
    amounts: Iterable[tuple[str, float]] = sorted(resources.items())
    return ", ".join(f"{name}={amount:g}" for name, amount in amounts) or "nothing"
