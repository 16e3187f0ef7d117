"""From what Dask has of a task that ended to what its author gets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import (
    BackendError,
    DependencyError,
    ResourceError,
    SerializationError,
    WorkerLostError,
)

from . import worker_plugin as remote
from .connection import DaskEngine, host_of, reachable
from .task import DaskTask, Ending

__all__ = ["ResultGatherer"]

# From this mean size on results are fetched from their workers, not through the scheduler.
_DIRECT_BYTES = 1 << 20


class ResultGatherer:
    """Fetches results, and reads ends. On the client's loop.

    Args:
        name: of the backend, for errors.
        engine: its connection.
        work_dir: returns the folder for output files.
    """

    def __init__(self, name: str, engine: DaskEngine, work_dir: Callable[[], str]) -> None:
        self.name = name
        self._engine = engine
        self._work_dir = work_dir
        self._reachable: dict[str, bool] = {}

    async def results(self, flights: list[DaskTask], size: int) -> list[Ending]:
        """Fetch the results of keys that are in memory, together about `size` bytes."""
        direct = size / max(1, len(flights)) > _DIRECT_BYTES
        if direct:
            direct = await self._can_go_direct(flights)
        values = await self._values(flights, direct)
        return [self._outcome(flight, value) for flight, value in values.items()]

    async def _values(self, flights: list[DaskTask], direct: bool) -> dict[DaskTask, Any]:
        """Gather results; in place of one that cannot be had stands an `_Unfetched`."""
        if not flights:
            return {}
        try:
            values = await self._engine.client.gather(
                {flight: flight.future for flight in flights}, errors="skip", direct=direct
            )
        except Exception as error:  # one that cannot be unpickled here fails them all
            if len(flights) == 1 or isinstance(error, OSError):
                return {flight: _Unfetched(error) for flight in flights}
            values = {}
            for flight in flights:
                values.update(await self._values([flight], direct))
            return values
        for flight in flights:
            if flight.future.status != "finished":
                values[flight] = _Unfetched(None)
        return dict(values)

    async def _can_go_direct(self, flights: list[DaskTask]) -> bool:
        """Whether all workers that hold the results can be reached from here."""
        holders = await self._engine.client.who_has([f.future for f in flights])
        for address in {address for found in holders.values() for address in found}:
            if address not in self._reachable:
                self._reachable[address] = await reachable(address)
            if not self._reachable[address]:
                return False
        return True

    def _outcome(self, flight: DaskTask, value: Any) -> Ending:
        now = time.monotonic()
        times = {"started": now - flight.seconds, "ended": now}
        if isinstance(value, _Unfetched):
            return flight, "FAILED", {"exception": value.explain(flight, self.name), **times}
        if isinstance(value, remote.ProgramResult):
            return flight, "DONE", {**self._printed(flight, value), **times}
        return flight, "DONE", {"return_value": value, **times}

    def _printed(self, flight: DaskTask, result: remote.ProgramResult) -> dict[str, Any]:
        """The result fields of an executable; files of workers elsewhere are written here."""
        outcome = result.outcome
        fields: dict[str, Any] = {"exit_code": outcome.exit_code}
        for name in ("stdout", "stderr"):
            path, data = getattr(outcome, f"{name}_file"), getattr(result, f"{name}_bytes")
            if data is not None:
                path = os.path.join(self._work_dir(), f"{flight.uid}.{name}")
                with open(path, "wb") as file:
                    file.write(data)
            fields[f"{name}_file"] = path
            fields[name] = path if flight.captured and path else getattr(outcome, name)
        return fields

    async def failure(self, flight: DaskTask, word: str) -> Ending:
        """Explain how a key ended that has no result."""
        if word == "gone":
            error: BaseException = BackendError(
                f"Dask let go of task '{flight.uid}': its key was cancelled by another client",
                backend=self.name,
                transient=True,
            )
            return self._fail(flight, error, None)
        raised = await flight.future.exception()
        if isinstance(raised, remote.Refused):  # its author wanted it stopped
            return flight, "CANCELED", None
        if isinstance(raised, remote.ProgramFailed) and raised.key == flight.key:
            return self._fail(flight, *self._program_error(flight, raised.result))
        if isinstance(raised, remote.CallFailed) and raised.key == flight.key:
            return self._fail(flight, serialization.unpack_exception(raised.packed), None)
        for parent in flight.parents:
            if parent.failure is not None:
                return self._fail(flight, DependencyError(flight.uid, parent.uid, parent.failure))
        return self._fail(flight, _explain(raised, flight, self.name))

    def _fail(
        self, flight: DaskTask, error: BaseException, fields: dict[str, Any] | None = None
    ) -> Ending:
        flight.failure = error
        return flight, "FAILED", {**(fields or {}), "exception": error}

    def _program_error(
        self, flight: DaskTask, result: remote.ProgramResult
    ) -> tuple[BaseException, dict[str, Any]]:
        error = result.outcome.error
        assert error is not None  # it has not succeeded, and was not stopped
        if isinstance(error, BackendError):
            error.backend, error.host = self.name, result.host
        return error, self._printed(flight, result)


class _Unfetched:
    """Stands for a result that could not be had."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def explain(self, flight: DaskTask, backend: str) -> BaseException:
        if self.error is None or "cancelled" in type(self.error).__name__.lower():
            return WorkerLostError(
                f"the result of task '{flight.uid}' was lost with its worker {flight.worker or ''}",
                backend=backend,
                host=host_of(flight.worker),
                transient=True,
            )
        if isinstance(self.error, OSError):
            return BackendError(
                f"the result of task '{flight.uid}' could not be fetched: {self.error!r}",
                backend=backend,
                transient=True,
            )
        failure = SerializationError(
            f"the result of task '{flight.uid}' cannot be unpickled here: {self.error!r}"
        )
        failure.__cause__ = self.error
        return failure


def _explain(raised: BaseException, flight: DaskTask, backend: str) -> BaseException:
    """Say in our terms what Dask says of a key that it gave up."""
    name = type(raised).__name__
    if name == "KilledWorker":
        worker = getattr(raised, "last_worker", None)
        address = getattr(worker, "address", None)
        deaths = getattr(raised, "allowed_failures", 0) + 1
        return WorkerLostError(
            f"task '{flight.uid}' was given up after {deaths} workers died while they ran it, the"
            f" last one at {address}; killed, out of memory, or its job has ended: its log tells."
            " Dask tries so often by 'distributed.scheduler.allowed-failures'",
            backend=backend,
            host=host_of(address),
            transient=True,
        )
    if name == "NoValidWorkerError":
        return ResourceError(f"task '{flight.uid}': {raised}")
    if name in ("FutureCancelledError", "CancelledError", "FutureCancelledErrors"):
        return BackendError(f"task '{flight.uid}': {raised}", backend=backend, transient=True)
    return raised
