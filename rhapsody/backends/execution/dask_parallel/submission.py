"""What Dask is given: a burst of tasks as few graphs, and a watch over each of them.

A graph that the scheduler cannot take (a worker's address that does not resolve, a parent whose
result is lost) it answers to the client's futures alone: its keys make no transition, and `CompletionNotifier`
never hears of them. One future per graph is watched for that; all of its keys are answered alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from rhapsody.runtime.errors import BackendError, DependencyError

from .connection import DaskEngine
from .scheduler_plugin import unheard
from .task import DaskTask, Ending, descent
from .worker_plugin import CallFailed, ProgramFailed, Refused

__all__ = ["GraphSubmitter"]


class GraphSubmitter:
    """Hands flights to Dask. On the client's loop.

    Args:
        name: of the backend, for errors.
        engine: its connection.
        plugin: the name of the backend's plugins on the cluster.
        flights: what is in flight, by key; who pops one settles it.
        settle: reports ends.
    """

    def __init__(
        self,
        name: str,
        engine: DaskEngine,
        plugin: str,
        flights: MutableMapping[str, DaskTask],
        settle: Callable[[list[Ending]], None],
    ) -> None:
        self.name = name
        self._engine = engine
        self._plugin = plugin
        self._flights = flights
        self._settle = settle
        self._watches: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Watch no more."""
        for watch in self._watches:
            watch.cancel()

    def launch(self, flights: Iterable[DaskTask]) -> None:
        """Give Dask a burst: one graph for all tasks with the same options."""
        groups: dict[tuple[Any, ...], list[DaskTask]] = {}
        for flight in flights:
            self._flights[flight.key] = flight
            groups.setdefault(flight.group(), []).append(flight)
        for _, group in sorted(groups.items(), key=lambda item: item[0][0]):
            orphans = [f for f in group if f.parents and any(p.future is None for p in f.parents)]
            if orphans:
                self._fail(orphans, None)
                group = [flight for flight in group if flight not in orphans]
            try:
                if group:
                    self._send(group)
            except Exception as error:  # the client is closed, or refuses these options
                self._fail(group, error)

    def _send(self, group: list[DaskTask]) -> None:
        import dask

        first = group[0]
        iterables: list[list[object]] = [[flight.call for flight in group]]
        if any(flight.parents for flight in group):
            iterables.append([[p.future for p in flight.parents] for flight in group])
        keys = [flight.key for flight in group]
        # Dask warns of large graphs, for the sake of those who put data into them unknowingly;
        # here it is the arguments that the author wants there.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            futures = self._engine.client.map(
                first.runner,
                *iterables,
                key=keys,
                pure=False,
                resources=first.wants or None,
                **first.dask_options(),
            )
        for flight, future in zip(group, futures, strict=True):
            flight.future = future
            flight.call = None
        watch = asyncio.get_running_loop().create_task(self._watch(keys))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    # ------------------------------------------------------------------ what the scheduler refuses

    async def _watch(self, keys: list[str]) -> None:
        """Wait for the first word about a graph, and fail its tasks if Dask has not taken them."""
        # Keys, not flights: these hold results on the cluster for as long as they are here.
        for key in keys:
            if (flight := self._flights.get(key)) is None:
                continue
            error, word = await flight.future.exception(), flight.future.status
            if word == "finished" or isinstance(error, (CallFailed, ProgramFailed, Refused)):
                return  # it has run, and so has Dask taken the graph
            if key in self._flights:
                break
            # It was cancelled, which says nothing of the others.
        else:
            return
        await self._ask(keys, error)

    async def _ask(self, keys: list[str], error: BaseException | None) -> None:
        """Fail those of these tasks of which the scheduler does not know."""
        client = self._engine.client
        try:
            unknown = await client.run_on_scheduler(unheard, self._plugin, keys)
        except OSError:
            unknown = None
        if unknown is None:  # the connection broke: who watches the scheduler says so of all tasks
            return
        self._fail(descent([self._flights[key] for key in unknown if key in self._flights]), error)

    def _fail(self, flights: Iterable[DaskTask], error: BaseException | None) -> None:
        """Settle flights, parents first, that Dask has not taken.

        Without their futures Dask lets go of what it may have taken of them or their children. (To
        cancel what it has half taken breaks the client's connection: distributed 2026.8.)
        """
        endings: list[Ending] = []
        for flight in flights:
            if self._flights.pop(flight.key, None) is None:
                continue
            parent = next((p for p in flight.parents if p.failure is not None), None)
            if parent is not None:
                flight.failure = DependencyError(flight.uid, parent.uid, parent.failure)
            else:
                flight.failure = self._refusal(flight, error)
            flight.future = flight.call = None
            endings.append((flight, "FAILED", {"exception": flight.failure}))
        self._settle(endings)

    def _refusal(self, flight: DaskTask, error: BaseException | None) -> BackendError:
        if error is None:
            return BackendError(
                f"Dask let go of task '{flight.uid}': a result that it needs was lost, or its key"
                " was cancelled",
                backend=self.name,
                transient=True,
            )
        asked = ", ".join(f"{name}={value!r}" for name, value in flight.dask_options().items())
        refusal = BackendError(
            f"Dask refused task '{flight.uid}'{asked and f' with {asked}'}:"
            f" {type(error).__name__}: {error}",
            backend=self.name,
            transient=self._engine.client.status != "running",
        )
        refusal.__cause__ = error
        return refusal
