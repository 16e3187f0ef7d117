"""Runs Dragon's part of a node for `rhapsody launch`, and ends it when the run is over.

`python -m rhapsody.launch.dragon.node_supervisor DIRECTORY COMMAND...` takes the place of
`dragon-backend` on each of several nodes. When Dragon's launcher is killed, nothing else tells the
nodes: their processes would go on, and use a core each. The run is over when its directory, which
the nodes share, is removed; the host where it was launched is lost when the count in `HEARTBEAT`
there does not change any more. A node that does not see the directory does not find the shim that
starts this, and runs `dragon-backend` unsupervised.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

from rhapsody.runtime.local import descendants

from .shared_memory import SegmentTracker

__all__ = ["HEARTBEAT", "HEARTBEAT_SECONDS", "MISSED_HEARTBEATS"]

HEARTBEAT = "heartbeat"
HEARTBEAT_SECONDS = 2.0  # between two heartbeats on a shared file system
MISSED_HEARTBEATS = 60  # in a row mean a lost host: a network file system may stall for a minute


def main() -> None:
    """Run the command; exits with its exit code, or 1 when the run was over before it."""
    directory, *command = sys.argv[1:]
    descendants.become_subreaper()
    segments = SegmentTracker()
    backend = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: backend.send_signal(number))
    ended = select.poll()
    ended.register(os.pidfd_open(backend.pid), select.POLLIN)
    missed, last = 0, b""
    while missed < MISSED_HEARTBEATS and os.path.isdir(directory):
        if ended.poll(HEARTBEAT_SECONDS * 1000):
            break
        count = _read_heartbeat(directory) or last
        missed = missed + 1 if count == last else 0
        last = count
    descendants.kill_all(segments.record)
    segments.unlink()
    code = backend.wait()
    os._exit(code if code >= 0 else 1)


def _read_heartbeat(directory: str) -> bytes:
    with contextlib.suppress(OSError), open(os.path.join(directory, HEARTBEAT), "rb") as file:
        return file.read()
    return b""


if __name__ == "__main__":
    main()
