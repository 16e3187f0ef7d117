"""The tree of processes, from /proc: who is below whom, and suspending all of them at once.

Where there is no /proc, on another system than Linux, the tables are empty.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

__all__ = [
    "STOP_TIMEOUT",
    "ProcessInfo",
    "ProcessTable",
    "become_subreaper",
    "descendants",
    "kill",
    "kill_group",
    "processes",
    "suspend",
]

STOP_TIMEOUT = 0.2  # seconds until we no longer wait for a process that does not stop on SIGSTOP
_SEARCH_TIMEOUT = 5.0  # seconds until we no longer run after those who fork faster than we look
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class ProcessInfo(NamedTuple):
    """What /proc tells of a process that has not ended."""

    parent: int
    group: int
    session: int
    state: bytes  # one letter, as in ps


#: processes by pid
ProcessTable = dict[int, ProcessInfo]


def become_subreaper() -> None:
    """Become the parent of orphans among our descendants; a fork does not inherit this."""
    if sys.platform == "linux":
        import ctypes  # here, since the driver imports this module and never comes here

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def processes() -> ProcessTable:
    """Read the table of all processes that have not ended."""
    table: ProcessTable = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return table
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # "pid (comm) state ppid ...": comm may hold anything, and ends at the last ')'
                    fields = file.read().rpartition(b")")[2].split()
                if fields[0] != b"Z":
                    parent, group, session = map(int, fields[1:4])
                    table[int(name)] = ProcessInfo(parent, group, session, fields[0])
            except (OSError, ValueError, IndexError):
                continue
    return table


def descendants(roots: Iterable[int], table: ProcessTable) -> list[int]:
    """Pids of all processes below some."""
    children: dict[int, list[int]] = {}
    for pid, process in table.items():
        children.setdefault(process.parent, []).append(pid)
    found: list[int] = []
    queue = list(roots)
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def suspend(
    find: Callable[[ProcessTable], Iterable[int]],
    *,
    stop: Callable[[set[int]], None] | None = None,
    limit: float = _SEARCH_TIMEOUT,
) -> set[int]:
    """Stop processes where they are, until there are no new ones among them; returns their pids.

    So none is born, or leaves its group, while we look: once its parent is dead, whose it was
    cannot be told. `find` takes its pick from a table, `stop` stops what is new in it, by default
    each process by its pid, and `limit` is for how many seconds new ones are waited for.
    """
    stop = stop or _stop
    found: set[int] = set()
    stopped = False
    began = changed = time.monotonic()
    while True:
        table = processes()
        wanted = set(find(table))
        now = time.monotonic()
        new = wanted - found
        if new:
            changed = now
            stop(new)
            found |= new
        before, stopped = stopped, _have_stopped(wanted, table)
        # Twice: what is born while we read the first table is only in the second.
        if (before and stopped and not new) or now > began + limit or now > changed + STOP_TIMEOUT:
            return found
        os.sched_yield()


def _have_stopped(pids: set[int], table: ProcessTable) -> bool:
    """Whether none of them runs; a fork that they were in goes through before."""
    return not any(table[pid].state in b"RS" for pid in pids if pid in table)


def _stop(pids: set[int]) -> None:
    for pid in pids:
        kill(pid, signal.SIGSTOP)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process; one that has gone, or is another user's program, is no error."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def kill_group(pid: int, number: int) -> bool:
    """Signal a process group; whether it is there."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's program; macOS says so of a group of zombies
        pass
    return True
