"""Real processes: starting one for a test, and what /proc says of it and of those below it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fifos import PATIENCE, readable
from proc import GONE, command_line, is_warden, pids
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

ENDS = 10.0  # seconds for the output of a killed process to end


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


def descendants_of(pid: int) -> list[int]:
    """Pids of the processes below one."""
    below = children_of(pid)
    return below + [child for one in below for child in descendants_of(one)]


def wardens() -> list[int]:
    """Pids of the wardens of this process."""
    return [pid for pid in children_of(os.getpid()) if is_warden(pid)]


def peak_memory(pid: int) -> int:
    """The most memory that a process has held, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmHWM of {pid}")


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
    program: str | Path, *arguments: str, warnings: str = "error", start_new_session: bool = False
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process that runs a script, by its text or its path, and is killed at the end.

    What it started and left behind, holding its output, is killed too, and is a failure.
    """
    what = ["-c", program] if isinstance(program, str) else [str(program)]
    driver = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        warnings,
        *what,
        *arguments,
        start_new_session=start_new_session,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output: set[str] = set()
    with contextlib.suppress(*GONE):  # it may have ended
        output = {os.readlink(f"/proc/{driver.pid}/fd/{fd}") for fd in (1, 2)}
    try:
        yield driver
    finally:
        if driver.returncode is None:
            driver.kill()
        left: dict[int, str] = {}
        try:
            out, err = await asyncio.wait_for(driver.communicate(), ENDS)
        except asyncio.TimeoutError:
            left = _kill_holders(output)
            out, err = await asyncio.wait_for(driver.communicate(), ENDS)
        sys.stdout.write(out.decode(errors="replace"))  # pytest shows them if the test fails
        sys.stderr.write(err.decode(errors="replace"))
        assert not left, f"left behind by the driver, holding its output: {left}"


def _open_files(pid: int) -> set[str]:
    return {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}


def _kill_holders(files: set[str]) -> dict[int, str]:
    """Kill the processes, other than this one, that hold one of these open; return what they were.

    Args:
        files: as /proc/PID/fd names them, `pipe:[4711]`.
    """
    found: dict[int, str] = {}
    for pid in pids():
        with contextlib.suppress(*GONE):
            if pid != os.getpid() and files & _open_files(pid):
                found[pid] = b" ".join(command_line(pid)).decode(errors="replace")
                os.kill(pid, signal.SIGKILL)
    return found


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
