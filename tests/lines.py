"""How a test hears of what goes on in other processes: named pipes and descriptors of processes.

Both sides wait for an event, and nobody looks again and again whether something is there by now.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

PATIENCE = 30.0  # seconds; only a test that fails waits so long


class Line:
    """A named pipe that the test holds open, so that nothing that was said to it is lost."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._left = b""

    async def hear(self) -> str:
        """Wait for one line."""
        loop = asyncio.get_running_loop()
        while b"\n" not in self._left:
            ready = asyncio.Event()
            loop.add_reader(self.fd, ready.set)
            try:
                await asyncio.wait_for(ready.wait(), PATIENCE)
            finally:
                loop.remove_reader(self.fd)
            self._left += os.read(self.fd, 65536)
        line, _, self._left = self._left.partition(b"\n")
        return line.decode()

    async def hear_pids(self) -> list[int]:
        """Wait for a line of numbers."""
        return [int(word) for word in (await self.hear()).split()]

    def say(self, times: int = 1) -> None:
        """Let as many of those who `listen` go on."""
        os.write(self.fd, b"." * times)

    def close(self) -> None:
        os.close(self.fd)


def tell(path: str, *words: object) -> None:
    """In a task: write a line."""
    with open(path, "w") as file:
        file.write(" ".join(map(str, words)) + "\n")


def listen(path: str) -> None:
    """In a task: wait until it is said to go on."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.read(fd, 1)
    finally:
        os.close(fd)


async def gone(pid: int) -> None:
    """Wait until a process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), PATIENCE)
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def lives(pid: int) -> bool:
    """Whether a process is there, and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)
