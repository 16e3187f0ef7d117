"""The tables that ``rhapsody backends``, ``doctor`` and ``bench`` print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .bench import Measurement
    from .doctor import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
PIPE_WIDTH = 160  # characters: a pipe has no width, and a line that breaks is hard to search


class BackendRow(NamedTuple):
    """A backend, whether its engine is installed, and the command that installs it if not."""

    name: str
    installed: bool
    install: str | None


def print_backends(rows: Sequence[BackendRow]) -> None:
    """Print a row per backend."""
    table = Table(box=None, pad_edge=False)
    for title in ("backend", "status", "to install it"):
        table.add_column(title, overflow="fold")
    for row in rows:
        status = "[green]installed[/]" if row.installed else "[yellow]missing[/]"
        table.add_row(row.name, status, Text(row.install or ""))
    _console().print(table)


def print_findings(findings: list[Finding]) -> None:
    """Print a row per check with its remedy below it, then the number of problems."""
    console = _console()
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        style = STYLES[finding.status]
        table.add_row(finding.check, f"[{style}]{finding.status}[/]", Text(finding.found))
        if finding.remedy:
            table.add_row("", "", Text(f"-> {finding.remedy}"))
    console.print(table)
    problems = sum(finding.status == "problem" for finding in findings)
    count = "no problem" if not problems else f"{problems} problem{'s' * (problems > 1)}"
    console.print(count, style=STYLES["problem" if problems else "ok"])


def print_measurements(measured: Sequence[Measurement]) -> None:
    """Print a row per workload: time per task of both sides, and the range of their ratios."""
    table = Table(box=None, pad_edge=False)
    table.add_column("workload")
    table.add_column("against")
    for title in ("tasks", "ours, µs/task", "raw, µs/task", "ratio", "spread"):
        table.add_column(title, justify="right")
    for one in measured:
        table.add_row(
            one.workload.title,
            one.workload.against,
            f"{one.tasks:,}",
            f"{1e6 * one.ours_seconds / one.tasks:,.1f}",
            f"{1e6 * one.raw_seconds / one.tasks:,.1f}",
            f"{one.ratio:.2f}",
            f"{one.ratios[0]:.2f} to {one.ratios[-1]:.2f}",
        )
    console = _console()
    console.print(table)
    console.print("ratio: median over the repetitions of ours / raw; below 1 ours is faster")


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr if that is a terminal; yields what advances it by one step."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("measuring", total=total)

        def advance(name: str) -> None:
            bar.update(row, advance=1, description=name)

        yield advance


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
