"""What the driver and its processes on the nodes have in common: names, paths and times."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from typing import NamedTuple, Protocol

__all__ = [
    "GRACE",
    "TASK_VARIABLE",
    "NativeQueue",
    "RunContext",
    "node_directory",
    "revoked_path",
    "stop_path",
    "task_mark",
]

#: seconds between SIGTERM and SIGKILL
GRACE = 2.0
#: the environment variable by which the processes of a task are found
TASK_VARIABLE = "RHAPSODY_DRAGON_TASK"


class NativeQueue(Protocol):
    """The methods used here of `dragon.native.queue.Queue`."""

    def put(self, item: object) -> None:
        """Send an object."""

    def get(self, *, timeout: float) -> object:
        """Return an object; raise `queue.Empty` after `timeout` seconds."""

    def destroy(self) -> None:
        """Free the memory of the queue, on all nodes."""


class RunContext(NamedTuple):
    """What the processes of one backend have to know on every node."""

    token: str  # names the directory of each node; a secret of the backend
    queue: bytes  # the pickled native queue for messages to the driver


def node_directory(context: RunContext) -> str:
    """Return the directory of this node: only this user can read it, and nobody can guess it.

    The host's name is in it, because nodes may share the file system of temporary files.
    """
    name = f"rhapsody-{context.token}-{socket.gethostname()}"
    return os.path.join(tempfile.gettempdir(), name)


def revoked_path(directory: str, executor: int, number: int | None = None) -> str:
    """Return the file whose existence forbids a task, or all of an executor, to start."""
    return os.path.join(directory, f"revoked-{executor}" + (f"-{number}" if number else ""))


def stop_path(directory: str, number: int) -> str:
    """Return the file whose existence says that a task shall be stopped."""
    return os.path.join(directory, f"stop-{number}")


def task_mark(context: RunContext, number: int) -> str:
    """Return the value of `TASK_VARIABLE` for the processes of a task."""
    return f"{hashlib.sha256(context.token.encode()).hexdigest()[:16]}-{number}"
