"""A command that measures figures, shows their tables, and writes their page."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks import page
from benchmarks.figures import Figure
from benchmarks.harness import BenchmarkError, Readings, measure


def parser(module: str, text: str | None, figures: Sequence[Figure]) -> argparse.ArgumentParser:
    """Return the parser of `python -m module`."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--only",
        action="append",
        choices=[figure.name for figure in figures],
        help="measure this figure; may be given several times",
    )
    made.add_argument("--repeat", type=int, help="repetitions (5; with --quick 1)")
    made.add_argument("--no-peers", action="store_true", help="only ours and the raw engines")
    made.add_argument(
        "--peer", metavar="PYTHON", help="one that has the peers; by default they are installed"
    )
    made.add_argument(
        "--quick",
        action="store_true",
        help="a small run without peers: that it runs, and that all sides compute the same",
    )
    made.add_argument("--write", type=Path, metavar="PAGE", help="write the page in docs")
    return made


def run(
    made: argparse.ArgumentParser,
    options: argparse.Namespace,
    figures: Sequence[Figure],
    head: str,
    *,
    facts: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Measure what the options say.

    `head` is the text that the page begins with, `facts` what it tells of the machine beside what
    every page does, `env` what is in the environment of all sides.
    """
    if options.write and (options.quick or options.only or options.no_peers):
        made.error("--write makes the page of a whole run, without --quick, --only, --no-peers")
    load = os.getloadavg()[0]
    repeat = options.repeat or (1 if options.quick else 5)
    results: dict[str, list[Readings]] = {}
    try:
        for figure in figures:
            if options.only and figure.name not in options.only:
                continue
            results[figure.name] = measure(
                figure,
                repeat=repeat,
                quick=options.quick,
                with_peers=not (options.quick or options.no_peers),
                say=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
                env=env,
                peer=options.peer,
            )
            print(f"\n{figure.title}\n\n{page.table(figure, results[figure.name])}", flush=True)
    except BenchmarkError as error:
        sys.exit(f"benchmarks: {error}")
    if options.write:
        peers = {r for figure in figures for side in figure.sides for r in side.requirements[:1]}
        given = ["PYTHON" if before == "--peer" else word for before, word in pairwise(sys.argv)]
        text = page.write(
            head,
            figures,
            results,
            facts={
                **(facts or {}),
                "load": f"{load:.2f} when it began, {os.getloadavg()[0]:.2f} when it ended",
                "peers": ", ".join(sorted(peers)),
            },
            command=" ".join([made.prog, *given]),
            repeat=repeat,
        )
        options.write.write_text(text)
