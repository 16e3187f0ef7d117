"""Allocates the nodes' cores and GPUs to ranks, and the right to run an MPI job over several nodes.

It does not call Dragon.
"""

from __future__ import annotations

import enum
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping

from .resources import Nodes, Placement
from .task import DragonTask, host_of

__all__ = ["Allocation", "NodeAllocator", "spread"]


class Allocation(enum.Enum):
    """The answer to a request to allocate."""

    DONE = enum.auto()
    NO_ROOM = enum.auto()  # too few cores or GPUs are free
    MPI_LOCKED = enum.auto()  # another MPI job over several nodes runs


class NodeAllocator:
    """What is free on the nodes; may be used by several threads.

    MPI jobs over several nodes run one at a time, over all backends of this process. Where two
    start at once, Dragon 0.15.0 leaves ranks waiting for ever in MPI_Init, or for their first
    message: seen with 3 pairs of 5, and with none of 70 jobs that ran one after the other.

    Attributes:
        nodes: what there is in all.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self._lock = threading.Lock()
        self._cores = {host: list(cores) for host, cores in nodes.cpus.items()}
        self._gpus = {host: list(nodes.gpus.get(host, ())) for host in nodes.cpus}
        self._mpi_job: DragonTask | None = None  # of this backend: it holds the MPI lock
        self._listeners: list[Callable[[], None]] = []
        with _mpi_lock:
            _allocators.add(self)

    def on_free(self, listener: Callable[[], None]) -> None:
        """Call a function whenever something becomes free, on any thread."""
        self._listeners.append(listener)

    def allocate(self, task: DragonTask) -> Allocation:
        """Allocate cores and GPUs to each rank of a job, and the MPI lock if it needs that."""
        with self._lock:
            if (placements := self._allocate_ranks(task)) is None:
                return Allocation.NO_ROOM
            if not self._lock_mpi(task, {placement.host for placement in placements}):
                self._free(placements)
                return Allocation.MPI_LOCKED
            task.placements = placements
        return Allocation.DONE

    def acquire_mpi_lock(self, task: DragonTask) -> bool:
        """Allocate the MPI lock to a job that Dragon places, if it needs that; False to wait."""
        hosts = {host_of(template) for template in task.templates}
        return self._lock_mpi(task, {*self.nodes.cores} if None in hosts else hosts)

    def _lock_mpi(self, task: DragonTask, hosts: Collection[str | None]) -> bool:
        if task.is_mpi_job and len(hosts) > 1:
            with _mpi_lock:
                if any(allocator._mpi_job is not None for allocator in _allocators):
                    return False
                self._mpi_job = task
        return True

    def _allocate_ranks(self, task: DragonTask) -> list[Placement] | None:
        need = task.task.get("resources")
        cores = need.cores_per_rank if need is not None else 1
        gpus = need.gpus_per_rank if need is not None else 0
        hosts = [host_of(template) for template in task.templates]
        found: dict[int, Placement] = {}
        # Ranks that may run anywhere come last, so that they leave the cores that others need.
        for rank in sorted(range(len(hosts)), key=lambda rank: hosts[rank] is None):
            if (placement := self._allocate_rank(hosts[rank], cores, gpus, task.pinned)) is None:
                self._free(found.values())
                return None
            found[rank] = placement
        return [found[rank] for rank in range(len(hosts))]

    def _allocate_rank(
        self, host: str | None, cores: int, gpus: int, pinned: bool
    ) -> Placement | None:
        fitting = [
            one
            for one in ([host] if host else self._cores)
            if len(self._cores[one]) >= cores and len(self._gpus[one]) >= gpus
        ]
        if not fitting:
            return None
        host = max(fitting, key=lambda one: len(self._cores[one]))
        placement = Placement(host, self._cores[host][:cores], self._gpus[host][:gpus], pinned)
        del self._cores[host][:cores]
        del self._gpus[host][:gpus]
        return placement

    def release(self, task: DragonTask) -> None:
        """Free what a job holds, if it holds anything."""
        with self._lock:
            placements, task.placements = task.placements, []
            self._free(placements)
        if self._mpi_job is task:
            self._unlock_mpi()
        elif placements:
            self._notify()

    def close(self) -> None:
        """Let no other backend wait for an MPI job of this one, which may never end."""
        with _mpi_lock:
            _allocators.discard(self)
        self._unlock_mpi()

    def _unlock_mpi(self) -> None:
        with _mpi_lock:
            self._mpi_job = None
            allocators = list(_allocators)
        for allocator in allocators:
            allocator._notify()

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    def _free(self, placements: Iterable[Placement]) -> None:
        for placement in placements:
            host = placement.host
            self._cores[host] = sorted([*self._cores[host], *placement.cores])
            self._gpus[host] = sorted([*self._gpus[host], *placement.gpus])


# Those of all backends of this process, and what guards the MPI job of each.
_mpi_lock = threading.Lock()
_allocators: weakref.WeakSet[NodeAllocator] = weakref.WeakSet()


def spread(workers: int, cores: Mapping[str, int]) -> dict[str, int]:
    """Spread workers over the nodes in the ratio of their cores; leave out nodes without one.

    >>> spread(5, {"a": 4, "b": 2})
    {'a': 3, 'b': 2}
    """
    counts = dict.fromkeys(cores, 0)
    for _ in range(workers):
        counts[min(counts, key=lambda host: (counts[host] + 1) / cores[host])] += 1
    return {host: count for host, count in counts.items() if count}
