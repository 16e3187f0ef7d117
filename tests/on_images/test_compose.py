"""The cluster of `containers/compose.yaml`: TLS, nothing published, and a workflow on it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration import machine
from integration.docker_engine import ROOT, docker, image

from .images import in_docker

PACKAGES = {"docker-compose": ["docker-compose"]}
PROJECT = "rhapsody-test"

pytestmark = pytest.mark.timeout(900)


class Compose:
    """The project, up with two workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        line = ["docker-compose", "--file", str(ROOT / "containers/compose.yaml")]
        environ = {"RHAPSODY_IMAGE": image("dask"), "PWD": str(self.folder)}
        environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.run(
            [*line, "--project-name", PROJECT, *words],
            env=environ,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture
def compose(images: None, folder: Path) -> Iterator[Compose]:
    machine.install(PACKAGES)
    compose = Compose(folder)
    try:
        up = compose("up", "--detach", "--scale", "worker=2")
        assert up.returncode == 0, up
        yield compose
    finally:
        down = compose("down", "--volumes", "--timeout", "5")
        assert down.returncode == 0, down


def _addresses(service: str) -> list[str]:
    """Of the containers of a service."""
    label = f"label=com.docker.compose.service={service}"
    project = f"label=com.docker.compose.project={PROJECT}"
    names = docker("ps", "--quiet", "--filter", label, "--filter", project).split()
    inspected = json.loads(docker("inspect", *names))
    return [next(iter(c["NetworkSettings"]["Networks"].values()))["IPAddress"] for c in inspected]


def _healthy() -> bool:
    project = f"label=com.docker.compose.project={PROJECT}"
    states = docker("ps", "--filter", project, "--format", "{{.Status}}").splitlines()
    return len(states) == 3 and all("(healthy)" in state for state in states)


def test_a_workflow_on_the_cluster(compose: Compose, folder: Path) -> None:
    machine.until(_healthy, 60, "scheduler and workers to be healthy")
    shutil.copy(Path(__file__).with_name("workflows.py"), folder / "workflow.py")
    line = ["python", "workflow.py", "dask", "tls://scheduler:8786"]
    done = compose("run", "--rm", "-T", "workflow", *line)
    assert done.returncode == 0, done
    assert done.stdout.startswith("[0, 1, 4, 9, 16, 25, 36, 49]")

    # Nothing is on the machine's own addresses, and who has no credentials is not let in.
    project = f"label=com.docker.compose.project={PROJECT}"
    assert "->" not in docker("ps", "--filter", project, "--format", "{{.Ports}}")
    (address,) = _addresses("scheduler")
    network = f"--network={PROJECT}_default"
    script = (
        "import sys, ssl, socket, urllib.request\n"
        "from distributed import Client\n"
        "try: Client(f'tcp://{sys.argv[1]}:8786', timeout=5)\n"
        "except OSError: print('no client')\n"
        "try: urllib.request.urlopen(f'http://{sys.argv[1]}:8787/health', timeout=5)\n"
        "except OSError: print('no pages')\n"
        "context = ssl.create_default_context()\n"
        "context.check_hostname, context.verify_mode = False, ssl.CERT_NONE\n"
        "with socket.create_connection((sys.argv[1], 8786)) as raw:\n"
        "    try:\n"
        "        with context.wrap_socket(raw) as secure: secure.recv(1)\n"
        "    except (ssl.SSLError, OSError) as error: print('refused', error.reason)\n"
    )
    stranger = in_docker(image("dask"), "python", "-c", script, address, options=[network])
    assert stranger.stdout.splitlines()[:2] == ["no client", "no pages"], stranger
    assert "CERTIFICATE_REQUIRED" in stranger.stdout.splitlines()[2]


def test_the_file_is_the_one_that_the_readme_shows() -> None:
    page = (ROOT / "containers/README.md").read_text()
    for line in (ROOT / "containers/compose.yaml").read_text().splitlines():
        if line.startswith("#   "):
            assert line.removeprefix("#   ") in page
