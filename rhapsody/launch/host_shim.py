"""A stand-in, inside an image, for a program outside of it: ssh, srun or mpiexec.

With `rhapsody launch --image` Dragon's launcher runs inside the image, where the host's srun, its
libraries and its credentials are not, and often no ssh either. `python -m rhapsody.launch.host_shim
SOCKET PROGRAM ARGUMENT...` is what it finds in their place. It hands the words and its own standard
streams to the process outside (see `image`), which starts the real one, and ends as that one does.

Only what starts Dragon on other hosts goes that way: a workflow that calls ssh or mpiexec for
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

__all__ = ["PROGRAMS", "command_of_dragon"]

#: what Dragon 0.15 starts its part on other hosts by, for each of its workload managers
PROGRAMS = {"ssh": "ssh", "slurm": "srun", "pbs+pals": "mpiexec"}

# What it starts there (dragonhpc 0.15.0, launcher/wlm/): words of their own, or in a shell's line.
_DRAGONS = re.compile(r"(?:^|[ /])dragon-(?:backend|network-config-launch-helper)(?= |$)")

# Variables that Dragon sets for the other side (BASE_ENV_VARNAMES of launcher/wlm/ssh.py).
_NAMES = ("PATH", "PYTHONPATH", "PYTHONSTARTUP", "LD_LIBRARY_PATH")
_PREFIX = "DRAGON_"


def command_of_dragon(arguments: Sequence[str]) -> int | None:
    """The place of the word that is or has Dragon's program; None for a line that is not Dragon's.

    With ssh it is the last one, a line for a shell; with srun and mpiexec it begins the command.
    """
    places = (n for n, word in enumerate(arguments) if _DRAGONS.search(word))
    return next(places, None)


def main() -> None:
    """Run the real program outside; ends with its exit code, 128 + n for signal n."""
    name, program, *arguments = sys.argv[1:]
    if command_of_dragon(arguments) is None:
        _run_another(program, arguments)
    environ = {k: v for k, v in os.environ.items() if k in _NAMES or k.startswith(_PREFIX)}
    said = json.dumps({"words": [program, *arguments], "environ": environ}).encode() + b"\n"
    answer = b""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):

        def pass_on(number: int, _: object) -> None:
            with contextlib.suppress(ConnectionError):  # it has answered, and gone
                connection.sendall(bytes([number]))

        connection.connect(f"\0{name}")
        said = said[socket.send_fds(connection, [said], [0, 1, 2]) :]
        if said:  # to send nothing is an error too where the answer is here and its sender gone
            connection.sendall(said)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, pass_on)
        answer = connection.makefile("rb").readline()
    os._exit(int(answer) if answer else 255)  # 255: as ssh does when the connection broke


def _run_another(program: str, arguments: Sequence[str]) -> None:
    """Become the next program of that name on the PATH; the first is what started us."""
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
