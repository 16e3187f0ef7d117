"""A child and the process groups of its descendants: found, suspended and signalled."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterable

from .output import Stream
from .process_tree import STOP_TIMEOUT, ProcessTable, descendants, kill_group, suspend

__all__ = ["Child", "suspend_children"]


class Child:
    """A process group that the warden started.

    Args:
        key: the driver's number of it.
        pid: also its group's number.
        streams: stdout and stderr, or none where they go to files.
        pinned: whether it has cores of its own.
        started: seconds of `time.monotonic`.
    """

    __slots__ = (
        "ended",
        "exit_code",
        "groups",
        "key",
        "killed",
        "pid",
        "pinned",
        "started",
        "streams",
    )

    def __init__(
        self, key: int, pid: int, streams: Collection[Stream], pinned: bool, started: float
    ) -> None:
        self.key = key
        self.pid = pid
        self.streams = streams
        self.pinned = pinned
        self.started = started
        self.ended = 0.0
        self.exit_code = 0
        self.killed = False
        self.groups = {pid}  # with those of its descendants, once it is to be killed

    def signal(self, number: int) -> None:
        """Signal all of its groups that are known."""
        for group in self.groups:
            kill_group(group, number)

    def is_gone(self) -> bool:
        """Whether nothing is left of its groups."""
        return not any(kill_group(group, 0) for group in self.groups)

    def has_ended(self) -> bool:
        """Whether it is a zombie, though others of its group may run."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def find_groups(self, table: ProcessTable) -> None:
        """Find the groups of its descendants.

        Those that are known stay, though their parents may have died, while they have members: no
        other group can have their number then.
        """
        ours = {table[pid].group for pid in descendants([os.getpid()], table)}
        found = {table[pid].group for pid in descendants([self.pid], table)} - {os.getpgrp()}
        self.groups = {self.pid} | found | (self.groups & ours)


def suspend_children(children: Collection[Child]) -> None:
    """Stop children and their descendants where they are, whatever group they are in."""

    def find(table: ProcessTable) -> Iterable[int]:
        groups: set[int] = set()
        for child in children:
            child.find_groups(table)
            groups |= child.groups
        return [pid for pid, process in table.items() if process.group in groups]

    def stop(_: object = None) -> None:
        for child in children:
            child.signal(signal.SIGSTOP)

    stop()  # now: so there is less to come in the first table
    suspend(find, stop=stop, limit=STOP_TIMEOUT)
