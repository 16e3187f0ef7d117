"""From what the nodes sent to what a task's author gets."""

from __future__ import annotations

import os
import shutil
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import SerializationError, TaskExecutionError, WorkerLostError
from rhapsody.runtime.local.children import OUTPUT_LIMIT

from .task import DragonTask

__all__ = ["RankFiles", "job_end", "read_end", "read_news"]

End = tuple[str, dict[str, Any]]


def read_news(one: tuple[Any, ...], now: float) -> tuple[Any, ...]:
    """Return a piece of news as the loop takes it: that of an end with its result unpickled."""
    if one[0] != "ended":
        return one
    word, number, said, host, seconds = one
    state, fields = read_end(said)
    fields["started"], fields["ended"] = now - seconds, now
    return word, number, state, fields, host


def read_end(said: Any) -> End:
    """Return state and result fields of what a node sent of one call, or of one executable."""
    if isinstance(said[0], str):
        state, fields = said
        if (packed := fields.get("exception")) is not None:
            fields["exception"] = serialization.unpack_exception(packed)
        return state, fields
    returned, data = said
    if not returned:
        return "FAILED", {"exception": serialization.unpack_exception(data)}
    try:
        if isinstance(data, str):
            with open(data, "rb") as file:
                content = file.read()
            os.unlink(data)
            data = content
        return "DONE", {"return_value": serialization.loads(data, "result")}
    except (SerializationError, OSError) as error:
        return "FAILED", {"exception": error}


def job_end(flight: DragonTask, backend: str, stderr: str = "") -> End:
    """Return how a job ended, of which the exit codes and what the ranks sent are known."""
    codes = flight.codes or []
    failed = next((code for code in codes if code), 0)
    if flight.is_function:
        ends = [flight.rank_ends[rank] for rank in sorted(flight.rank_ends)]
        for state, fields in ends:
            if state != "DONE":
                return state, fields
        if failed:
            error: Exception = WorkerLostError(
                f"a process of task '{flight.uid}' died (exit codes of its ranks: {codes})",
                backend=backend,
                transient=False,
            )
            return "FAILED", {"exception": error, "exit_code": failed}
        values = [fields["return_value"] for _, fields in ends]
        return "DONE", {"return_value": values if flight.ranks() > 1 else values[0]}
    if not failed:
        return "DONE", {"exit_code": 0}
    if len(codes) > 1:
        stderr = f"[exit codes of the ranks: {codes}]\n{stderr}"
    failure = TaskExecutionError(flight.uid, stderr, failed)
    failure.exit_codes = codes
    return "FAILED", {"exit_code": failed, "exception": failure}


class RankFiles:
    """The files that the ranks of a job printed to.

    Args:
        flight: the job.
        folder: where what is too long for memory, or asked for, is left as one file.
    """

    def __init__(self, flight: DragonTask, folder: str) -> None:
        self._flight = flight
        self._folder = folder

    def collect(self) -> dict[str, Any]:
        """Return the result fields `stdout` and `stderr`: of all ranks, in rank order."""
        fields: dict[str, Any] = {}
        for stream in ("stdout", "stderr"):
            text, path = self._join(stream)
            captured = bool(self._flight.task.get("capture_stdio")) and path
            fields[stream] = path if captured else text
            fields[f"{stream}_file"] = path
        return fields

    def _join(self, stream: str) -> tuple[str, str | None]:
        base = os.path.join(self._folder, self._flight.uid)
        ours = [
            template[stream]
            for rank, (_, template) in enumerate(self._flight.jobs)
            if template[stream] == f"{base}.{rank}.{stream}" and os.path.exists(template[stream])
        ]
        size = sum(os.path.getsize(path) for path in ours)
        if size <= OUTPUT_LIMIT and not self._flight.task.get("capture_stdio"):
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
