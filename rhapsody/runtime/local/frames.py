"""Frames on a stream socket: a header that begins with a length, and that many bytes."""

from __future__ import annotations

import os
import select
import socket
import struct
import weakref
from typing import Any, NamedTuple

__all__ = ["Frame", "FrameBuffer", "FrameSocket", "keep_from_forks"]

_HEADER = struct.Struct("!Qcdd")
_READ = 1 << 18


class RawFrame(NamedTuple):
    """The fields of a header, and what came behind it."""

    header: tuple[Any, ...]
    data: bytearray


class FrameBuffer:
    """Assembles frames from bytes that arrive in pieces of any size.

    Args:
        header: its first field is the length of what follows it.
    """

    def __init__(self, header: struct.Struct) -> None:
        self._header = header
        self._data = bytearray()
        self._taken = 0

    def feed(self, data: bytes) -> None:
        """Append what has arrived."""
        if self._taken:
            del self._data[: self._taken]
            self._taken = 0
        self._data += data

    def missing(self) -> int:
        """How many bytes the next frame, or its header, still lacks."""
        left = len(self._data) - self._taken - self._header.size
        if left < 0:
            return -left
        size: int = self._header.unpack_from(self._data, self._taken)[0]
        return max(0, size - left)

    def take(self) -> RawFrame:
        """Remove the next frame, of which nothing is missing."""
        header = self._header.unpack_from(self._data, self._taken)
        start = self._taken + self._header.size
        self._taken = start + header[0]
        return RawFrame(header, self._data[start : self._taken])

    def take_part(self) -> tuple[RawFrame, int]:
        """Remove the part that is there of the next frame, whose header is there.

        Returns the frame with space for all its bytes, and how many of them are there.
        """
        header = self._header.unpack_from(self._data, self._taken)
        part = self._data[self._taken + self._header.size :]
        self._data.clear()
        self._taken = 0
        data = bytearray(header[0])
        data[: len(part)] = part
        return RawFrame(header, data), len(part)


class Frame(NamedTuple):
    """A message; of a result also when its call began and ended, by `time.monotonic()`."""

    kind: bytes  # one letter
    data: bytearray
    started: float = 0.0
    ended: float = 0.0


class FrameSocket:
    """Sends and receives frames, and blocks for them; each direction from one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._inbox = FrameBuffer(_HEADER)

    def send(
        self, kind: bytes, data: bytes = b"", started: float = 0.0, ended: float = 0.0
    ) -> None:
        """Send a frame; raises OSError when the other side has closed or died."""
        header = _HEADER.pack(len(data), kind, started, ended)
        if len(data) < _READ:
            self.sock.sendall(header + data)
        else:
            self.sock.sendall(header)
            self.sock.sendall(data)

    def receive(self) -> Frame | None:
        """Return the next frame; None at the end of the stream, within a frame too."""
        try:
            while missing := self._inbox.missing():
                if missing > _READ:  # a large one is read into its own buffer
                    frame, have = self._inbox.take_part()
                    return _frame(frame) if self._fill(frame.data, have) else None
                more = self.sock.recv(_READ)
                if not more:
                    return None
                self._inbox.feed(more)
        except OSError:
            return None
        return _frame(self._inbox.take())

    def pending(self) -> bool:
        """Whether a frame can be taken without reading from the socket."""
        return not self._inbox.missing()

    def readable(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for something to read."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def _fill(self, data: bytearray, have: int) -> bool:
        with memoryview(data) as view:
            while have < len(data):
                count = self.sock.recv_into(view[have:])
                if not count:
                    return False
                have += count
        return True


def _frame(raw: RawFrame) -> Frame:
    _, kind, started, ended = raw.header
    return Frame(kind, raw.data, started, ended)


_kept: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_forks(sock: socket.socket) -> None:
    """Close a socket in forked children: one that held it would hide our death from its peer."""
    _kept.add(sock)


def _close_kept() -> None:
    for sock in list(_kept):
        sock.close()


os.register_at_fork(after_in_child=_close_kept)
