"""Processor time of a process and all below it, read from /proc; the standard library only."""

from __future__ import annotations

import ctypes
import os

_PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>


def adopt_orphans() -> None:
    """Make descendants whose parents end children of this process, so that they stay below it."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def seconds_below(pid: int | None = None) -> float:
    """Return user and system seconds of a process (this one), its descendants, and the reaped ones.

    In steps of the kernel's clock tick, 10 ms. What a process's reaped children took is in its own
    record, so that nobody is counted twice.
    """
    root = os.getpid() if pid is None else pid
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                # Behind the command's closing parenthesis: state, parent, ...; see proc(5).
                fields = stat.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        parents[int(name)] = int(fields[1])
        ticks[int(name)] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    found = {root}
    while more := {child for child, above in parents.items() if above in found} - found:
        found |= more
    return sum(ticks.get(one, 0) for one in found) / os.sysconf("SC_CLK_TCK")
