"""Runs a program of the host from inside an image: ssh, srun or mpiexec.

With `rhapsody launch --image` Dragon's launcher runs inside the image, which has neither the host's
srun with its libraries and credentials nor, often, an ssh. In their place it finds
`python -m rhapsody.launch.host_shim SOCKET PROGRAM ARGUMENT...`, which sends its command line and
its standard streams to the process on the host (see `apptainer`). That process starts the real
program, and the shim ends as the program does.

Only commands that start Dragon on other hosts are sent: a workflow that calls ssh or mpiexec for
reasons of its own gets the next one on its PATH, the image's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Sequence

__all__ = ["PROGRAMS", "find_dragon_command"]

#: the programs by which Dragon 0.15 starts its part on other hosts, by its workload managers
PROGRAMS = {"ssh": "ssh", "slurm": "srun", "pbs+pals": "mpiexec"}

# What it starts there (dragonhpc 0.15.0, launcher/wlm/): an argument, or a word in a shell command.
_DRAGON_PROGRAM = re.compile(r"(?:^|[ /])dragon-(?:backend|network-config-launch-helper)(?= |$)")

# Variables that Dragon passes to other hosts (BASE_ENV_VARNAMES of launcher/wlm/ssh.py).
_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONSTARTUP", "LD_LIBRARY_PATH")
_VARIABLE_PREFIX = "DRAGON_"


def find_dragon_command(arguments: Sequence[str]) -> int | None:
    """The index of the argument that names a program of Dragon's; None if none does.

    With ssh it is the last one, a shell command; with srun and mpiexec the command starts there.
    """
    indices = (n for n, word in enumerate(arguments) if _DRAGON_PROGRAM.search(word))
    return next(indices, None)


def main() -> None:
    """Run the host's program; exits with its exit code, 128 + n for signal n."""
    name, program, *arguments = sys.argv[1:]
    if find_dragon_command(arguments) is None:
        _exec_next_on_path(program, arguments)
    environ = {
        name: value
        for name, value in os.environ.items()
        if name in _VARIABLES or name.startswith(_VARIABLE_PREFIX)
    }
    request = json.dumps({"argv": [program, *arguments], "environ": environ}).encode() + b"\n"
    reply = b""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):

        def forward(number: int, _: object) -> None:
            with contextlib.suppress(ConnectionError):  # it has replied, and closed
                connection.sendall(bytes([number]))

        connection.connect(f"\0{name}")
        rest = request[socket.send_fds(connection, [request], [0, 1, 2]) :]
        if rest:  # even to send nothing is an error where the host has replied and closed
            connection.sendall(rest)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, forward)
        reply = connection.makefile("rb").readline()
    os._exit(int(reply) if reply else 255)  # 255: as ssh does when the connection broke


def _exec_next_on_path(program: str, arguments: Sequence[str]) -> None:
    """Become the next program of that name on the PATH; the first is the shim."""
    first, *others = (
        folder
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)
        if shutil.which(program, path=folder)
    )
    path = shutil.which(program, path=os.pathsep.join(others)) if others else None
    if path is None:
        sys.exit(f"{program}: not found in the image (searched behind {first})")
    os.execv(path, [program, *arguments])  # noqa: S606 - a shell is not wanted


if __name__ == "__main__":
    main()
