"""What a task needs, in the same terms for every backend."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import TaskValidationError
from .text import environment_fault, plain_str

__all__ = ["Resources", "parse_memory", "parse_seconds"]

_MEMORY_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_TIME_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_memory(value: int | str) -> int:
    """Return bytes for `4096`, `"4GiB"` or `"500MB"`; a bare K, M, G, T is a power of 1024."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    text = value if isinstance(value, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = 0
    if match is not None and match[2].lower() in _MEMORY_UNITS:
        size = int(float(match[1]) * _MEMORY_UNITS[match[2].lower()])
    if size <= 0:
        raise TaskValidationError(
            f"memory must be bytes or a str such as '4GiB' or '500MB', not {value!r}"
        )
    return size


def parse_seconds(value: float | str) -> float:
    """Return seconds for `90`, `"10m"`, `"1.5h"` or Slurm's `"[hh:]mm:ss"`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return float(value)
    if isinstance(value, str):
        if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value):
            if match[2] in _TIME_UNITS and float(match[1]) > 0:
                return float(match[1]) * _TIME_UNITS[match[2]]
        elif match := re.fullmatch(r"(?:(\d+):)?(\d{1,2}):(\d{2})", value):
            seconds = int(match[1] or 0) * 3600.0 + int(match[2]) * 60 + int(match[3])
            if seconds > 0:
                return seconds
    raise TaskValidationError(
        f"a time must be seconds above 0 or a str such as '90s', '10m', '1.5h' or '01:30:00',"
        f" not {value!r}"
    )


@dataclass(frozen=True)
class Resources:
    """What a task needs; each backend translates it into its engine's own terms.

    Args:
        ranks: processes of the task; more than one runs it under MPI.
        cores_per_rank: CPU cores that each rank has to itself.
        gpus_per_rank: GPUs that each rank has to itself.
        memory_per_rank: bytes, or a `str` such as `"4GiB"`.
        walltime: seconds, or a `str` such as `"10m"`: the `timeout` of a task that has none.
        cwd: folder to run in, a `str` or a path.
        env: environment variables, added over those of the parent process.

    Raises:
        TaskValidationError: a value is of a wrong type or out of range.
    """

    ranks: int = 1
    cores_per_rank: int = 1
    gpus_per_rank: int = 0
    memory_per_rank: int | str | None = None
    walltime: float | str | None = None
    cwd: str | os.PathLike[str] | None = None
    env: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for name, least in (("ranks", 1), ("cores_per_rank", 1), ("gpus_per_rank", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TaskValidationError(
                    f"Resources.{name} must be an int of at least {least}, not {value!r}"
                )
        if self.memory_per_rank is not None:
            parse_memory(self.memory_per_rank)
        if self.walltime is not None:
            parse_seconds(self.walltime)
        if self.cwd is not None and not isinstance(self.cwd, (str, os.PathLike)):
            raise TaskValidationError(
                f"Resources.cwd must be the path of a folder, not {self.cwd!r}"
            )
        if self.cwd is not None:
            object.__setattr__(self, "cwd", plain_str(self.cwd))
        if self.env is not None:
            if fault := environment_fault(self.env):
                raise TaskValidationError(f"Resources.{fault}")
            # A copy: what the author puts into the dict later was not checked.
            own = {plain_str(name): plain_str(value) for name, value in self.env.items()}
            object.__setattr__(self, "env", own)

    @property
    def cores(self) -> int:
        """Cores of all ranks."""
        return self.ranks * self.cores_per_rank

    @property
    def gpus(self) -> int:
        """GPUs of all ranks."""
        return self.ranks * self.gpus_per_rank

    @property
    def memory(self) -> int:
        """Bytes of all ranks; 0 where none was asked for."""
        return self.ranks * parse_memory(self.memory_per_rank) if self.memory_per_rank else 0

    @property
    def walltime_seconds(self) -> float | None:
        """The walltime in seconds."""
        return None if self.walltime is None else parse_seconds(self.walltime)
