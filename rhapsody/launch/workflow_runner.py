"""The head: runs a workflow for `rhapsody launch`, and tells how it ended.

Dragon starts this file in the place of the script: `workflow_runner.py FOLDER BEAT SCRIPT [ARGUMENT]...`. The
script runs in a child of its own, as `python SCRIPT` would run it, so that its end is seen however
it comes, and its exit code is known also where Dragon's launcher does not pass it on.

`FOLDER` is the run's, made by the supervisor (see `run_folder`), with two files in it. `REPORT` has
the lines `begun HOST PID HEAD`, `beat N` with an `N` that grows each `BEAT` seconds (0: never), and
at the end `ended CODE`. `STOP` is for us: with something in it, the script gets a Ctrl-C. Both are
there from the start and are opened anew each time, because a network file system shows to another
host only what was closed, and is slow to show new names. On one host the supervisor signals the
script itself, and `BELL`, a named pipe, tells it to read the report; elsewhere there is none.

It stands alone: nothing but the standard library, and as little of that as will do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys

REPORT = "report"
STOP = "stop"
BELL = "bell"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Run the script that the arguments name; ends with its exit code, 128 + n for signal n."""
    folder, beat, *command = sys.argv[1:]
    # Handlers, because a signal that is ignored is ignored by the script too. SIGINT comes to the
    # whole group, and the script has its own; SIGTERM is Dragon's, for what it knows, which is us.
    signal.signal(signal.SIGINT, lambda *_: None)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with(parent)
        os.execv(sys.executable, [sys.executable, *command])  # noqa: S606 - a shell is not wanted
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    report = f"begun {socket.gethostname()} {pid} {parent}\n"
    _write(folder, report)
    if float(beat):
        report = _beat(folder, float(beat), pid, report)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    _write(folder, f"{report}ended {code}\n")
    os._exit(code if code >= 0 else 128 - code)


def die_with(parent: int) -> None:
    """Let the kernel kill us when our parent dies: Dragon ends what it knows with SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was faster
            os._exit(1)


def _write(folder: str, report: str) -> None:
    """Write the report over the shorter one before it, in one piece, and ring."""
    # A folder that this host does not share, or a full disk, is no reason for the script to end.
    with contextlib.suppress(OSError):
        fd = os.open(os.path.join(folder, REPORT), os.O_WRONLY)
        try:
            os.write(fd, report.encode())
        finally:
            os.close(fd)
        bell = os.open(os.path.join(folder, BELL), os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(bell, b".")
        finally:
            os.close(bell)


def _beat(folder: str, seconds: float, pid: int, begun: str) -> str:
    """Give a sign of life each so many seconds, and look for a wish to stop, until the script ends.

    There is no event that crosses hosts: a file is all that is shared. Returns the last report.
    """
    ended = select.poll()
    ended.register(os.pidfd_open(pid), select.POLLIN)
    report = begun
    asked = False
    count = 0
    while not ended.poll(seconds * 1000):
        count += 1
        report = f"{begun}beat {count}\n"
        _write(folder, report)
        if not asked and _wish(folder):
            asked = True
            os.kill(pid, signal.SIGINT)
    return report


def _wish(folder: str) -> bool:
    try:
        with open(os.path.join(folder, STOP), "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


if __name__ == "__main__":
    main()
