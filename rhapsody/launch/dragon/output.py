"""Separates the workflow's output from Dragon's own lines, both of which the launcher prints.

On one node the launcher prints `+++ head proc exited, code N` when the workflow has ended, behind
the workflow's last line if that has no newline. What it prints from there on is its own. (dragonhpc
0.15.0, `launcher/dragon_single.py`; on several nodes it prints no such line.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["LauncherOutput"]

_PREFIX = b"+++ head proc exited, code "
_EXIT_LINE = re.compile(re.escape(_PREFIX) + rb"(-?\d+)\n")
_PARTIAL_LINE = re.compile(re.escape(_PREFIX) + rb"-?\d*\Z")


class SplitOutput(NamedTuple):
    """Bytes of the launcher's stdout, by whose they are."""

    workflow: bytes
    dragon: bytes


class LauncherOutput:
    """Splits the bytes of a launcher's stdout as they arrive.

    Args:
        is_over: called when Dragon's line is found, to confirm that the workflow has ended: a
            workflow may print the log of an earlier run.
    """

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._held = b""  # what may be the start of Dragon's line
        self.code: int | None = None  # the workflow's exit code, once Dragon has printed it

    def split(self, data: bytes) -> SplitOutput:
        """Split the next bytes; some may be held back until it is clear whose they are."""
        if self.code is not None:
            return SplitOutput(b"", data)
        data = self._held + data
        self._held = b""
        start = 0
        while (line := _EXIT_LINE.search(data, start)) is not None:
            if self._is_over():
                self.code = int(line[1])
                return SplitOutput(data[: line.start()], data[line.end() :])
            start = line.end()
        end = len(data) - _partial_bytes(data)
        self._held = data[end:]
        return SplitOutput(data[:end], b"")

    def flush(self) -> bytes:
        """Return what is held back, at the end of the stream."""
        held, self._held = self._held, b""
        return held


def _partial_bytes(data: bytes) -> int:
    """How many of the last bytes may be the start of Dragon's line."""
    partial = _PARTIAL_LINE.search(data)
    if partial is not None:
        return len(data) - partial.start()
    return next((n for n in range(len(_PREFIX) - 1, 0, -1) if data.endswith(_PREFIX[:n])), 0)
