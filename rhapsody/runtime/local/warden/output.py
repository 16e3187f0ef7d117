"""One output of a child: held in memory up to a limit, in a file from there on."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["OutputEnd", "Stream"]

_TAIL = 65536  # bytes kept in memory of an output that went to a file: its end
_CHUNK = 65536  # a pipe's capacity
_LAST_READS = 64  # of a pipe whose child has ended: a writer that never stops does not keep us


class OutputEnd(NamedTuple):
    """What came last of an output, how many bytes there were, and the file with all of them."""

    data: bytes = b""
    size: int = 0
    path: str | None = None


class Stream:
    """Reads a pipe without waiting.

    Args:
        fd: the pipe's end, which does not block. `close` closes it.
        limit: how many bytes are held in memory.
        path: the file for what is more, with all that came before; its folder is made.
    """

    __slots__ = ("_data", "_file", "_limit", "_path", "error", "fd", "size")

    def __init__(self, fd: int, limit: int, path: str) -> None:
        self.fd = fd
        self.size = 0  # bytes
        self.error: str | None = None  # why the file could not be written
        self._limit = limit
        self._path = path
        self._data = bytearray()
        self._file: int | None = None

    def read(self) -> bool:
        """Read once; False at the end of the stream."""
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return True
        if not data:
            return False
        self._take(data)
        return True

    def read_rest(self) -> None:
        """Read all that is in the pipe now."""
        for _ in range(_LAST_READS):
            before = self.size
            if not self.read() or self.size == before:
                return

    def close(self) -> OutputEnd:
        """Close the pipe, and the file if there is one."""
        os.close(self.fd)
        if self._file is None:
            return OutputEnd(bytes(self._data), self.size)
        os.close(self._file)
        return OutputEnd(bytes(self._data[-_TAIL:]), self.size, self._path)

    def _take(self, data: bytes) -> None:
        self.size += len(data)
        self._data += data
        if self._file is not None:
            self._write(data)
        elif self.size > self._limit and self.error is None:
            self._open_file()
        if self.size > self._limit and len(self._data) > 2 * _TAIL:
            del self._data[:-_TAIL]

    def _open_file(self) -> None:
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            self.error = f"cannot write {self._path}: {error.strerror}"
        else:
            self._write(bytes(self._data))

    def _write(self, data: bytes) -> None:
        # On an error we read on, and report it at the end: the child must not block for it.
        view = memoryview(data)
        while view and self.error is None and self._file is not None:
            try:
                view = view[os.write(self._file, view) :]
            except OSError as error:
                self.error = f"cannot write {self._path}: {error.strerror}"
