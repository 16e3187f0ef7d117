"""Accounting of this machine's slots, cores, GPUs and memory among running tasks."""

from __future__ import annotations

from dataclasses import dataclass

from rhapsody.runtime.errors import ResourceError
from rhapsody.runtime.resources import Resources

__all__ = ["Grant", "Slots"]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a running task holds; `memory` is in bytes.

    Without `cores` it runs on any core, and holds one slot.
    """

    slots: int = 1
    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    memory: int = 0

    @property
    def env(self) -> dict[str, str]:
        """Environment with which a process sees the GPUs of the grant, and no others."""
        names = ",".join(self.gpus)
        return {"CUDA_VISIBLE_DEVICES": names, "HIP_VISIBLE_DEVICES": names} if names else {}


class Slots:
    """Grants slots, and to tasks with `Resources` cores, GPUs and memory of their own.

    Args:
        cores: ids of the cores that may be used.
        gpus: names of the GPUs, as `CUDA_VISIBLE_DEVICES` has them.
        memory: bytes that may be granted.
        slots: how many tasks may run at once; one per core where None.
    """

    def __init__(
        self,
        cores: tuple[int, ...],
        gpus: tuple[str, ...] = (),
        memory: int = 0,
        slots: int | None = None,
    ) -> None:
        self._slots = self.total = len(cores) if slots is None else slots
        self._all_cores, self._cores = cores, list(cores)
        self._all_gpus, self._gpus = gpus, list(gpus)
        self._all_memory = self._memory = memory

    def check(self, uid: str, need: Resources) -> None:
        """Check that a request can be granted once all is free.

        Raises:
            ResourceError: it asks for more than there is.
        """
        most = min(len(self._all_cores), self.total)
        for asked, total, what in (
            (need.cores, most, "cores"),
            (need.gpus, len(self._all_gpus), "GPUs"),
            (need.memory, self._all_memory, "bytes of memory"),
        ):
            if asked > total:
                ranks = f" for {need.ranks} ranks" if need.ranks > 1 else ""
                raise ResourceError(
                    f"task '{uid}' asks for {asked} {what}{ranks}, and this machine grants {total}"
                )

    def acquire(self, need: Resources | None) -> Grant | None:
        """Grant what a task asks for, one slot where `need` is None; None where it has to wait."""
        if need is None:
            if not self._slots:
                return None
            self._slots -= 1
            return Grant()
        if (
            need.cores > min(self._slots, len(self._cores))
            or need.gpus > len(self._gpus)
            or need.memory > self._memory
        ):
            return None
        grant = Grant(
            need.cores,
            tuple(self._cores[: need.cores]),
            tuple(self._gpus[: need.gpus]),
            need.memory,
        )
        self._slots -= grant.slots
        self._memory -= grant.memory
        del self._cores[: need.cores]
        del self._gpus[: need.gpus]
        return grant

    def release(self, grant: Grant) -> None:
        """Free what a task held."""
        self._slots += grant.slots
        self._memory += grant.memory
        self._cores = sorted([*self._cores, *grant.cores])
        self._gpus = [gpu for gpu in self._all_gpus if gpu in {*self._gpus, *grant.gpus}]
