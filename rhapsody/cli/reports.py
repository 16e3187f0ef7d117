"""The tables that ``rhapsody backends``, ``doctor`` and ``bench`` print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .bench import Measurement
    from .doctor import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
PIPE_WIDTH = 160  # characters: a pipe has no width, and a line that breaks is hard to search


def print_backends(rows: list[dict[str, Any]]) -> None:
    """One row per backend, on stdout."""
    table = Table(box=None, pad_edge=False)
    for title in ("backend", "status", "to install it"):
        table.add_column(title, overflow="fold")
    for row in rows:
        status = "[green]installed[/]" if row["installed"] else "[yellow]missing[/]"
        table.add_row(row["name"], status, Text(row["install"] or ""))
    _console().print(table)


def print_findings(findings: list[Finding]) -> None:
    """One row per check and, under it, the remedy; then how many problems there are."""
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
    said = (
        "no problem" if not problems else "1 problem" if problems == 1 else f"{problems} problems"
    )
    console.print(said, style=STYLES["problem" if problems else "ok"])


def print_measurements(measured: Sequence[Measurement]) -> None:
    """One row per workload: time per task of both sides, and their ratio with its spread."""
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
    console.print("ratio: median of the repetitions, ours over raw; below 1 ours is faster")


@contextmanager
def shown_progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr while something is measured, on a terminal only; yields its ``advance``."""
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
