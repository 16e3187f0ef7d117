"""The shared memory of one run of Dragon, which stays in /dev/shm when the run is killed.

Read in dragonhpc 0.15.0: a pool is a file that begins with `_D` or `D`, named after the last three
digits of the user's and the creator's numbers (`facts.runtime_pool_name`), so that a name does not
tell whose it is. What does: it was not there before the run, and a process of the run has it
mapped. `dragon-cleanup` asks neither, and takes all that the user has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

__all__ = ["SHARED_MEMORY", "Segments", "free_bytes"]

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where POSIX shared memory is on Linux

_PREFIXES = ("_D", "D")


def free_bytes(folder: str = SHARED_MEMORY) -> int | None:
    """Bytes that are free for shared memory; None where there is no such folder."""
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


class Segments:
    """The files that the run below this process made."""

    def __init__(self) -> None:
        self._before = _names()
        self._ours: dict[str, tuple[int, int]] = {}  # by name: device and inode

    def look(self, pids: Iterable[int]) -> None:
        """Note what some processes of the run have mapped; to be called while they live."""
        for pid in pids:
            self._ours.update(_mapped(pid, self._before))

    def remove(self) -> list[str]:
        """Unlink what was noted and is still there; returns the names.

        Compared by device and inode: a process in a container of its own has another /dev/shm.
        """
        removed = []
        for name, identity in self._ours.items():
            path = os.path.join(SHARED_MEMORY, name)
            with contextlib.suppress(OSError):  # it has gone, which is what we want
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


def _mapped(pid: int, without: set[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names of Dragon's files that a process has mapped, with device and inode."""
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
            if name.startswith(_PREFIXES) and name not in without:
                major, minor = (int(number, 16) for number in fields[3].split(":"))
                yield name, (os.makedev(major, minor), int(fields[4]))
