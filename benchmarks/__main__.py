"""`python -m benchmarks`: measure, show the tables, and write the page."""

from __future__ import annotations

from benchmarks import command, page
from benchmarks.figures import FIGURES


def main() -> None:
    parser = command.parser("benchmarks", __doc__, FIGURES)
    command.run(parser, parser.parse_args(), FIGURES, page.HEAD)


if __name__ == "__main__":
    main()
