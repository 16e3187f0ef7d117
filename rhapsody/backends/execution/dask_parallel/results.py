"""Fetches the results of completed keys, and turns them into what their authors get."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import (
    BackendError,
    DependencyError,
    ResourceError,
    SerializationError,
    WorkerLostError,
)

from .connection import DaskConnection, host_of, is_reachable
from .messages import CompletedKey
from .task import DaskTask, PendingTasks, TaskResult
from .worker_plugin import CallFailed, ProgramFailed, ProgramResult, Refused

__all__ = ["ResultGatherer"]

# Results fetched at once: bounds what the client receives together, and how long the first waits.
_BATCH_KEYS = 4096
_BATCH_BYTES = 64 << 20
# Batches of a larger mean size are fetched from their workers, not through the scheduler.
_DIRECT_BYTES = 1 << 20


class ResultGatherer:
    """Settles the tasks whose keys have completed. On the client's loop.

    Args:
        connection: to the cluster.
        pending: the tasks that have not been settled.
        work_dir: returns the folder for output files.
    """

    def __init__(
        self, connection: DaskConnection, pending: PendingTasks, work_dir: Callable[[], str]
    ) -> None:
        self._connection = connection
        self._pending = pending
        self._work_dir = work_dir
        self._reachable: dict[str, bool] = {}  # by the worker's address
        self._completed: list[CompletedKey] = []  # whose results have not been fetched
        self._gathering: set[asyncio.Task[None]] = set()
        self._active = 0  # how many of them have not found `_completed` empty

    def add(self, completed: Iterable[CompletedKey]) -> None:
        """Fetch the results of more keys, soon."""
        self._completed += completed
        # At most two run: while one waits for its batch, the next batch accumulates.
        if self._completed and self._active < 2:
            self._active += 1
            gathering = asyncio.get_running_loop().create_task(self._gather())
            self._gathering.add(gathering)
            gathering.add_done_callback(self._gathering.discard)

    def close(self) -> None:
        """Fetch no more."""
        for gathering in self._gathering:
            gathering.cancel()

    async def _gather(self) -> None:
        try:
            while self._completed:
                await self._gather_batch()
        finally:
            # In the same turn as the last look, or keys added in between would wait for ever.
            self._active -= 1

    async def _gather_batch(self) -> None:
        in_memory: list[DaskTask] = []
        results: list[TaskResult] = []
        batch = self._take_batch()
        for completed in batch:
            task = self._pending.get(completed.key)
            if task is None:
                continue
            task.seconds = completed.seconds
            if completed.status == "memory":
                in_memory.append(task)
            elif task.is_stopping():
                task.deferred = completed  # the answer of its worker tells what it means
            else:
                results.append(await self._failure(task, completed.status))
        results += await self._fetch_all(in_memory, sum(completed.nbytes for completed in batch))
        self._pending.settle(results)

    def _take_batch(self) -> list[CompletedKey]:
        size = 0
        for count, completed in enumerate(self._completed):
            if count == _BATCH_KEYS or (size and size + completed.nbytes > _BATCH_BYTES):
                break
            size += completed.nbytes
        else:
            count = len(self._completed)
        batch, self._completed = self._completed[:count], self._completed[count:]
        return batch

    # ------------------------------------------------------------------ keys in memory

    async def _fetch_all(self, tasks: list[DaskTask], nbytes: int) -> list[TaskResult]:
        """Fetch results of together about `nbytes` bytes."""
        direct = nbytes / max(1, len(tasks)) > _DIRECT_BYTES
        if direct:
            direct = await self._can_reach_holders(tasks)
        values = await self._fetch(tasks, direct)
        return [self._success(task, value) for task, value in values.items()]

    async def _fetch(self, tasks: list[DaskTask], direct: bool) -> dict[DaskTask, Any]:
        """Return results by task, and a `_NotFetched` in place of each that is not to be had."""
        if not tasks:
            return {}
        futures = {task: task.future for task in tasks if task.future is not None}
        try:
            values = await self._connection.client.gather(futures, errors="skip", direct=direct)
        except Exception as error:  # one that cannot be unpickled here fails them all
            if len(tasks) == 1 or isinstance(error, OSError):
                return {task: _NotFetched(error) for task in tasks}
            values = {}
            for task in tasks:
                values.update(await self._fetch([task], direct))
            return values
        values = dict(values)
        for task, future in futures.items():
            if future.status != "finished":
                values[task] = _NotFetched(None)
        return values

    async def _can_reach_holders(self, tasks: list[DaskTask]) -> bool:
        """Whether all workers that hold these results accept connections from here."""
        futures = [task.future for task in tasks if task.future is not None]
        holders = await self._connection.client.who_has(futures)
        for address in {address for addresses in holders.values() for address in addresses}:
            if address not in self._reachable:
                self._reachable[address] = await is_reachable(address)
            if not self._reachable[address]:
                return False
        return True

    def _success(self, task: DaskTask, value: Any) -> TaskResult:
        now = time.monotonic()
        fields = {"started": now - task.seconds, "ended": now}
        if isinstance(value, _NotFetched):
            error = value.explain(task, self._connection.name)
            return TaskResult(task, "FAILED", {"exception": error, **fields})
        if isinstance(value, ProgramResult):
            return TaskResult(task, "DONE", {**self._output(task, value), **fields})
        return TaskResult(task, "DONE", {"return_value": value, **fields})

    def _output(self, task: DaskTask, result: ProgramResult) -> dict[str, Any]:
        """Return the result fields of an executable.

        Writes the files that its worker would have written, had it seen the session's folder.
        """
        outcome = result.outcome
        fields: dict[str, Any] = {"exit_code": outcome.exit_code}
        for name in ("stdout", "stderr"):
            path, data = getattr(outcome, f"{name}_file"), getattr(result, f"{name}_bytes")
            if data is not None:
                path = os.path.join(self._work_dir(), f"{task.uid}.{name}")
                with open(path, "wb") as file:
                    file.write(data)
            fields[f"{name}_file"] = path
            fields[name] = path if task.captured and path else getattr(outcome, name)
        return fields

    # ------------------------------------------------------------------ keys without a result

    async def _failure(self, task: DaskTask, status: str) -> TaskResult:
        if status == "forgotten" or task.future is None:
            error = BackendError(
                f"Dask let go of task '{task.uid}': its key was cancelled by another client",
                backend=self._connection.name,
                transient=True,
            )
            return _failed(task, error)
        raised = await task.future.exception()
        if isinstance(raised, Refused):  # it was to be stopped, and had not started
            return TaskResult(task, "CANCELED")
        if isinstance(raised, ProgramFailed) and raised.key == task.key:
            return self._executable_failure(task, raised.result)
        if isinstance(raised, CallFailed) and raised.key == task.key:
            return _failed(task, serialization.unpack_exception(raised.packed))
        for parent in task.parents:
            if parent.failure is not None:
                return _failed(task, DependencyError(task.uid, parent.uid, parent.failure))
        return _failed(task, _explain(raised, task, self._connection.name))

    def _executable_failure(self, task: DaskTask, result: ProgramResult) -> TaskResult:
        error = result.outcome.error
        if isinstance(error, BackendError):
            error.backend, error.host = self._connection.name, result.host
        return _failed(task, error, self._output(task, result))


def _failed(
    task: DaskTask, error: BaseException | None, fields: dict[str, Any] | None = None
) -> TaskResult:
    task.failure = error
    return TaskResult(task, "FAILED", {**(fields or {}), "exception": error})


class _NotFetched:
    """In place of a result that could not be fetched, with the error if there was one."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def explain(self, task: DaskTask, backend: str) -> BaseException:
        if self._error is None or "cancelled" in type(self._error).__name__.lower():
            return WorkerLostError(
                f"the result of task '{task.uid}' was lost with its worker {task.worker or ''}",
                backend=backend,
                host=host_of(task.worker),
                transient=True,
            )
        if isinstance(self._error, OSError):
            return BackendError(
                f"the result of task '{task.uid}' could not be fetched: {self._error!r}",
                backend=backend,
                transient=True,
            )
        failure = SerializationError(
            f"the result of task '{task.uid}' cannot be unpickled here: {self._error!r}"
        )
        failure.__cause__ = self._error
        return failure


def _explain(raised: BaseException | None, task: DaskTask, backend: str) -> BaseException | None:
    """Return our error for one of Dask's own, by which it gave a key up."""
    name = type(raised).__name__
    if name == "KilledWorker":
        worker = getattr(raised, "last_worker", None)
        address = getattr(worker, "address", None)
        deaths = getattr(raised, "allowed_failures", 0) + 1
        return WorkerLostError(
            f"task '{task.uid}' was given up after {deaths} workers died while they ran it, the"
            f" last one at {address}: killed, out of memory, or its job has ended; see its log."
            " Dask's option 'distributed.scheduler.allowed-failures' is how many deaths it allows",
            backend=backend,
            host=host_of(address),
            transient=True,
        )
    if name == "NoValidWorkerError":
        return ResourceError(f"task '{task.uid}': {raised}")
    if name in ("FutureCancelledError", "CancelledError", "FutureCancelledErrors"):
        return BackendError(f"task '{task.uid}': {raised}", backend=backend, transient=True)
    return raised
