"""What the plugins on the scheduler and on the workers report to the backend."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, TypedDict

__all__ = ["CompletedKey", "Message", "StopResult"]


class CompletedKey(NamedTuple):
    """A key that makes no further transition.

    Dask's messages keep of it the plain tuple.
    """

    key: str
    #: `memory` or `erred`, as Dask calls these states; `forgotten` if it was released before
    status: str
    #: for which it was computed
    seconds: float
    #: of its result, as Dask estimates it
    nbytes: int


class Message(TypedDict, total=False):
    """An event of the backend's topic: from the scheduler's plugin, or from a worker's."""

    completed: list[CompletedKey]
    #: keys that no worker of the cluster may run, and those of them that one now may
    unrunnable: list[str]
    runnable: list[str]
    #: how many workers there are, and the different resources that they advertise
    worker_count: int
    advertised: list[dict[str, float]]
    #: keys that run on the worker of this address
    running: list[str]
    worker: str


class StopResult(str, Enum):
    """What a worker answers when it is asked to stop a key."""

    #: it ran there, and has ended
    STOPPED = "stopped"
    #: it runs there, and cannot be interrupted
    BUSY = "busy"
    #: its result is there
    DONE = "done"
    #: it had not started there, and will be refused
    ABSENT = "absent"
    #: the worker did not answer, and the scheduler had assigned the key to it
    UNKNOWN = "unknown"
