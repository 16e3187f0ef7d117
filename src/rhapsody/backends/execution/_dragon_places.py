"""Which node has room for a task, where it is we who choose: free cores and GPUs, by host name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ._dragon_plan import Flight, Nodes

__all__ = ["Place", "Places", "host_of", "spread"]


class Place(NamedTuple):
    """Where a rank runs, and what it has there."""

    host: str
    cores: int
    gpus: tuple[int, ...]


class Places:
    """What is free on the nodes."""

    def __init__(self, nodes: Nodes) -> None:
        self._cores = dict(nodes.cores)
        self._gpus = {host: list(nodes.gpus.get(host, ())) for host in nodes.cores}

    def take(self, flight: Flight) -> list[Place] | None:
        """Take a place for each rank of a job; None where there is not enough free, yet."""
        need = flight.task.get("resources")
        cores = need.cores_per_rank if need is not None else 1
        gpus = need.gpus_per_rank if need is not None else 0
        taken: list[Place] = []
        for _, template in flight.jobs:
            named = host_of(template)
            fitting = [
                host
                for host in ([named] if named else self._cores)
                if self._cores[host] >= cores and len(self._gpus[host]) >= gpus
            ]
            if not fitting:
                self.give_back(taken)
                return None
            host = max(fitting, key=self._cores.__getitem__)
            self._cores[host] -= cores
            taken.append(Place(host, cores, tuple(self._gpus[host][:gpus])))
            del self._gpus[host][:gpus]
        return taken

    def give_back(self, places: list[Place]) -> None:
        """Free the places of a job that has ended."""
        for place in places:
            self._cores[place.host] += place.cores
            self._gpus[place.host] += place.gpus


def host_of(template: Mapping[str, object]) -> str | None:
    """The host that the policy of a process template names."""
    return getattr(template.get("policy"), "host_name", None) or None


def spread(workers: int, cores: Mapping[str, int]) -> dict[str, int]:
    """So many workers over the nodes, in the ratio of their cores; nodes without one are left out.

    >>> spread(5, {"a": 4, "b": 2})
    {'a': 3, 'b': 2}
    """
    given = dict.fromkeys(cores, 0)
    for _ in range(workers):
        given[min(given, key=lambda host: (given[host] + 1) / cores[host])] += 1
    return {host: number for host, number in given.items() if number}
