"""Runs a workflow's script for `rhapsody launch`, and reports how it ended.

Dragon starts this file in place of the script:
`workflow_runner.py DIRECTORY INTERVAL SCRIPT [ARGUMENT]...`. The script runs in a child process, as
`python SCRIPT` would run it, so that its end is seen whatever ends it, and its exit code is known
even where Dragon's launcher does not pass it on.

`DIRECTORY` is the run's (see `run_directory`), with two files for this process. To `REPORT` it
writes the lines `started HOST WORKFLOW_PID RUNNER_PID`, `heartbeat N` with an `N` that grows every
`INTERVAL` seconds (0: never), and at the end `exited CODE`. From `STOP` it reads: when the file is
not empty, it sends the script SIGINT. Both exist from the start and are opened anew each time,
because a network file system shows to another host only what was closed, and is slow to show new
names. On one host the supervisor signals the script itself, and the named pipe `WAKEUP` tells it to
read the report; for several nodes there is no such pipe.

It imports only a little of the standard library: it runs before every workflow.
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
WAKEUP = "wakeup"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Run the script that the arguments name; exits with its exit code, 128 + n for signal n."""
    directory, interval, *command = sys.argv[1:]
    # Handlers, because a signal that is ignored here is ignored by the script too. SIGINT goes to
    # the whole group, and so to the script; SIGTERM comes from Dragon to this process alone.
    signal.signal(signal.SIGINT, lambda *_: None)
    runner = os.getpid()
    workflow = os.fork()
    if workflow == 0:
        die_with_parent(runner)
        os.execv(sys.executable, [sys.executable, *command])  # noqa: S606 - a shell is not wanted
    signal.signal(signal.SIGTERM, lambda *_: os.kill(workflow, signal.SIGTERM))
    report = f"started {socket.gethostname()} {workflow} {runner}\n"
    _write(directory, report)
    if float(interval):
        report = _send_heartbeats(directory, float(interval), workflow, report)
    _, status = os.waitpid(workflow, 0)
    code = os.waitstatus_to_exitcode(status)
    _write(directory, f"{report}exited {code}\n")
    os._exit(code if code >= 0 else 128 - code)


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent dies, as Dragon ends it by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def _write(directory: str, report: str) -> None:
    """Write the report over the shorter one before it, in one call, and wake the supervisor up."""
    # A directory that this host does not share, or a full disk, must not end the script.
    with contextlib.suppress(OSError):
        fd = os.open(os.path.join(directory, REPORT), os.O_WRONLY)
        try:
            os.write(fd, report.encode())
        finally:
            os.close(fd)
        wakeup = os.open(os.path.join(directory, WAKEUP), os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(wakeup, b".")
        finally:
            os.close(wakeup)


def _send_heartbeats(directory: str, interval: float, workflow: int, started: str) -> str:
    """Write heartbeats every `interval` seconds and look for a stop request, while the script runs.

    No event crosses hosts: the hosts share nothing but files. Returns the last report.
    """
    ended = select.poll()
    ended.register(os.pidfd_open(workflow), select.POLLIN)
    report = started
    stopping = False
    count = 0
    while not ended.poll(interval * 1000):
        count += 1
        report = f"{started}heartbeat {count}\n"
        _write(directory, report)
        if not stopping and _stop_requested(directory):
            stopping = True
            os.kill(workflow, signal.SIGINT)
    return report


def _stop_requested(directory: str) -> bool:
    try:
        with open(os.path.join(directory, STOP), "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


if __name__ == "__main__":
    main()
