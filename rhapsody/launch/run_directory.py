"""The directory of a run of `rhapsody launch`: files that processes and hosts share, and shims.

It holds the workflow's report, the stop request and the wake-up pipe (see `workflow_runner`), the
supervisor's heartbeat (see `node_supervisor`), `bin`, the first folder on Dragon's PATH, and `lib`,
for libraries that Dragon has to find. The programs in `bin` are shims: they stand in for programs
of the same name that Dragon calls.
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

from . import host_shim, workflow_runner
from .dragon import node_supervisor

__all__ = [
    "Report",
    "is_shim",
    "make_library_folder",
    "make_run_directory",
    "path_with_shims",
    "read_report",
]

_NO_CLEANUP = """\
#!/bin/sh
# In place of dragon-cleanup while `rhapsody launch` runs Dragon: the launcher calls that program
# when something went wrong, and it ends all of the user's processes of Dragon and Python.
exit 0
"""


class Report(NamedTuple):
    """What the workflow's runner has reported so far."""

    host: str = ""
    workflow_pid: int = 0
    runner_pid: int = 0
    heartbeat: int = 0
    exit_code: int | None = None  # of the workflow; -n where signal n ended it


def make_run_directory(
    environ: Mapping[str, str], shared_dir: str | None, host_socket: str | None = None
) -> str:
    """Make a run's directory, and return its path.

    Args:
        environ: the launcher's.
        shared_dir: where to make it so that all nodes see it; None for one node.
        host_socket: inside an image, the socket by which `host_shim` runs programs of the host.
    """
    directory = tempfile.mkdtemp(prefix="rhapsody-launch-", dir=shared_dir)
    for name in (workflow_runner.REPORT, workflow_runner.STOP, node_supervisor.HEARTBEAT):
        with open(os.path.join(directory, name), "wb"):
            pass
    if shared_dir is None:
        os.mkfifo(os.path.join(directory, workflow_runner.WAKEUP))
    shims = {"dragon-cleanup": _NO_CLEANUP}
    backend = shutil.which("dragon-backend", path=environ.get("PATH"))
    if shared_dir is not None and backend is not None:
        shims["dragon-backend"] = _shim(node_supervisor.__name__, directory, backend)
    if host_socket is not None:
        for program in host_shim.PROGRAMS.values():
            shims[program] = _shim(host_shim.__name__, host_socket, program)
    os.mkdir(os.path.join(directory, "bin"))
    for name, script in shims.items():
        with open(os.path.join(directory, "bin", name), "w") as file:
            file.write(script)
            os.fchmod(file.fileno(), 0o755)
    return directory


def _shim(module: str, *arguments: str) -> str:
    """A script that runs a module of ours with these arguments, followed by its own."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    return f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'


def is_shim(pid: int) -> bool:
    """Whether a process is a shim; they end by themselves."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        argv = file.read().split(b"\0")
        return node_supervisor.__name__.encode() in argv or host_shim.__name__.encode() in argv
    return False


def read_report(directory: str) -> Report | None:
    """Read the workflow's report; None where it cannot be read now, or is being written."""
    try:
        with open(os.path.join(directory, workflow_runner.REPORT), encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return None
    if not text.endswith("\n"):
        return None
    try:
        return _parse(text)
    except (ValueError, IndexError):  # half written; the next read finds the whole
        return None


def _parse(text: str) -> Report:
    report = Report()
    for line in text.splitlines():
        word, *values = line.split()
        if word == "started":
            host, workflow, runner = values
            report = report._replace(host=host, workflow_pid=int(workflow), runner_pid=int(runner))
        elif word == "heartbeat":
            report = report._replace(heartbeat=int(values[0]))
        else:
            report = report._replace(exit_code=int(values[0]))
    return report


def make_library_folder(directory: str) -> str:
    """Make the run's folder for libraries, and return its path."""
    path = os.path.join(directory, "lib")
    os.mkdir(path)
    return path


def path_with_shims(directory: str, path: str) -> str:
    """Return a PATH on which the run's shims come first."""
    return os.path.join(directory, "bin") + os.pathsep + path
