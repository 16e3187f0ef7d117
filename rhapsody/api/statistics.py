"""Counts and times of a session's tasks: written on the loop's thread, read from any."""

from __future__ import annotations

from collections import Counter
from typing import TypedDict

from rhapsody.backends.constants import CANCELED, DONE, FAILED, RUNNING

__all__ = ["SessionStatistics", "Statistics"]


class Summary(TypedDict):
    """Mean times of the tasks that have ended, in seconds."""

    avg_total: float  # from submit to end
    avg_queue: float  # from submit to start
    avg_execution: float  # from start to end


class SessionStatistics(TypedDict):
    """What `Session.get_statistics` returns."""

    counts: Counter[str]  # by state; PENDING are those that wait or are queued
    backends: dict[str, Counter[str]]  # the same by name of the backend, without PENDING
    summary: Summary


class Statistics:
    """Adds up what happens to tasks.

    `admitted` is the number of tasks that were taken in.
    """

    def __init__(self) -> None:
        self.admitted = 0
        self._counts: dict[str, Counter[str]] = {}
        self._total = self._queue = self._execution = 0.0  # seconds, of all ended tasks

    def add_backend(self, name: str) -> None:
        """Count the tasks of a backend."""
        # Every key from the start: other threads read it, and it must not grow under them.
        self._counts[name] = Counter(dict.fromkeys((RUNNING, DONE, FAILED, CANCELED), 0))

    def count(self, backend: str | None, state: str, number: int = 1) -> None:
        """Add to the tasks of a backend that are in a state."""
        self._counts[backend or ""][state] += number

    def add_times(self, total: float, queue: float, execution: float) -> None:
        """Add the times of one or several ended tasks, in seconds."""
        self._total += total
        self._queue += queue
        self._execution += execution

    def report(self) -> SessionStatistics:
        """Return the counts and the mean times."""
        by_backend = list(self._counts.items())
        counts: Counter[str] = Counter()
        for _, counter in by_backend:
            counts.update(counter)
        ended = counts[DONE] + counts[FAILED] + counts[CANCELED]
        counts["PENDING"] = self.admitted - counts.total()
        each = 1 / ended if ended else 0.0
        return {
            "counts": +counts,
            "backends": {name: +counter for name, counter in by_backend},
            "summary": {
                "avg_total": self._total * each,
                "avg_queue": self._queue * each,
                "avg_execution": self._execution * each,
            },
        }
