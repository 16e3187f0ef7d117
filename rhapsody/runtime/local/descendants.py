"""All that this process has started, however deep, and its end.

For a program whose only business is to run another: what is below it is that one's, and nothing
of it shall outlive it. `adopt` makes what loses its parent come to us, and not to process 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from .warden import process_tree

__all__ = ["adopt", "kill_all", "pids", "reap", "wait_for_end"]

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_KILLED_SECONDS = 5.0  # for what was killed to be gone


def adopt() -> None:
    """Become the parent of orphans among our descendants; a fork does not inherit this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def pids() -> list[int]:
    """Pids of all that is below this process and has not ended."""
    return process_tree.descendants([os.getpid()], process_tree.processes())


def reap() -> Iterator[tuple[int, int]]:
    """Take leave of the children that have ended: pid and status of each."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def kill_all(inspect: Callable[[list[int]], None]) -> None:
    """Kill all that is below this process.

    Args:
        inspect: called with pids before these are killed, while they are stopped.
    """
    deadline = time.monotonic() + _KILLED_SECONDS
    while (left := pids()) and time.monotonic() < deadline:
        _signal(left, signal.SIGSTOP)  # so that none sees another die, and acts on it
        inspect(left)
        _signal(left, signal.SIGKILL)
        wait_for_end(left, deadline)


def wait_for_end(those: Iterable[int], deadline: float) -> None:
    """Wait until processes have ended, or the deadline; they need not be reaped for that."""
    for pid in those:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended = select.poll()
            ended.register(fd, select.POLLIN)
            ended.poll(max(0.0, deadline - time.monotonic()) * 1000)
        finally:
            os.close(fd)


def _signal(those: Iterable[int], number: int) -> None:
    for pid in those:
        # The latter of a program that is another user's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
