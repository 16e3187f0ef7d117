"""Reads what the nodes send about tasks: unpickles results, and joins those of a job's ranks."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any, NamedTuple

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import SerializationError, TaskExecutionError, WorkerLostError
from rhapsody.runtime.local.children import OUTPUT_LIMIT

from .node.messages import CallEnded, ExecutableEnded, NodeMessage, RankEnded, unspill
from .task import DragonTask, Outcome

__all__ = ["NodeEvent", "RankOutcome", "TaskOutcome", "job_outcome", "join_rank_files", "read"]


class TaskOutcome(NamedTuple):
    """A task that ran in a worker has ended."""

    number: int
    outcome: Outcome
    hostname: str


class RankOutcome(NamedTuple):
    """A function has ended in one of its ranks."""

    number: int
    rank: int
    outcome: Outcome


# A message of a node, with its result unpickled.
NodeEvent = NodeMessage | TaskOutcome | RankOutcome


def read(message: NodeMessage) -> NodeEvent:
    """Return a message as the event loop takes it: an end with its result unpickled."""
    if isinstance(message, RankEnded):
        outcome = _outcome(message.returned, message.data)
        return RankOutcome(message.number, message.rank, outcome)
    if isinstance(message, CallEnded):
        outcome = _outcome(message.returned, message.data)
    elif isinstance(message, ExecutableEnded):
        outcome = Outcome(message.state, message.fields)
        if (packed := message.fields.get("exception")) is not None:
            message.fields["exception"] = serialization.unpack_exception(packed)
    else:
        return message
    now = time.monotonic()
    outcome.fields["started"], outcome.fields["ended"] = now - message.seconds, now
    return TaskOutcome(message.number, outcome, message.hostname)


def _outcome(returned: bool, packed: bytes | str) -> Outcome:
    """Return how a function ended, from the fields of a `CallResult`."""
    try:
        data = unspill(packed)
        if returned:
            return Outcome("DONE", {"return_value": serialization.loads(data, "result")})
        return Outcome("FAILED", {"exception": serialization.unpack_exception(data)})
    except (SerializationError, OSError) as error:
        return Outcome("FAILED", {"exception": error})


def job_outcome(task: DragonTask, backend: str, stderr: str = "") -> Outcome:
    """Return how a job ended whose exit codes, and what its ranks sent, are known."""
    codes = task.exit_codes or []
    failed = next((code for code in codes if code), 0)
    if task.is_function:
        outcomes = [task.rank_outcomes[rank] for rank in sorted(task.rank_outcomes)]
        for outcome in outcomes:
            if outcome.state != "DONE":
                return outcome
        if failed:
            error = WorkerLostError(
                f"a process of task '{task.uid}' died (exit codes of its ranks: {codes})",
                backend=backend,
                transient=False,
            )
            return Outcome("FAILED", {"exception": error, "exit_code": failed})
        values = [outcome.fields["return_value"] for outcome in outcomes]
        return Outcome("DONE", {"return_value": values if task.ranks > 1 else values[0]})
    if not failed:
        return Outcome("DONE", {"exit_code": 0})
    if len(codes) > 1:
        stderr = f"[exit codes of the ranks: {codes}]\n{stderr}"
    failure = TaskExecutionError(task.uid, stderr, failed)
    failure.exit_codes = codes
    return Outcome("FAILED", {"exit_code": failed, "exception": failure})


def join_rank_files(task: DragonTask, directory: str) -> dict[str, Any]:
    """Return the result fields `stdout` and `stderr` of a job: of all ranks, in rank order.

    The files of the ranks are removed. What is too long for memory, or asked for, is left in
    `directory` as one file. Files that the task's author named are not touched.
    """
    fields: dict[str, Any] = {}
    for stream in ("stdout", "stderr"):
        text, path = _join(task, directory, stream)
        captured = bool(task.task.get("capture_stdio")) and path
        fields[stream] = path if captured else text
        fields[f"{stream}_file"] = path
    return fields


def _join(task: DragonTask, directory: str, stream: str) -> tuple[str, str | None]:
    base = os.path.join(directory, task.uid)
    ours = [
        template[stream]
        for rank, template in enumerate(task.templates)
        if template[stream] == f"{base}.{rank}.{stream}" and os.path.exists(template[stream])
    ]
    size = sum(os.path.getsize(path) for path in ours)
    if size <= OUTPUT_LIMIT and not task.task.get("capture_stdio"):
        data = b"".join(_read(path) for path in ours)
        whole = None
    else:
        whole = f"{base}.{stream}"
        with open(whole, "wb") as out:
            for path in ours:
                with open(path, "rb") as file:
                    shutil.copyfileobj(file, out)
        data = _tail(whole)
    for path in ours:
        os.unlink(path)
    text = data.decode(errors="replace")
    if whole is not None and size > len(data):
        text = f"[the last {len(data)} of {size} bytes; all of them are in {whole}]\n{text}"
    return text, whole


_TAIL = 65536


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _tail(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        return file.read()
