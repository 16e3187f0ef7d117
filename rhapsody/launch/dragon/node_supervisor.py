"""The keeper of a node: runs Dragon's part there for `rhapsody launch`, and ends it with the run.

`python -m rhapsody.launch.dragon.node_supervisor FOLDER COMMAND...` stands in the place of
`dragon-backend` on each of several nodes. When Dragon's launcher is killed, nobody else would tell
the nodes: their processes would go on, and take a core each. The sign of the run's end is that its
folder, which the nodes share, has gone; and of the death of the host where it was launched, that
the count in `ALIVE` there stands still. A node that does not see the folder has no keeper.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

from rhapsody.runtime.local import descendants

from .shared_memory import Segments

__all__ = ["ALIVE", "BEAT_SECONDS", "LOST_BEATS"]

ALIVE = "alive"
BEAT_SECONDS = 2.0  # between two signs of life on a shared file system
LOST_BEATS = 60  # that may be missed in a row: a network file system may be slow for a minute


def main() -> None:
    """Run the command; ends with its exit code, or 1 when the run ended first."""
    folder, *command = sys.argv[1:]
    descendants.adopt()
    segments = Segments()
    backend = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: backend.send_signal(number))
    ended = select.poll()
    ended.register(os.pidfd_open(backend.pid), select.POLLIN)
    missed, last = 0, b""
    while missed < LOST_BEATS and os.path.isdir(folder):
        if ended.poll(BEAT_SECONDS * 1000):
            break
        count = _count(folder) or last
        missed = missed + 1 if count == last else 0
        last = count
    descendants.end_all(segments)
    code = backend.wait()
    os._exit(code if code >= 0 else 1)


def _count(folder: str) -> bytes:
    with contextlib.suppress(OSError), open(os.path.join(folder, ALIVE), "rb") as file:
        return file.read()
    return b""


if __name__ == "__main__":
    main()
