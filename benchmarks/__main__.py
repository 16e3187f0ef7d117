"""`python -m benchmarks`: measure, show the tables, and write the page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import page
from benchmarks.figures import FIGURES
from benchmarks.harness import BenchmarkError, Readings, measure


def main() -> None:
    options = _parser().parse_args()
    if options.write and (options.quick or options.only or options.no_peers):
        _parser().error(
            "--write makes the page of a whole run, without --quick, --only, --no-peers"
        )
    load = os.getloadavg()[0]
    results: dict[str, list[Readings]] = {}
    try:
        for figure in FIGURES:
            if options.only and figure.name not in options.only:
                continue
            results[figure.name] = measure(
                figure,
                repeat=options.repeat or (1 if options.quick else 5),
                quick=options.quick,
                with_peers=not (options.quick or options.no_peers),
                say=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
            )
            print(f"\n{figure.title}\n\n{page.table(figure, results[figure.name])}", flush=True)
    except BenchmarkError as error:
        sys.exit(f"benchmarks: {error}")
    if options.write:
        command = " ".join(["python -m benchmarks", *sys.argv[1:]])
        text = page.write(results, repeat=options.repeat or 5, command=command, load=load)
        options.write.write_text(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        choices=[figure.name for figure in FIGURES],
        help="measure this figure; may be given several times",
    )
    parser.add_argument("--repeat", type=int, help="repetitions (5; with --quick 1)")
    parser.add_argument("--no-peers", action="store_true", help="only ours and the raw engines")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small run without peers: that it runs, and that all sides compute the same",
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write docs/benchmarks.md")
    return parser


if __name__ == "__main__":
    main()
