"""A command inside a box: its lines while it runs, signals to it, and its result."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

_LAST = 4000  # characters of output that an error shows
KILLED = 20.0  # seconds for the kernel to end what was killed, with all cores busy


@dataclass(frozen=True)
class Result:
    """How a command ended: a negative `code` is the signal that ended it."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"exit code {self.code} after {self.seconds:.1f} s\n"
            f"--- stdout\n{self.stdout[-_LAST:]}\n--- stderr\n{self.stderr[-_LAST:]}"
        )


class _Reader(threading.Thread):
    """Takes the lines of a pipe as they come, so that the command never waits for us."""

    def __init__(self, pipe: IO[str], changed: threading.Condition) -> None:
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self.ended = False
        self._pipe = pipe
        self._changed = changed
        self.start()

    def run(self) -> None:
        with self._pipe:
            for line in self._pipe:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self.ended = True
            self._changed.notify_all()


class Running:
    """A command that runs.

    Args:
        entry: the process that entered the namespaces and has the command as its only child.
        kill_all: ends everything in the box; called where the command overstays its time.
    """

    def __init__(self, entry: subprocess.Popen[str], kill_all: Callable[[], None]) -> None:
        assert entry.stdout is not None
        assert entry.stderr is not None
        self._entry = entry
        self._kill_all = kill_all
        self._began = time.monotonic()
        self._changed = threading.Condition()
        self._out = _Reader(entry.stdout, self._changed)
        self._err = _Reader(entry.stderr, self._changed)
        self._read = 0

    @property
    def pid(self) -> int:
        """The command's pid, as this process numbers it.

        Raises:
            ProcessLookupError: it has ended.
        """
        entry = self._entry.pid
        try:
            with open(f"/proc/{entry}/task/{entry}/children") as children:
                return int(children.read().split()[0])
        except (OSError, IndexError):
            raise ProcessLookupError(f"the command of {entry} has ended") from None

    def signal(self, number: int, *, group: bool = False) -> None:
        """Signal the command; with `group` its process group, as Ctrl-C on a terminal does."""
        (os.killpg if group else os.kill)(self.pid, number)

    def running(self) -> bool:
        """Whether the command has not ended yet."""
        return self._entry.poll() is None

    def line(self, timeout: float = 30.0) -> str | None:
        """The next line of stdout without its end; None where there are no more.

        Raises:
            TimeoutError: none came within `timeout` seconds; says what was written.
        """
        with self._changed:
            if not self._changed.wait_for(self._more, timeout):
                raise TimeoutError(f"no line within {timeout:g} s:\n{self._so_far()}")
            if self._read == len(self._out.lines):
                return None
            self._read += 1
            return self._out.lines[self._read - 1].rstrip("\n")

    def wait_for(self, text: str, timeout: float = 60.0) -> str:
        """The next line of stdout that has `text` in it.

        Raises:
            TimeoutError: it did not come within `timeout` seconds.
            EOFError: the output ended without it.
        """
        deadline = time.monotonic() + timeout
        while (line := self.line(max(0.0, deadline - time.monotonic()))) is not None:
            if text in line:
                return line
        raise EOFError(f"the output ended without {text!r}:\n{self._so_far()}")

    def wait(self, timeout: float = 60.0) -> Result:
        """Wait for the end of the command, not of what it started.

        Raises:
            TimeoutError: it still ran after `timeout` seconds; then all in the box is killed.
        """
        try:
            code = self._entry.wait(timeout)
        except subprocess.TimeoutExpired:
            self._kill_all()
            self._entry.wait(KILLED)
            result = self._result(-signal.SIGKILL)
            raise TimeoutError(f"still ran after {timeout:g} s, {result}") from None
        return self._result(code)

    def kill(self) -> None:
        """Kill the command alone, if it still runs."""
        try:
            self.signal(signal.SIGKILL)
        except ProcessLookupError:
            return
        self._entry.wait(KILLED)

    def _more(self) -> bool:
        return self._out.ended or len(self._out.lines) > self._read

    def _result(self, code: int) -> Result:
        seconds = time.monotonic() - self._began
        for reader in (self._out, self._err):
            reader.join(1.0)  # a process that was left behind may hold the pipe open
        with self._changed:
            return Result(code, "".join(self._out.lines), "".join(self._err.lines), seconds)

    def _so_far(self) -> str:
        out, err = "".join(self._out.lines), "".join(self._err.lines)
        return f"--- stdout\n{out[-_LAST:]}\n--- stderr\n{err[-_LAST:]}"
