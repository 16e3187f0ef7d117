"""Messages between the driver, the agents of the nodes and the workers: types and pickling.

To the driver go tuples of messages, as bytes, on one native queue; to each agent go requests, on a
queue of its own; to workers go tasks.
"""

from __future__ import annotations

import os
import pickle
from typing import Any, NamedTuple, get_args

__all__ = [
    "CallEnded",
    "CallResult",
    "ExecutableEnded",
    "ExecutableResult",
    "Heartbeat",
    "LeaveRequest",
    "NodeInfo",
    "NodeMessage",
    "PoolTask",
    "RankEnded",
    "Request",
    "RevokeReply",
    "RevokeRequest",
    "StopReply",
    "StopRequest",
    "TaskMessage",
    "TaskResult",
    "TaskStarted",
    "WorkerLost",
    "WorkerUp",
    "pack_messages",
    "pack_pool_task",
    "pack_task",
    "spill",
    "unpack_messages",
    "unpack_pool_task",
    "unpack_task",
    "unspill",
]

# ---------------------------------------------------------------------- results of a task


class CallResult(NamedTuple):
    """How a function ended."""

    returned: bool  # or raised
    data: bytes | str  # what it returned or raised, pickled; or the path of a file with that


class ExecutableResult(NamedTuple):
    """How an executable ended."""

    state: str
    fields: dict[str, Any]  # result fields, of which `exception` is pickled


TaskResult = CallResult | ExecutableResult

# ---------------------------------------------------------------------- to the driver


class NodeInfo(NamedTuple):
    """The first message of an agent."""

    host: str
    pid: int  # of the agent
    cpus: list[int]  # ids of the granted ones, hardware threads of a core together
    has_pmix: bool  # whether Dragon finds a libpmix.so


class Heartbeat(NamedTuple):
    """An agent is alive."""

    host: str


class TaskStarted(NamedTuple):
    """A task has started, or one of its ranks has."""

    number: int
    hostname: str


class CallEnded(NamedTuple):
    """A function that ran in a worker has ended; the fields of a `CallResult` are in it."""

    number: int
    returned: bool
    data: bytes | str
    hostname: str
    seconds: float  # for which it ran


class ExecutableEnded(NamedTuple):
    """An executable of a worker has ended; the fields of an `ExecutableResult` are in it."""

    number: int
    state: str
    fields: dict[str, Any]
    hostname: str
    seconds: float


class RankEnded(NamedTuple):
    """A function has ended in one of its ranks; the fields of a `CallResult` are in it."""

    number: int
    rank: int
    returned: bool
    data: bytes | str


class WorkerUp(NamedTuple):
    """A worker of a pool takes tasks."""

    host: str  # as Dragon calls the node
    hostname: str  # as the node calls itself
    pid: int
    puid: int  # Dragon's id of the process


class WorkerLost(NamedTuple):
    """A worker has died."""

    number: int  # of the task that it ran; 0 for none
    hostname: str
    executor: int
    pid: int


class RevokeReply(NamedTuple):
    """The answer to a `RevokeRequest`."""

    request: RevokeRequest
    host: str
    running: list[int]  # numbers of the tasks of that executor that run on this node


class StopReply(NamedTuple):
    """The answer to a `StopRequest`, sent when nothing of the task is left on the node."""

    number: int
    host: str
    signalled: bool  # whether something ran, and got a signal


NodeMessage = (
    NodeInfo
    | Heartbeat
    | TaskStarted
    | CallEnded
    | ExecutableEnded
    | RankEnded
    | WorkerUp
    | WorkerLost
    | RevokeReply
    | StopReply
)


_TYPES: tuple[type[NodeMessage], ...] = get_args(NodeMessage)
_KINDS = {kind: number for number, kind in enumerate(_TYPES)}


def pack_messages(*messages: NodeMessage) -> bytes:
    """Return what is put on the queue to the driver.

    Plain tuples are pickled, with the number of the class: a `CallEnded` takes 1.1 µs to pack and
    1.1 to unpack; as an object 2.1 and 1.4 (Python 3.11, one core of a virtual machine).
    """
    plain = [(_KINDS[type(message)], *message) for message in messages]
    return pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)


def unpack_messages(data: object) -> list[NodeMessage]:
    """Return the messages of one item of that queue."""
    assert isinstance(data, bytes)
    return [_TYPES[kind](*fields) for kind, *fields in pickle.loads(data)]


# ---------------------------------------------------------------------- to an agent


class RevokeRequest(NamedTuple):
    """Let a task, or all of an executor that have not started, not start any more."""

    executor: int
    number: int | None


class StopRequest(NamedTuple):
    """Stop a task wherever it runs on the node."""

    number: int


class LeaveRequest:
    """End."""


Request = RevokeRequest | StopRequest | LeaveRequest

# ---------------------------------------------------------------------- to a worker


class TaskMessage(NamedTuple):
    """A task on its way to a worker: a pickled call, or an executable as a plain dict."""

    directory: str  # for output files and large results
    call: bytes | None
    executable: dict[str, Any] | None


class PoolTask(NamedTuple):
    """A task as a worker of a pool takes it from its queue."""

    number: int
    data: bytes | str  # a packed `TaskMessage`, or the path of a file with it


def pack_task(directory: str, call: bytes | None, executable: dict[str, Any] | None) -> bytes:
    """Return a `TaskMessage` as bytes.

    A plain tuple is pickled, which takes 0.3 µs, and 3.0 with the class (Python 3.11, one core of a
    virtual machine).
    """
    return pickle.dumps((directory, call, executable), pickle.HIGHEST_PROTOCOL)


def unpack_task(data: bytes) -> TaskMessage:
    """Return what `pack_task` was given."""
    return TaskMessage(*pickle.loads(data))


def pack_pool_task(number: int, data: bytes | str) -> bytes:
    """Return a `PoolTask` as bytes."""
    return pickle.dumps((number, data), pickle.HIGHEST_PROTOCOL)


def unpack_pool_task(data: object) -> PoolTask:
    """Return what `pack_pool_task` was given."""
    assert isinstance(data, bytes)
    return PoolTask(*pickle.loads(data))


# ---------------------------------------------------------------------- what is large


def spill(data: bytes, path: str, limit: int) -> bytes | str:
    """Write what is larger than `limit` bytes to a file, and return its path in its place."""
    if len(data) <= limit:
        return data
    with open(path, "wb") as file:
        file.write(data)
    return path


def unspill(data: bytes | str) -> bytes:
    """Return what `spill` was given; its file is removed.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(data, bytes):
        return data
    with open(data, "rb") as file:
        content = file.read()
    os.unlink(data)
    return content
