"""Frames on a blocking socket: a kind, two times, and bytes of any length."""

from __future__ import annotations

import os
import select
import socket
import struct
import weakref
from typing import NamedTuple

__all__ = ["Frame", "FrameSocket", "keep_from_forks"]

_HEADER = struct.Struct("!cQdd")
_READ = 1 << 18


class Frame(NamedTuple):
    """What one side tells the other."""

    kind: bytes  # one letter
    data: bytearray
    started: float = 0.0
    ended: float = 0.0


class FrameSocket:
    """Sends and receives frames; each direction from one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._inbox = bytearray()
        self._taken = 0

    def send(
        self, kind: bytes, data: bytes = b"", started: float = 0.0, ended: float = 0.0
    ) -> None:
        """Send a frame; raises OSError when the other side has gone."""
        header = _HEADER.pack(kind, len(data), started, ended)
        if len(data) < _READ:
            self.sock.sendall(header + data)
        else:
            self.sock.sendall(header)
            self.sock.sendall(data)

    def receive(self) -> Frame | None:
        """Return the next frame, or None when the other side has gone, in mid-frame too."""
        header = self._bytes(_HEADER.size)
        if header is None:
            return None
        kind, size, started, ended = _HEADER.unpack(header)
        data = self._bytes(size)
        return None if data is None else Frame(kind, data, started, ended)

    def pending(self) -> bool:
        """Whether a frame can be taken without reading from the socket."""
        left = len(self._inbox) - self._taken
        if left < _HEADER.size:
            return False
        return left >= _HEADER.size + int(_HEADER.unpack_from(self._inbox, self._taken)[1])

    def readable(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for something to read."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def _bytes(self, size: int) -> bytearray | None:
        left = len(self._inbox) - self._taken
        if left < size and size > _READ:  # a large one goes straight to its place
            return self._large(size)
        while len(self._inbox) - self._taken < size:
            more = self._recv(_READ)
            if not more:
                return None
            del self._inbox[: self._taken]
            self._taken = 0
            self._inbox += more
        data = self._inbox[self._taken : self._taken + size]
        self._taken += size
        return data

    def _large(self, size: int) -> bytearray | None:
        data = bytearray(size)
        have = len(self._inbox) - self._taken
        data[:have] = self._inbox[self._taken :]
        self._inbox.clear()
        self._taken = 0
        with memoryview(data) as view:
            while have < size:
                try:
                    count = self.sock.recv_into(view[have:])
                except OSError:
                    return None
                if not count:
                    return None
                have += count
        return data

    def _recv(self, size: int) -> bytes:
        try:
            return self.sock.recv(size)
        except OSError:
            return b""


_kept: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_forks(sock: socket.socket) -> None:
    """Close a socket in forked children: one that held it would hide our death from its peer."""
    _kept.add(sock)


def _close_kept() -> None:
    for sock in list(_kept):
        sock.close()


os.register_at_fork(after_in_child=_close_kept)
