"""Ending worker processes, and the processes that their functions have started."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util  # noqa: F401 - its exit handler must be registered before ours
import os
import signal
import weakref
from multiprocessing.process import BaseProcess

from .warden.process_tree import descendants, suspend

__all__ = ["EscapedDescendants", "kill_group", "workers"]

# A worker that nobody has stopped would be waited for at exit; this runs before multiprocessing's.
workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def _kill_workers() -> None:
    for process in list(workers):
        if process.pid is not None and process.is_alive():
            escaped = EscapedDescendants(process.pid)
            kill_group(process.pid, signal.SIGKILL)
            escaped.signal(signal.SIGKILL)


atexit.register(_kill_workers)


def kill_group(pid: int, number: int) -> None:
    """Signal a process and its group; one that has gone, or made no group yet, is no error."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class EscapedDescendants:
    """The descendants of a process that have left its group; it and they are stopped from now on.

    Once it has died they cannot be told from others. They are kept as pidfds, because a pid may be
    another process's by then.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._fds: list[int] = []
        if not hasattr(os, "pidfd_open"):  # not Linux
            return
        tree = suspend(lambda table: {pid, *descendants([pid], table)} - {os.getpid()})
        for member in tree:
            with contextlib.suppress(OSError):  # it has ended, or there is no descriptor left
                if os.getpgid(member) != pid:
                    self._fds.append(os.pidfd_open(member))

    def signal(self, number: int) -> None:
        """Signal those that still run."""
        for fd in self._fds:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(fd, number)

    def go_on(self) -> None:
        """Continue them and their process's group, with the signals that they got meanwhile."""
        self.signal(signal.SIGCONT)
        kill_group(self._pid, signal.SIGCONT)

    def close(self) -> None:
        """Close the pidfds."""
        while self._fds:
            os.close(self._fds.pop())
