"""Shared memory of Dragon: how much it needs to start, and what a killed run leaves in /dev/shm.

Read in dragonhpc 0.15.0: a pool is a file whose name begins with `_D` or `D` and has the last three
digits of the ids of the user and of the process (`facts.runtime_pool_name`), so that the name does
not tell which run it belongs to. A file belongs to a run if it was not there before the run and a
process of the run has mapped it. `dragon-cleanup` checks neither and removes all of the user's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rhapsody.runtime.errors import ResourceError

__all__ = ["SHARED_MEMORY", "SegmentTracker", "check_shared_memory", "free_bytes"]

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where POSIX shared memory is on Linux

_PREFIXES = ("_D", "D")

# The variable for the bytes of the pool that Dragon gives to the programs of a node.
_POOL_SIZE = "DRAGON_DEFAULT_SEG_SZ"
_DEFAULT_POOL = 4 << 30
_OTHER_POOLS = 1 << 30  # the size of each of the two pools that Dragon makes for itself


def free_bytes(folder: str = SHARED_MEMORY) -> int | None:
    """Bytes that are free for shared memory; None where there is no such folder."""
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def check_shared_memory(
    folder: str = SHARED_MEMORY, environ: Mapping[str, str] = os.environ
) -> None:
    """Check that there is the shared memory that Dragon needs to start; with less it hangs.

    Raises:
        ResourceError: there is less; says how a container gets more.
    """
    free, needed = free_bytes(folder), _needed_bytes(environ)
    if free is None or free < needed:
        found = "there is none" if free is None else f"{free / (1 << 20):,.0f} MiB are free"
        raise ResourceError(
            f"{folder}: {found}, and Dragon needs {needed >> 20:,} MiB; remove what other runs "
            "left there, give a container more (docker run --shm-size=6g; Kubernetes: an emptyDir "
            f"with medium: Memory on /dev/shm), or Dragon a smaller pool: {_POOL_SIZE}={1 << 30}"
        )


def _needed_bytes(environ: Mapping[str, str]) -> int:
    """How many bytes of /dev/shm have to be free for Dragon to start.

    Dragon makes three pools, one after another, and fails if one is larger than what is free at
    that moment, although little of it is ever written. A pool has a second file, for its blocks, of
    64 MiB and 3/256 of the pool's size (seen with 0.15.0). Another 64 MiB are for what the pools
    before it have written.

    Raises:
        ResourceError: the size that the environment gives is not a number.
    """
    given = environ.get(_POOL_SIZE) or str(_DEFAULT_POOL)
    if not given.isdigit() or int(given) < 1:
        raise ResourceError(f"{_POOL_SIZE} must be a number of bytes, not {given!r}")
    largest = max(int(given), _OTHER_POOLS)
    return largest + largest * 3 // 256 + (2 * 64 << 20)


class _FileId(NamedTuple):
    device: int
    inode: int


class SegmentTracker:
    """Finds the segments of Dragon's that the run below this process makes, and unlinks them.

    Make it before the run starts: what is there then belongs to others.
    """

    def __init__(self) -> None:
        self._before = _names()
        self._mapped: dict[str, _FileId] = {}  # by name

    def record(self, pids: Iterable[int]) -> None:
        """Record which segments some processes of the run have mapped; call it while they live."""
        for pid in pids:
            self._mapped.update(_mapped_segments(pid, self._before))

    def unlink(self) -> list[str]:
        """Unlink the recorded segments that are still there; returns their names.

        They are compared by device and inode: a process in a container may have another /dev/shm.
        """
        removed = []
        for name, identity in self._mapped.items():
            path = os.path.join(SHARED_MEMORY, name)
            with contextlib.suppress(OSError):  # it is gone already
                stat = os.lstat(path)
                if (stat.st_dev, stat.st_ino) == identity:
                    os.unlink(path)
                    removed.append(name)
        return removed


def _names() -> set[str]:
    try:
        return set(os.listdir(SHARED_MEMORY))
    except OSError:
        return set()


def _mapped_segments(pid: int, excluded: set[str]) -> Iterator[tuple[str, _FileId]]:
    """Names of Dragon's files that a process has mapped."""
    try:
        with open(f"/proc/{pid}/maps") as file:
            lines = file.readlines()
    except OSError:  # it has ended
        return
    for line in lines:
        # "from-to perms offset major:minor inode   path": the path is the rest of the line
        fields = line.rstrip("\n").split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(f"{SHARED_MEMORY}/"):
            name = fields[5][len(SHARED_MEMORY) + 1 :]
            if name.startswith(_PREFIXES) and name not in excluded:
                major, minor = (int(number, 16) for number in fields[3].split(":"))
                yield name, _FileId(os.makedev(major, minor), int(fields[4]))
