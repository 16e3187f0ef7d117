"""Progress of the sessions of a script: live lines while they run, and a summary after them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rhapsody.api import Session

ENDED = ("DONE", "FAILED", "CANCELED")
BAR_WIDTH = 24  # characters
MAX_SESSIONS = 4  # a block that is taller than the terminal could not be redrawn


class SessionMonitor:
    """Follows every session of this process, from its construction on.

    It keeps the sessions, so that their statistics can be read when the script has dropped them.
    """

    def __init__(self) -> None:
        self._sessions: list[Session] = []
        self._started = time.perf_counter()
        self._console = Console(stderr=True, highlight=False)

    def observe(self, session: Session) -> None:
        """Called by each new session with itself."""
        self._sessions.append(session)

    def live_text(self) -> str:
        """A line per backend of the sessions at work; called from another thread."""
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(4):
            table.add_column(no_wrap=True)
        at_work = 0
        for session in list(self._sessions):
            statistics = session.get_statistics()
            if _ended(statistics["counts"]) < statistics["counts"].total():
                at_work += 1
                if at_work <= MAX_SESSIONS:
                    _add_lines(table, session.uid, statistics["counts"], statistics["backends"])
        if not at_work:
            return ""
        if at_work > MAX_SESSIONS:
            table.add_row(f"and {at_work - MAX_SESSIONS} more sessions")
        with self._console.capture() as capture:
            # One column less than the terminal has: some wrap after a full line.
            self._console.print(table, width=max(self._console.width - 1, 1))
        return capture.get()

    def print_summary(self) -> None:
        """Print tasks by state, wall time, averages, and a row per backend, on stderr.

        Prints nothing for a script that made no session.
        """
        if not self._sessions:
            return
        wall = time.perf_counter() - self._started
        counts: Counter[str] = Counter()
        rows: list[tuple[str, Counter[str]]] = []
        for session in self._sessions:
            statistics = session.get_statistics()
            counts.update(statistics["counts"])
            prefix = f"{session.uid} " if len(self._sessions) > 1 else ""
            rows += [(prefix + name, of) for name, of in statistics["backends"].items()]
        states = _in_order(counts)
        by_state = ", ".join(f"{counts[state]:,} {state}" for state in states)
        number = counts.total()
        tasks = "1 task" if number == 1 else f"{number:,} tasks"
        self._console.print(
            f"rhapsody: {tasks} in {wall:.2f} s" + (f": {by_state}" if by_state else "")
        )
        if not states:
            return
        waited, ran = self._averages()
        self._console.print(f"on average a task waited {_duration(waited)}, ran {_duration(ran)}")
        table = Table(box=None, pad_edge=False)
        table.add_column("backend")
        shown = [state for state in states if any(of[state] for _, of in rows)]
        for state in shown:
            table.add_column(state, justify="right")
        for label, of in rows:
            table.add_row(Text(label), *(f"{of[state]:,}" for state in shown))
        self._console.print(table)

    def _averages(self) -> tuple[float, float]:
        """Seconds in the queue and in execution, over the ended tasks of all sessions."""
        waited = ran = 0.0
        ended = 0
        for session in self._sessions:
            statistics = session.get_statistics()
            number = _ended(statistics["counts"])
            waited += number * statistics["summary"]["avg_queue"]
            ran += number * statistics["summary"]["avg_execution"]
            ended += number
        return (waited / ended, ran / ended) if ended else (0.0, 0.0)


def _add_lines(
    table: Table, uid: str, counts: Counter[str], backends: dict[str, Counter[str]]
) -> None:
    """Add a line for a session's only backend, or one for the session and one per backend.

    A task that has not started may run on any backend, so that only the session has a total.
    """
    label = next(iter(backends)) if len(backends) == 1 else uid
    ended, total = _ended(counts), counts.total()
    bar = ProgressBar(total=total, completed=ended, width=BAR_WIDTH)
    table.add_row(Text(label), bar, f"{ended:,}/{total:,}", _describe(counts))
    if len(backends) > 1:
        for name, of in backends.items():
            table.add_row(Text(f"  {name}"), "", f"{_ended(of):,}", _describe(of))


def _describe(counts: Counter[str]) -> str:
    """How many tasks failed, were canceled, and are running, where there are any."""
    words = (("FAILED", "failed"), ("CANCELED", "canceled"), ("RUNNING", "running"))
    return ", ".join(f"{counts[state]:,} {word}" for state, word in words if counts[state])


def _ended(counts: Counter[str]) -> int:
    return sum(counts[state] for state in ENDED)


def _in_order(states: Iterable[str]) -> list[str]:
    """Sort states, the final ones first."""
    return sorted(states, key=lambda state: ENDED.index(state) if state in ENDED else len(ENDED))


def _duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
