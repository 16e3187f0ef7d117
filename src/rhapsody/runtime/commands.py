"""What a task runs: its arguments with parents' results in place, and its command line."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LOCAL_MPI", "command_of", "inputs_of", "noting_failure", "words_for_mpiexec"]


# Ranks are of this machine, also inside an allocation of several nodes: MPICH's launcher starts
# them here, and its ranks, which listen by the TCP of UCX or libfabric, do so on loopback.
LOCAL_MPI = {
    "HYDRA_LAUNCHER": "fork",
    "HYDRA_RMK": "user",
    "UCX_NET_DEVICES": "lo",
    "FI_TCP_IFACE": "lo",
}


def inputs_of(task: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return args and kwargs of a function task, the results of its parents among them."""
    if isinstance(task, dict):
        return task.get("args") or (), task.get("kwargs") or {}
    bound = task._bound
    return (task.args, task._kwargs) if bound is None else (bound["args"], bound["kwargs"])


def command_of(task: Any, *, shell: bool = False) -> list[str]:
    """Return the command line of an executable task.

    With `shell` the executable is a command line of its own, which `/bin/sh` reads; arguments are
    quoted, so that only the author's own text is code.
    """
    bound = None if isinstance(task, dict) else task._bound
    arguments = (task.get("arguments") or []) if bound is None else bound["arguments"]
    words = [os.fsdecode(a) if isinstance(a, (bytes, os.PathLike)) else str(a) for a in arguments]
    if shell:
        return ["/bin/sh", "-c", " ".join([task["executable"], *map(shlex.quote, words)])]
    return [task["executable"], *words]


def words_for_mpiexec(argv: list[str]) -> list[str]:
    """Return a command line that `mpiexec` takes for one program with its arguments.

    A word that begins with a colon would end it there, and begin another program; a first word
    that begins with a dash would be an option. Inside a quoted line neither is seen.
    """
    if argv[0].startswith("-") or any(word.startswith(":") for word in argv):
        return ["/bin/sh", "-c", f"exec {shlex.join(argv)}"]
    return argv


def noting_failure(argv: list[str], path: str) -> list[str]:
    """Return a rank's command line that also appends its exit code, if it is not 0, to a file.

    For MPICH's gforker, which returns 0 now and then though a rank has failed (seen in 5.0.2, in
    one run of ten, when all ranks end at once).
    """
    note = f"{{ c=$?; echo $c >> {shlex.quote(path)}; exit $c; }}"
    return ["/bin/sh", "-c", f"{shlex.join(argv)} || {note}"]
