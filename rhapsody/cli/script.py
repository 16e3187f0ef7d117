"""Runs a user's script as Python itself would, and reports its end as Python itself would.

The script runs on the main thread, so that Ctrl-C reaches its ``asyncio.run``, which cancels the
main coroutine and lets sessions close; SIGTERM is turned into Ctrl-C.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

INTERRUPTED = 128 + signal.SIGINT  # the exit code of a command that Ctrl-C ended, as shells have it
THREAD_EXIT_SECONDS = 0.5  # for threads to end by themselves before the user is told of them


def run_script(path: str, arguments: Sequence[str], at_end: Callable[[], None]) -> int:
    """Run ``path`` as ``__main__`` and return the exit code that Python would end with.

    That is 0, what the script passed to ``sys.exit``, 1 after an uncaught exception, 130 after
    Ctrl-C, 143 after SIGTERM. ``at_end`` is called before an exception is reported, so that nothing
    is drawn over the traceback.
    """
    path = os.path.abspath(path)
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        # realpath: a script that is a link imports the modules beside its target.
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    termination = _Termination()
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        at_end()
        return _exit_code(end.code)
    except KeyboardInterrupt:
        # From here on a further Ctrl-C ends the process at once, without waiting for threads.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        at_end()
        left = _remaining_threads()
        more = f"; {left} of its threads still run, Ctrl-C again ends them" if left else ""
        print(f"rhapsody: {termination.word}{more}", file=sys.stderr)
        return termination.code
    except BaseException as error:
        at_end()
        error = error.with_traceback(_user_frames(error.__traceback__, path))
        # The script may have set a hook of its own.
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    at_end()
    return 0


class _Termination:
    """Lets SIGTERM end the script as Ctrl-C does, so that sessions close; a second one kills.

    Elsewhere the process could just end, since guard processes outlive it and end its children. In
    a container they die with PID 1, and `docker stop` gives time to close.
    """

    def __init__(self) -> None:
        self.word = "interrupted"
        self.code = INTERRUPTED
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, _: object) -> None:
        self.word, self.code = "terminated", 128 + number
        signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)


def _remaining_threads() -> int:
    """How many threads Python will wait for when it exits, after a moment for them to end."""
    threads = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and not thread.daemon
    ]
    deadline = time.monotonic() + THREAD_EXIT_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sum(thread.is_alive() for thread in threads)


def _exit_code(code: object) -> int:
    """The exit code for what was passed to ``sys.exit``; other objects than int are printed."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return 1


def _user_frames(frames: TracebackType | None, path: str) -> TracebackType | None:
    """The traceback from the script's first frame on; None if no frame is the script's.

    That is a ``SyntaxError`` in the script, which itself says where it is.
    """
    while frames is not None and frames.tb_frame.f_code.co_filename != path:
        frames = frames.tb_next
    return frames
