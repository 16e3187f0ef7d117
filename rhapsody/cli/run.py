"""``rhapsody run``: runs a user's script with logging, live progress lines and a summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import rhapsody
from rhapsody.api import session

from .live import LiveBlock
from .progress import SessionMonitor
from .script import run_script


def run_workflow(script: str, arguments: Sequence[str]) -> int:
    """Run the script and return the process's exit code."""
    monitor = SessionMonitor()
    session.observers.append(monitor.observe)
    with ExitStack() as at_end:
        at_end.callback(monitor.print_summary)
        at_end.callback(_flush_stdout)
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            at_end.enter_context(LiveBlock(monitor.live_text))
        # After the block has wrapped the streams, so that log lines go above it.
        rhapsody.enable_logging()
        return run_script(script, arguments, at_end.close)


def _flush_stdout() -> None:
    """Write the script's output before the summary where both go to one file."""
    with suppress(
        OSError, ValueError
    ):  # a closed pipe or stream, which Python reports when it exits
        sys.stdout.flush()
