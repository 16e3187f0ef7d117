"""The folder of a run of `rhapsody launch`: what crosses processes and hosts, and stand-ins.

What is in it: the head's report, the wish to stop and the bell (see `head`), the count that says
that the supervisor lives (see `keeper`), `bin`, the first folder on Dragon's PATH, and `lib`, for
libraries that Dragon has to find.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

from . import host_shim as outside
from . import workflow_runner as head
from .dragon import node_supervisor as keeper

__all__ = ["Report", "is_stand_in", "libraries", "make_folder", "read_report", "with_programs"]

_NO_CLEANUP = """\
#!/bin/sh
# In the place of dragon-cleanup while `rhapsody launch` runs Dragon: the launcher calls that one
# when something went wrong, and it takes all that the user has, other runs and Pythons too.
exit 0
"""


class Report(NamedTuple):
    """What the head has told so far."""

    host: str = ""
    pid: int = 0  # of the workflow
    head: int = 0  # of the head
    beat: int = 0
    ended: int | None = None


def make_folder(
    environ: Mapping[str, str], shared_dir: str | None, socket: str | None = None
) -> str:
    """Make a run's folder, and return its path.

    Args:
        environ: the launcher's.
        shared_dir: where to make it so that all nodes see it, or None for one node.
        socket: where to ask for the programs that are outside the image that we are in.
    """
    folder = tempfile.mkdtemp(prefix="rhapsody-launch-", dir=shared_dir)
    for name in (head.REPORT, head.STOP, keeper.ALIVE):
        with open(os.path.join(folder, name), "wb"):
            pass
    if shared_dir is None:
        os.mkfifo(os.path.join(folder, head.BELL))
    programs = {"dragon-cleanup": _NO_CLEANUP}
    backend = shutil.which("dragon-backend", path=environ.get("PATH"))
    if shared_dir is not None and backend is not None:
        programs["dragon-backend"] = _stand_in(keeper.__name__, folder, backend)
    if socket is not None:
        for program in outside.PROGRAMS.values():
            programs[program] = _stand_in(outside.__name__, socket, program)
    os.mkdir(os.path.join(folder, "bin"))
    for name, text in programs.items():
        with open(os.path.join(folder, "bin", name), "w") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o755)
    return folder


def _stand_in(module: str, *words: str) -> str:
    """A script that runs a module of ours, with these words and then its own."""
    line = [sys.executable, "-P", "-m", module, *words]
    return f'#!/bin/sh\nexec {shlex.join(line)} "$@"\n'


def is_stand_in(pid: int) -> bool:
    """Whether a process is one of these, which end by themselves."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        words = file.read().split(b"\0")
        return keeper.__name__.encode() in words or outside.__name__.encode() in words
    return False


def read_report(folder: str) -> Report | None:
    """Read the head's report; None where it cannot be read now, or is being written."""
    try:
        with open(os.path.join(folder, head.REPORT), encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return None
    if not text.endswith("\n"):
        return None
    try:
        return _parsed(text)
    except (ValueError, IndexError):  # half a write; the next look finds the whole
        return None


def _parsed(text: str) -> Report:
    report = Report()
    for line in text.splitlines():
        word, *rest = line.split()
        if word == "begun":
            report = report._replace(host=rest[0], pid=int(rest[1]), head=int(rest[2]))
        elif word == "beat":
            report = report._replace(beat=int(rest[0]))
        else:
            report = report._replace(ended=int(rest[0]))
    return report


def libraries(folder: str) -> str:
    """Make the folder for libraries, and return its path."""
    path = os.path.join(folder, "lib")
    os.mkdir(path)
    return path


def with_programs(folder: str, path: str) -> str:
    """Return a PATH on which the programs of the folder come first."""
    return os.path.join(folder, "bin") + os.pathsep + path
