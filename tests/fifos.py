"""Named pipes between a test and other processes: what these report, and when they may go on.

Both sides wait for an event, and nobody looks again and again whether something is there by now.
"""

from __future__ import annotations

import asyncio
import os
import select
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

PATIENCE = 30.0  # seconds until a wait for an event is a failure


class Fifo:
    """A named pipe that the test holds open, so that nothing that was written to it is lost.

    Programs report lines to it (`report`), wait for a byte of it (`wait_for_release`), or just hold
    it open: as every descendant inherits the descriptor, its end of file says that all are gone.
    `here` at the start of a shell script opens it as descriptor 9, and reports the shell's pid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._own = os.open(path, os.O_WRONLY)  # no end of file before we want to see it
        self._data = b""
        self.here = f"exec 9>'{path}'; echo $$ >&9"

    def script(self, rest: str, before: str = ":") -> list[str]:
        """The arguments of a shell that reports, then goes on with `rest`."""
        return ["-c", f"{before}; {self.here}; {rest}"]

    def forking(self) -> str:
        """A script that reports, and forks on and on in a session of its own."""
        forks = "n=0; while [ $n -lt 500 ]; do sleep 1000 & n=$((n+1)); done; wait"
        return f"setsid sh -c '{self.here.replace(chr(39), '')}; {forks}' & wait"

    async def line(self) -> str:
        """The next line that was reported."""
        while b"\n" not in self._data:
            await readable(self._fd)
            self._data += os.read(self._fd, 65536)
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()

    async def lines(self, count: int) -> list[str]:
        return [await self.line() for _ in range(count)]

    async def pids(self, count: int = 1) -> list[int]:
        """The numbers in the next lines."""
        return [int(word) for line in await self.lines(count) for word in line.split()]

    def release(self, count: int = 1) -> None:
        """Let as many of those go on who `wait_for_release`."""
        os.write(self._own, b"." * count)

    async def empty(self) -> None:
        """Wait until nobody holds it open any more."""
        os.close(self._own)
        try:
            while True:
                await readable(self._fd)
                more = os.read(self._fd, 65536)
                if not more:
                    return
                self._data += more
        finally:
            # A writer again, so that more can be reported; then the reader is surely there.
            self._own = os.open(self.path, os.O_WRONLY)

    def is_empty(self) -> bool:
        """Whether nobody holds it open now."""
        os.close(self._own)
        try:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return any(bits & select.POLLHUP for _, bits in poll.poll(0))
        finally:
            self._own = os.open(self.path, os.O_WRONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._own)
        os.close(self._fd)


def report(path: str | PathLike[str], *words: object) -> None:
    """In a task: write a line."""
    with open(path, "w") as file:
        file.write(" ".join(map(str, words)) + "\n")


def wait_for_release(path: str | PathLike[str]) -> None:
    """In a task: wait until the test lets it go on."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.read(fd, 1)
    finally:
        os.close(fd)


async def readable(fd: int) -> None:
    """Wait until a descriptor can be read, or is at its end."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, tell)
    try:
        await asyncio.wait_for(ready, PATIENCE)
    finally:
        loop.remove_reader(fd)
