"""What Dragon's launcher writes on stdout: the workflow's output, and its own lines among it.

On one node it says `+++ head proc exited, code N` when the workflow has ended, on the same line
where the workflow's last one has no end. What it writes from there on is its own. (dragonhpc
0.15.0, `launcher/dragon_single.py`; on several nodes it says nothing of the kind.)
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["LauncherOutput"]

_WORDS = b"+++ head proc exited, code "
_LINE = re.compile(re.escape(_WORDS) + rb"(-?\d+)\n")
_BEGUN = re.compile(re.escape(_WORDS) + rb"-?\d*\Z")


class LauncherOutput:
    """Sorts the bytes of a launcher's stdout, as they come.

    `is_over` is asked whether the workflow has really ended when the line comes, because a
    workflow may print an old log.
    """

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._held = b""  # what may be the begin of Dragon's line
        self.code: int | None = None  # the workflow's exit code, once Dragon has said it

    def sort(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what is the workflow's, and what is Dragon's own."""
        if self.code is not None:
            return b"", data
        data = self._held + data
        self._held = b""
        passed = 0
        while (line := _LINE.search(data, passed)) is not None:
            if self._is_over():
                self.code = int(line[1])
                return data[: line.start()], data[line.end() :]
            passed = line.end()
        end = len(data) - _unsure(data)
        self._held = data[end:]
        return data[:end], b""

    def rest(self) -> bytes:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, b""
        return held


def _unsure(data: bytes) -> int:
    """How many of the last bytes may be the begin of Dragon's line."""
    begun = _BEGUN.search(data)
    if begun is not None:
        return len(data) - begun.start()
    return next((n for n in range(len(_WORDS) - 1, 0, -1) if data.endswith(_WORDS[:n])), 0)
