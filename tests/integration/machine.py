"""What the integration tests need of the machine, and how they leave it as they found it.

Run as a script it installs what is missing: ``python -m tests.integration.machine``.

A test run that is killed cannot clean up, so everything that outlives a process is written into a
*ledger* first - a folder of one file per thing, named after what it is - and the next run sweeps
what the ledger still names. A process is recorded with its start time, so that a recycled pid is
never killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: Debian packages, by the command that shows that they are there.
PACKAGES = {
    "dockerd": ["docker.io", "containerd", "runc", "iptables"],
    "mmdebstrap": ["mmdebstrap"],
    "podman": ["podman"],
    "slurmctld": ["slurmctld", "slurmd", "slurm-client"],
    "munged": ["munge"],
}

#: Survives a checkout: images and the container store are worth minutes.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rhapsody-integration"

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def which(command: str) -> str | None:
    """The path of a command, the administrator's folders included."""
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:{_SBIN}")


def missing_packages(wanted: Mapping[str, Sequence[str]] = PACKAGES) -> list[str]:
    """The Debian packages that are not installed, in the order to install them."""
    return [p for command, ps in wanted.items() if which(command) is None for p in ps]


def install(wanted: Mapping[str, Sequence[str]] = PACKAGES) -> None:
    """Install what is missing with apt; a no-op where everything is there.

    Raises:
        RuntimeError: something is missing and this is no root account on a Debian, with the line
            that an administrator has to run.
    """
    packages = missing_packages(wanted)
    if not packages:
        return
    line = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or which("apt-get") is None:
        raise RuntimeError(f"the integration tests need: {' '.join(line)} (as root, on Debian)")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], line):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks after boot, or None where none runs by that number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]  # a zombie has ended


def stop_process(pid: int, started: str | None, grace: float = 10.0) -> None:
    """SIGTERM, then SIGKILL after `grace` seconds; only the process that started at `started`."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if started is None or start_time(pid) != started:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            until(lambda: start_time(pid) != started, grace, f"process {pid} to end")


def until(condition: Callable[[], object], seconds: float, what: str, step: float = 0.1) -> None:
    """Wait for a condition of the outside world that announces itself in no other way.

    Raises:
        TimeoutError: it did not come within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(step)


class Ledger:
    """What this run started, on disk, so that the next one can sweep it.

    Args:
        folder: one file per thing, ``process-PID`` or ``container-NAME`` or ``network-NAME``; the
            text of a process's file is its start time.
    """

    def __init__(self, folder: Path = CACHE / "ledger") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add_process(self, pid: int) -> None:
        """Record a process that has to end with the run."""
        (self.folder / f"process-{pid}").write_text(start_time(pid) or "")

    def stop(self, pid: int) -> None:
        """Stop a recorded process and strike it out."""
        entry = self.folder / f"process-{pid}"
        if entry.exists():
            stop_process(pid, entry.read_text() or None)
            entry.unlink(missing_ok=True)

    def sweep(self) -> list[str]:
        """Stop every process that an earlier run left; returns what was swept.

        Containers and networks go with a label of their own, see ``docker_engine.sweep``.
        """
        swept = []
        for entry in sorted(self.folder.glob("process-*")):
            pid = int(entry.name.partition("-")[2])
            if start_time(pid) == entry.read_text():
                swept.append(entry.name)
            self.stop(pid)
        return swept


if __name__ == "__main__":
    install()
    sys.stdout.write(f"system packages: {'complete' if not missing_packages() else 'MISSING'}\n")
