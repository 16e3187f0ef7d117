"""The page of a run, in Markdown."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from benchmarks import side
from benchmarks.figures import Figure, Target
from benchmarks.harness import Readings, middle

HEAD = """\
# Benchmarks

This page was written by `{command}` on {date}; do not edit it.

{facts}

Every side is a whole process that runs one workload, of the same number of workers: as many as
there are cores. The sides of a figure take turns, {repeat} times (A B C, C B A, ...), and a ratio
compares two sides within one turn. Given are medians, and in brackets the least and the most. Pools
are started, and 64 tasks run, before the clock starts; it stops when the last result is in.
CPU is the processor time of the side's process and all below it (workers, servers, the tasks
themselves) in the same span, per task, in steps of 10 ms over the run. Memory is the growth of the
peak of the process's resident memory, per task; what other processes take is not in it. Each side's
results are checked. Peers run in environments of their own, as anybody installs them, with their
defaults where the text says nothing else.

Engines that need a cluster have pages of their own: [Dask](dask-benchmarks.md),
[Dragon](dragon-benchmarks.md).
"""


def write(
    head: str,
    figures: Sequence[Figure],
    results: Mapping[str, Sequence[Readings]],
    *,
    facts: Mapping[str, str],
    **words: Any,
) -> str:
    """Return the page of all figures that were measured; `head` is formatted with the words."""
    measured = [figure for figure in figures if figure.name in results]
    said = "\n".join(f"- {name}: {value}" for name, value in {**_facts(), **facts}.items())
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    parts = [head.format(date=date, facts=said, **words)]
    parts += [_section(figure, results[figure.name]) for figure in measured]
    parts.append(_shortfalls(results, measured))
    return "\n".join(parts)


def table(figure: Figure, readings: Sequence[Readings]) -> str:
    """Return the table of one figure."""
    stall = figure.unit == "stall"
    first = {"stall": "longest stall", "cpu": "CPU per task", "latency": "median"}
    # Heading, readings, scale and unit; a column that nothing was measured for is left out.
    columns: list[tuple[str, Callable[[Readings], list[float]], float, str]] = [
        (
            first.get(figure.unit, "time per task"),
            lambda row: row.seconds,
            *((1e3, " ms") if stall else (1e6, " µs")),
        ),
        ("99th percentile", lambda row: row.p99, 1e6, " µs"),
        ("garbage collector's", lambda row: row.gc, 1e3, " ms"),
        ("CPU per task", lambda row: row.cpu, 1e6, " µs"),
        ("memory per task", lambda row: row.bytes, 1e-3, " KB"),
        (f"times {figure.base}", lambda row: row.ratios, 1, ""),
        ("the same of CPU", lambda row: row.cpu_ratios, 1, ""),
    ]
    shown = [column for column in columns if any(column[1](row) for row in readings)]
    rows = [["side", *(heading for heading, *_ in shown), "tasks"]]
    rows.append(["---", *("---:" for _ in shown), "---:"])
    for row in readings:
        cells = [_spread(values(row), scale, unit) for _, values, scale, unit in shown]
        rows.append([row.side.name, *cells, f"{row.tasks:,}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def verdicts(figure: Figure, readings: Sequence[Readings]) -> list[tuple[Target, float, bool]]:
    """Return each target with what was measured and whether that reaches it."""
    by_name = {row.side.name: row for row in readings}
    found = []
    for target in figure.targets:
        row = by_name[target.side]
        values = {
            "ratio": row.ratios,
            "cpu ratio": row.cpu_ratios,
            "bytes": row.bytes,
            "seconds": row.seconds,
            "p99": row.p99,
        }
        value = middle(values[target.of])
        found.append((target, value, value <= target.limit))
    return found


def _section(figure: Figure, readings: Sequence[Readings]) -> str:
    lines = [f"## {figure.title}", "", _wrap(figure.text), "", table(figure, readings), ""]
    lines += ["| target | at most | measured | reached |", "| --- | ---: | ---: | --- |"]
    for target, value, reached in verdicts(figure, readings):
        wanted, got = (_in_words(target, figure, number) for number in (target.limit, value))
        lines.append(f"| {target.side} | {wanted} | {got} | {'yes' if reached else '**no**'} |")
    return "\n".join([*lines, ""])


def _shortfalls(results: Mapping[str, Sequence[Readings]], figures: Sequence[Figure]) -> str:
    lines = ["## What falls short", ""]
    for figure in figures:
        missed = [v for v in verdicts(figure, results[figure.name]) if not v[2]]
        if not missed:
            continue
        said = "; ".join(
            f"{target.side}: {_in_words(target, figure, value)},"
            f" aimed at {_in_words(target, figure, target.limit)}"
            for target, value, _ in missed
        )
        why = figure.falls_short or "Not explained yet."
        lines += [f"### {figure.title}", "", _wrap(f"{said}."), "", _wrap(why), ""]
    if len(lines) == 2:
        lines += ["Nothing: every target was reached in this run.", ""]
    return "\n".join(lines)


def _in_words(target: Target, figure: Figure, value: float) -> str:
    if target.of == "ratio":
        return f"{value:.2f} times {figure.base}"
    if target.of == "cpu ratio":
        return f"{value:.2f} times the CPU of {figure.base}"
    if target.of == "p99":
        return f"{value * 1e6:.0f} µs, 99th percentile"
    if target.of == "bytes":
        return f"{value / 1000:.2f} KB per task"
    return f"{value * 1e3:.0f} ms" if figure.unit == "stall" else f"{value * 1e6:.1f} µs per task"


def _spread(values: Sequence[float], scale: float, unit: str) -> str:
    if not values:
        return ""
    if set(values) == {1.0}:  # the base's ratio
        return "1"
    low, mid, high = (_short(v * scale) for v in (min(values), middle([*values]), max(values)))
    return f"{mid}{unit} ({low} to {high})"


def _short(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _facts() -> dict[str, str]:
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "cores": f"{side.cores()} ({_processor()})",
        "memory": f"{gib:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _wrap(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
