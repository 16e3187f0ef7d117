"""The descendants of this process: listing, reaping and killing all of them.

For a program whose only business is to run another one, of which nothing shall outlive it.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator

from .warden.process_tree import become_subreaper, descendants, kill, processes

__all__ = ["become_subreaper", "kill_all", "pids", "reap", "wait_for_end"]

_KILLED_SECONDS = 5.0  # for what was killed to be gone


def pids() -> list[int]:
    """Pids of the descendants that have not ended."""
    return descendants([os.getpid()], processes())


def reap() -> Iterator[tuple[int, int]]:
    """Reap the children that have ended; yields pid and wait status of each."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def kill_all(inspect: Callable[[list[int]], None]) -> None:
    """Kill all descendants.

    Args:
        inspect: called with pids before these are killed, while they are stopped.
    """
    deadline = time.monotonic() + _KILLED_SECONDS
    while (left := pids()) and time.monotonic() < deadline:
        for pid in left:
            kill(pid, signal.SIGSTOP)  # so that none sees another die, and acts on it
        inspect(left)
        for pid in left:
            kill(pid)
        wait_for_end(left, deadline)


def wait_for_end(pids: Iterable[int], deadline: float) -> None:
    """Wait until processes have ended, or a time of `time.monotonic`; zombies have ended."""
    for pid in pids:
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
