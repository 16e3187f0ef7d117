"""A block of lines that stays below everything that a script prints on the terminal.

Rich's own live display redirects what the script prints to one stream and wraps its lines, and in a
forked child of the script it would deadlock, or draw too. Here the script's text goes unchanged to
its own stream, and a child writes directly to the terminal.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

REFRESH_SECONDS = 0.25
# The least time between two redraws after printed lines, of which there may be thousands.
REDRAW_SECONDS = 0.05

_CLEAR_BELOW = "\x1b[J"

# Wrappers of streams, kept for ever: a `print` on another thread holds no reference to the stream
# that it writes to, and would crash without it (CPython before 3.13.3, its issue 130163).
_kept: list[TextIO] = []


class LiveBlock:
    """A context in which the lines that ``render`` returns are shown at the bottom of the terminal.

    Inside it, the standard streams that are terminals are wrapped. While the last printed line has
    no newline the block is not drawn, so as not to disturb prompts and a script's own progress
    bars. The cursor is left on an empty line above the block, so that what a child process writes
    is not overwritten.
    """

    def __init__(self, render: Callable[[], str]) -> None:
        self._render = render
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="rhapsody-live", daemon=True)
        self._pid = os.getpid()
        self._screen = sys.stderr
        self._text = ""
        self._drawn = False
        self._drawn_at = 0.0
        self._line_start = True
        self._wrapped: dict[str, tuple[TextIO, TextIO]] = {}

    def __enter__(self) -> LiveBlock:
        for name in ("stdout", "stderr"):
            stream: TextIO = getattr(sys, name)
            if stream.isatty():
                wrapped: Any = _StreamAboveBlock(stream, self)
                self._wrapped[name] = (stream, wrapped)
                _kept.append(wrapped)
                setattr(sys, name, wrapped)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for name, (stream, wrapped) in self._wrapped.items():
            if getattr(sys, name) is wrapped:
                setattr(sys, name, stream)
        self._wrapped.clear()
        if os.getpid() == self._pid:
            self._ended.set()
            self._thread.join()

    def write(self, stream: TextIO, text: str) -> int:
        """Write the script's ``text`` above the block."""
        if os.getpid() != self._pid or self._ended.is_set() or not text:
            return stream.write(text)
        with self._lock:
            self._erase()
            written = stream.write(text)
            self._line_start = text.endswith("\n")
            if time.monotonic() - self._drawn_at > REDRAW_SECONDS:
                stream.flush()
                self._draw()
        return written

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            text = self._render()
            with self._lock:
                self._text = text
                self._erase()
                self._draw()
        with self._lock:
            self._erase()
            self._screen.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._screen.write(_CLEAR_BELOW)
            self._screen.flush()
            self._drawn = False

    def _draw(self) -> None:
        if self._line_start and self._text:
            lines = self._text.splitlines()
            self._screen.write("\n" + "\n".join(lines) + f"\r\x1b[{len(lines)}A")
            self._screen.flush()
            self._drawn = True
            self._drawn_at = time.monotonic()


class _StreamAboveBlock:
    """A standard stream whose text goes above the block; all else is delegated to the stream."""

    def __init__(self, stream: TextIO, block: LiveBlock) -> None:
        self._stream = stream
        self._block = block

    def write(self, text: str) -> int:
        return self._block.write(self._stream, text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
