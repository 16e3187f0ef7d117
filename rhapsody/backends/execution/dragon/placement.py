"""Which node has room for a task, where it is we who choose: free cores and GPUs, by host name."""

from __future__ import annotations

import dataclasses
import importlib
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from .task import DragonTask, Nodes, Place, host_of

__all__ = ["NodeAllocator", "on_host", "on_place", "spread"]


class NodeAllocator:
    """What is free on the nodes; may be used by several threads.

    Attributes:
        nodes: what there is in all.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self._lock = threading.Lock()
        self._cores = {host: list(cores) for host, cores in nodes.cpus.items()}
        self._gpus = {host: list(nodes.gpus.get(host, ())) for host in nodes.cpus}
        self._turn: DragonTask | None = None  # the MPI world over several nodes that runs here now
        self._listeners: list[Callable[[], None]] = []
        with _turns:
            _all.add(self)

    def on_free(self, listener: Callable[[], None]) -> None:
        """Have a function called whenever places become free, on any thread."""
        self._listeners.append(listener)

    def take(self, flight: DragonTask) -> Literal["taken", "no room", "no turn"]:
        """Take a place for each rank of a job, unless there is not enough free, yet.

        An MPI world over several nodes needs its turn too, as in `acquire_mpi_lock`.
        """
        with self._lock:
            if (places := self._take_all(flight)) is None:
                return "no room"
            if not self._take_turn(flight, {place.host for place in places}):
                self._free(places)
                return "no turn"
            flight.places = places
        return "taken"

    def acquire_mpi_lock(self, flight: DragonTask) -> bool:
        """Let a job go whose places Dragon chooses; False where it has to wait for another's end.

        MPI worlds over several nodes run one at a time, of all backends together. Where two start
        at once, Dragon 0.15.0 leaves ranks waiting for ever in MPI_Init, or for their first
        message: seen with 3 pairs of 5, and with none of 70 worlds that came one after the other.
        """
        named = {host_of(template) for _, template in flight.jobs}
        return self._take_turn(flight, {*self.nodes.cores} if None in named else named)

    def _take_turn(self, flight: DragonTask, hosts: Collection[str | None]) -> bool:
        if flight.is_mpi_job and len(hosts) > 1:
            with _turns:
                if any(places._turn is not None for places in _all):
                    return False
                self._turn = flight
        return True

    def _take_all(self, flight: DragonTask) -> list[Place] | None:
        need = flight.task.get("resources")
        cores = need.cores_per_rank if need is not None else 1
        gpus = need.gpus_per_rank if need is not None else 0
        named = [host_of(template) for _, template in flight.jobs]
        taken: dict[int, Place] = {}
        # Those that may be anywhere come last, not to be where one of the others must be.
        for rank in sorted(range(len(named)), key=lambda rank: named[rank] is None):
            if (place := self._take_one(named[rank], cores, gpus, flight.pinned)) is None:
                self._free(taken.values())
                return None
            taken[rank] = place
        return [taken[rank] for rank in range(len(named))]

    def _take_one(self, named: str | None, cores: int, gpus: int, pinned: bool) -> Place | None:
        fitting = [
            host
            for host in ([named] if named else self._cores)
            if len(self._cores[host]) >= cores and len(self._gpus[host]) >= gpus
        ]
        if not fitting:
            return None
        host = max(fitting, key=lambda host: len(self._cores[host]))
        place = Place(host, self._cores[host][:cores], self._gpus[host][:gpus], pinned)
        del self._cores[host][:cores]
        del self._gpus[host][:gpus]
        return place

    def give_back(self, flight: DragonTask) -> None:
        """Free what a job holds; one that holds nothing is fine."""
        with self._lock:
            places, flight.places = flight.places, []
            self._free(places)
        if self._turn is flight:
            self._pass_turn()
        elif places:
            self._tell()

    def leave(self) -> None:
        """Keep nobody waiting for a turn here from now on, for it may never end."""
        with _turns:
            _all.discard(self)
        self._pass_turn()

    def _pass_turn(self) -> None:
        with _turns:
            self._turn = None
            others = list(_all)
        for places in others:
            places._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _free(self, places: Any) -> None:
        for place in places:
            self._cores[place.host] = sorted([*self._cores[place.host], *place.cores])
            self._gpus[place.host] = sorted([*self._gpus[place.host], *place.gpus])


# One world at a time in a driver, whichever of its backends has it.
_turns = threading.Lock()
_all: weakref.WeakSet[NodeAllocator] = weakref.WeakSet()


def on_host(host: str) -> Any:
    """Dragon's policy for a process on a host."""
    policy: Any = importlib.import_module("dragon.infrastructure.policy").Policy
    return policy(placement=policy.Placement.HOST_NAME, host_name=host)


def on_place(place: Place, given: Any) -> Any:
    """Dragon's policy for a rank in its place; what a policy of the task's own says is kept."""
    if given is None:
        given = on_host(place.host)
    elif given.placement == type(given).Placement.HOST_ID:
        return given
    return dataclasses.replace(
        given,
        placement=type(given).Placement.HOST_NAME,
        host_name=place.host,
        cpu_affinity=given.cpu_affinity or place.cpus,
        gpu_affinity=given.gpu_affinity or place.gpus,
    )


def spread(workers: int, cores: Mapping[str, int]) -> dict[str, int]:
    """So many workers over the nodes, in the ratio of their cores; nodes without one are left out.

    >>> spread(5, {"a": 4, "b": 2})
    {'a': 3, 'b': 2}
    """
    given = dict.fromkeys(cores, 0)
    for _ in range(workers):
        given[min(given, key=lambda host: (given[host] + 1) / cores[host])] += 1
    return {host: number for host, number in given.items() if number}
