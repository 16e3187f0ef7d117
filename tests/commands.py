"""The command `rhapsody` as a user runs it: in a pipe, and on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODULE = [sys.executable, "-m", "rhapsody"]
ENTRY_POINT = [str(Path(sys.executable).parent / "rhapsody")]

# A Python process becomes the command that its arguments say.
BECOME = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"

ESCAPE = "\x1b["

# What the scripts of the tests begin with.
HEADER = """\
import asyncio, os, sys
import rhapsody
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend
"""


def command(
    *arguments: str | Path,
    program: list[str] = MODULE,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    before: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run the command; ``before`` is Python that its process runs before."""
    first = [sys.executable, "-c", f"{before}\n{BECOME}"] if before else []
    return subprocess.run(
        [*first, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=60,
    )


# Makes the pseudo-terminal the controlling one, so that ^C is a signal.
TAKE_TERMINAL = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{BECOME}"


class Terminal:
    """A command on a pseudo-terminal of 80 columns."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.fd = fd
        self.process = process
        self.seen = ""

    def until(self, text: str | None, seconds: float = 30.0) -> str:
        """Read until ``text`` was printed, or to the end for None; returns all that was seen."""
        deadline = time.monotonic() + seconds
        while text is None or text not in self.seen:
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], (
                f"{text!r} was not printed in {seconds} s; seen: {self.seen!r}"
            )
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # EIO: nobody has the terminal open any more
                data = b""
            if not data:
                assert text is None, f"ended without {text!r}: {self.seen!r}"
                break
            self.seen += data.decode()
        return self.seen

    def interrupt(self) -> None:
        os.write(self.fd, b"\x03")

    def end(self) -> int:
        self.until(None)
        return self.process.wait(30)


@contextmanager
def terminal(*arguments: str | Path, env: dict[str, str] | None = None) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, *MODULE, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **(env or {})},
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        os.close(ours)
        if process.poll() is None:
            process.kill()
        process.wait(30)
