"""What a driver and its warden tell each other: requests one way, events the other, in frames.

A frame holds a list of messages in `marshal`'s format: both ends are the same interpreter. Times
are seconds of `time.monotonic`, keys are the driver's numbers of its children, counted from 1.
"""

from __future__ import annotations

import marshal
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..frames import FrameBuffer

__all__ = [
    "Directory",
    "Dropped",
    "Ended",
    "Environment",
    "Guard",
    "Kill",
    "Message",
    "MessageBuffer",
    "Refused",
    "Run",
    "StartNow",
    "Started",
    "Unguard",
    "encode",
]


# ---------------------------------------------------------------------- requests


class Environment(NamedTuple):
    """Children that are started from now on have these variables."""

    variables: dict[str, str]


class Directory(NamedTuple):
    """Children that are started from now on have this working directory."""

    path: str


class Guard(NamedTuple):
    """End a process group, which the driver has started itself, when the driver is gone."""

    pid: int


class Unguard(NamedTuple):
    """Forget a guarded process group: it has ended."""

    pid: int


class Run(NamedTuple):
    """Start a child. A `queued` one starts when an unpinned child ends, in its place.

    `cwd` and `env` are of the child alone; `env` is added to the variables that all have, unless
    it shall replace them. `stdin` is what the child reads, or the path of a file. The outputs go
    to their files with `to_files`, else what of each is more than `limit` bytes. A child with
    `cores` is pinned to them.
    """

    key: int
    argv: list[str]
    stdout_path: str
    stderr_path: str
    to_files: bool
    limit: int
    cwd: str | None
    env: dict[str, str]
    env_replace: bool
    stdin: bytes | str | None
    cores: list[int]
    queued: bool


class StartNow(NamedTuple):
    """Start a queued child, unless it has been started meanwhile: the driver has a slot for it."""

    key: int


class Kill(NamedTuple):
    """End a child's process group: SIGTERM, and SIGKILL after `grace` seconds; or drop it."""

    key: int
    grace: float


# ---------------------------------------------------------------------- events


class Started(NamedTuple):
    """A child runs."""

    key: int
    pid: int
    started: float


class Refused(NamedTuple):
    """A child could not be started, for what the error number says."""

    key: int
    errno: int
    reason: str
    filename: str | None


class Dropped(NamedTuple):
    """A queued child was to be killed, and has never started."""

    key: int


class Ended(NamedTuple):
    """A child has ended, and its process group is gone.

    Of each output: its end, or all of it, then its size, then its file if it has one.
    `successor` is the key of the queued child that was started in its place, 0 for none.
    """

    key: int
    exit_code: int
    killed: bool
    started: float
    ended: float
    stdout: bytes
    stdout_size: int
    stdout_file: str | None
    stderr: bytes
    stderr_size: int
    stderr_file: str | None
    error: str  # what of the output was lost
    successor: int


# ---------------------------------------------------------------------- frames

Request = Environment | Directory | Guard | Unguard | Run | StartNow | Kill
Event = Started | Refused | Dropped | Ended
Message = Request | Event
_KINDS: tuple[type[Message], ...] = (
    Environment,
    Directory,
    Guard,
    Unguard,
    Run,
    StartNow,
    Kill,
    Started,
    Refused,
    Dropped,
    Ended,
)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}
_HEADER = struct.Struct("!I")  # a frame's length


def encode(messages: Sequence[Message]) -> bytes:
    """Make a frame; raises ValueError for what cannot be marshalled."""
    data = marshal.dumps([(_NUMBERS[type(message)], tuple(message)) for message in messages])
    return _HEADER.pack(len(data)) + data


class MessageBuffer:
    """Takes bytes from a socket, gives messages."""

    def __init__(self) -> None:
        self._frames = FrameBuffer(_HEADER)

    def feed(self, data: bytes) -> Iterable[Message]:
        """Take what has arrived; yields the messages that are whole now."""
        self._frames.feed(data)
        while not self._frames.missing():
            for number, fields in marshal.loads(self._frames.take().data):
                yield _KINDS[number](*fields)
