"""A Docker Engine and our images, without a registry.

Where a daemon answers, it is used and left alone. Where none does, one is started for the test run
and stopped after it; its store stays in the cache, because building an image takes a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import machine

#: Every container and network of the tests carries it, so that a sweep finds those, and only those.
LABEL = "org.rhapsody.integration"

ROOT = Path(__file__).resolve().parents[2]
#: what all images of `containers/` carry
TITLE = "org.opencontainers.image.title=rhapsody"


def docker_command() -> str:
    """The client that came with the Engine: a newer one first on the PATH may lack a builder."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else machine.which("docker") or ""


def docker(*arguments: str, check: bool = True, timeout: float = 600.0) -> str:
    """Run one docker command and return what it printed.

    Raises:
        RuntimeError: it failed, with its own words.
        subprocess.TimeoutExpired: it took more than `timeout` seconds; a build takes minutes.
    """
    env = {**os.environ, "DOCKER_BUILDKIT": "1"}
    done = subprocess.run(
        [docker_command(), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return str(done.stdout).strip()


def answers() -> bool:
    """Whether an Engine answers."""
    command = [docker_command(), "version", "--format", "{{.Server.Version}}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def start(ledger: machine.Ledger) -> subprocess.Popen[bytes] | None:
    """Start an Engine where none answers; returns its process, or None where one was there.

    Raises:
        RuntimeError: it did not come up, with the end of its log.
    """
    if answers():
        return None
    home = machine.CACHE / "docker"
    run = Path(tempfile.gettempdir()) / "rhapsody-docker"
    home.mkdir(parents=True, exist_ok=True)
    run.mkdir(exist_ok=True)
    log = home / "dockerd.log"
    with log.open("wb") as out:
        daemon = subprocess.Popen(
            [
                machine.which("dockerd") or "dockerd",
                f"--data-root={home / 'data'}",
                f"--exec-root={run}",
                f"--pidfile={run / 'dockerd.pid'}",
                "--mtu=1400",  # room for the headers of a tunnel below us
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ledger.add_process(daemon.pid)
    try:
        machine.until(lambda: daemon.poll() is not None or answers(), 60, "dockerd")
    except TimeoutError:
        pass
    if not answers():
        tail = log.read_text(errors="replace")[-2000:]
        ledger.stop(daemon.pid)
        daemon.wait(10)
        raise RuntimeError(f"dockerd did not come up:\n{tail}")
    return daemon


def sweep() -> list[str]:
    """Remove every container and network with our label; returns their names."""
    swept = []
    for kind, listing in (("container", ["ps", "-a"]), ("network", ["network", "ls"])):
        names = docker(*listing, "--filter", f"label={LABEL}", "--format", "{{.ID}}").split()
        for name in names:
            docker(kind, "rm", *(["-f", "-v"] if kind == "container" else []), name, check=False)
        swept += names
    return swept


def build(*targets: str, name: str = "rhapsody-test", options: tuple[str, ...] = ()) -> None:
    """Build targets of ``containers/``, as a user of them does; the engine's cache makes it quick.

    Raises:
        RuntimeError: it failed, with all that was said.
    """
    line = [sys.executable, str(ROOT / "containers" / "build"), "--base", "mmdebstrap"]
    done = subprocess.run(
        [*line, "--engine", "docker", "--name", name, *options, *targets],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise RuntimeError(f"containers/build {' '.join(targets)} failed:\n{done.stdout}")
    # What an earlier build of these was, and is no more.
    ours = f"label={TITLE}"
    docker("image", "prune", "--force", "--filter", ours)


def image(target: str) -> str:
    """The name of an image that `build` has made."""
    return f"rhapsody-test-{target}:latest"
