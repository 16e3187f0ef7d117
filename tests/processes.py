"""Watching real processes: by what they write to a FIFO that they hold open, and by /proc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

PATIENCE = 30.0  # seconds until a wait for an event is a failure


class Roster:
    """A FIFO that programs report to, and that they and their descendants hold open.

    `HERE` at the start of a shell script opens it and reports the shell's pid. As every
    descendant inherits the descriptor, its end of file says that all of them are gone.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "roster"
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self._own = os.open(self.path, os.O_WRONLY)  # no end of file before we want to see it
        self._data = b""
        self.here = f"exec 9>'{self.path}'; echo $$ >&9"

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

    def close(self) -> None:
        os.close(self._own)
        os.close(self._fd)


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


async def gone(pid: int) -> None:
    """Wait until a process has ended; a zombie has."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await readable(fd)
    finally:
        os.close(fd)


def alive(pid: int) -> bool:
    """Whether a process is there, and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")


def children_of(pid: int) -> list[int]:
    """Pids of a process's children, zombies among them; none of one that has ended."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += [int(word) for word in (task / "children").read_text().split()]
    return found


def command_line(pid: int) -> list[bytes]:
    """The words of a process's command; none of one that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    return []


def descendants_of(pid: int) -> list[int]:
    """Pids of the processes below one."""
    below = children_of(pid)
    return below + [child for one in below for child in descendants_of(one)]


def wardens() -> list[int]:
    """Pids of the wardens of this process."""
    return [pid for pid in children_of(os.getpid()) if is_warden(pid)]


def is_warden(pid: int) -> bool:
    return any(
        word.endswith((b"local/warden", b"local/warden/__main__.py")) for word in command_line(pid)
    )


def peak_memory(pid: int) -> int:
    """The most memory that a process has held, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmHWM of {pid}")


@contextlib.contextmanager
def roster_in(folder: Path) -> Iterator[Roster]:
    roster = Roster(folder)
    try:
        yield roster
    finally:
        roster.close()


@contextlib.asynccontextmanager
async def open_session(slots: int | None = 2, grace: float = 5.0) -> AsyncIterator[Session]:
    """A session on a backend of its own."""
    backend = await ConcurrentExecutionBackend(slots=slots, grace=grace)
    async with Session(backends=[backend]) as session:
        yield session


async def run(*tasks: ComputeTask, slots: int | None = 2) -> None:
    """Run tasks to their ends in a session of their own."""
    async with open_session(slots) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=PATIENCE)


@contextlib.asynccontextmanager
async def driver_of(
    program: str | Path, *arguments: str, start_new_session: bool = False
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process, which is killed at the end if it still runs: a text, or a script's path."""
    what = ["-c", program] if isinstance(program, str) else [str(program)]
    driver = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        *what,
        *arguments,
        start_new_session=start_new_session,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield driver
    finally:
        if driver.returncode is None:
            driver.kill()
        out, err = await driver.communicate()
        sys.stdout.write(out.decode(errors="replace"))  # pytest shows them if the test fails
        sys.stderr.write(err.decode(errors="replace"))


def most_at_once(log: Path) -> int:
    """How many ran at once at most, of programs that log their begin and their end."""
    running = most = 0
    for word in log.read_text().split():
        running += 1 if word == "begin" else -1
        most = max(most, running)
    return most


def _descriptors(pid: int) -> list[Path]:
    """Of a process; none of one that has ended. In the moment of an exec or an exit others than
    root may not look, so that they look again.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return list(Path(f"/proc/{pid}/fd").iterdir())
        except (FileNotFoundError, ProcessLookupError):
            return []
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def public_listeners(pids: list[int]) -> list[str]:
    """Addresses beyond loopback on which any of these processes listens."""
    inodes = set()
    for pid in pids:
        for entry in _descriptors(pid):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
            except FileNotFoundError:
                continue
            if found:
                inodes.add(found[1])
    listening = []
    for name in ("tcp", "tcp6"):
        table = Path(f"/proc/net/{name}")
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            fields = line.split()
            address, state = fields[1], fields[3]
            # Words of 4 bytes in the machine's order: 127.x.y.z and ::1.
            local = address.partition(":")[0]
            loopback = local[6:] == "7F" if name == "tcp" else local == "0" * 24 + "01000000"
            if state == "0A" and fields[9] in inodes and not loopback:
                listening.append(f"{name} {address}")
    return listening
