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

    def add_start(self, backend: str) -> None:
        """Add a task that runs now."""
        self._counts[backend][RUNNING] += 1

    def add_end(
        self, backend: str, before: str, state: str, total: float, queue: float, execution: float
    ) -> None:
        """Add a task that has ended, with the state in which it was before, and its times."""
        counts = self._counts[backend]
        if before == RUNNING:
            counts[RUNNING] -= 1
        counts[state] += 1
        self._total += total
        self._queue += queue
        self._execution += execution

    def add_done(self, backend: str, number: int, queue: float) -> None:
        """Add tasks that were DONE at once, and the sum of their times in seconds."""
        self._counts[backend][DONE] += number
        self._total += queue
        self._queue += queue

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
