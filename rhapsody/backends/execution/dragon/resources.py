"""What the nodes of a runtime have, and what a rank has of it. No Dragon, no threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rhapsody.runtime.resources import Resources

__all__ = ["Nodes", "Placement", "is_pinned"]


class Nodes:
    """What the nodes of a runtime have, by host name.

    Args:
        cores: how many ranks at once: for Dragon's Batch half of what the kernel counts, since it
            takes every core for two hardware threads.
        gpus: names of GPUs.
        cpus: ids of the CPUs that are granted there, hardware threads of a core together.
        without_pmix: the nodes on which Dragon finds no libpmix.so.

    Attributes:
        cpus: for each core that a rank can have to itself, the ids of its CPUs. Fewer than `cores`
            where fewer CPUs are granted.
    """

    def __init__(
        self,
        cores: Mapping[str, int],
        gpus: Mapping[str, Sequence[int]],
        cpus: Mapping[str, Sequence[int]],
        without_pmix: Iterable[str] = (),
    ) -> None:
        self.cores = dict(cores)
        self.gpus = {host: list(found) for host, found in gpus.items()}
        self.cpus = {host: _split(cpus[host], number) for host, number in cores.items()}
        self.without_pmix = sorted(without_pmix)

    def capacity(self, host: str, need: Resources) -> int:
        """Return how many ranks fit on a node that runs nothing else."""
        cores = len(self.cpus[host]) if is_pinned(need) else self.cores[host]
        capacity = cores // need.cores_per_rank
        if need.gpus_per_rank:
            capacity = min(capacity, len(self.gpus.get(host, ())) // need.gpus_per_rank)
        return capacity

    def describe(self) -> str:
        """Return `2 nodes: a (4 cores, 1 GPU), b (4 cores)`."""
        parts = []
        for host, cores in self.cores.items():
            gpus = len(self.gpus.get(host, ()))
            more = f", {gpus} GPU{'s' * (gpus > 1)}" if gpus else ""
            parts.append(f"{host} ({cores} core{'s' * (cores > 1)}{more})")
        return f"{len(parts)} node{'s' * (len(parts) > 1)}: {', '.join(parts)}"


def _split(cpus: Sequence[int], parts: int) -> list[list[int]]:
    """Split CPUs into so many cores of equal size, or into fewer of one CPU each.

    >>> _split([0, 4, 1, 5, 2], 2)
    [[0, 4], [1, 5]]
    """
    size = max(1, len(cpus) // parts)
    return [list(cpus[at : at + size]) for at in range(0, len(cpus), size)][:parts]


class Placement(NamedTuple):
    """Where a rank runs, and what is allocated to it there."""

    host: str
    cores: list[list[int]]  # each with its CPUs
    gpus: list[int]
    pinned: bool

    @property
    def cpus(self) -> list[int]:
        """The CPUs that it is bound to; none where it may use all of the node."""
        return sorted(cpu for core in self.cores for cpu in core) if self.pinned else []


def is_pinned(need: Resources | None) -> bool:
    """Whether each rank of a task has its cores and GPUs to itself, and is bound to them."""
    return need is not None and (need.cores_per_rank > 1 or need.gpus_per_rank > 0)
