"""What the tests run in: images with their tools, the SIF, and one command in either."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from integration import docker_engine
from integration.docker_engine import ROOT, docker

from .apptainer import CACHE

#: what Dragon needs in Docker
SHM = "--shm-size=6g"
#: makes Dragon bearable on two cores: where the product's own patches are in the images
SMALL = "/opt/rhapsody/lib/python3.11/site-packages/rhapsody/launch/dragon/_sitecustomize"
#: what the tests of the package read beside it
PROJECT = ["tests", "examples", "docs", "README.md", "pyproject.toml"]
#: where the tools of the tests are, in the image and, for the SIF, on the machine
TOOLS = Path("/opt/testing")

#: the melt example in its smallest form
SMALL_MELT = [
    "--temperatures",
    "0.6",
    "0.7",
    "0.8",
    "--more",
    "1",
    "--steps",
    "800",
    "--cells",
    "4",
]

_numbers = itertools.count()
_DOCKERFILE = """\
ARG IMAGE
FROM ${IMAGE}
USER root
RUN --mount=type=bind,source=wheels,target=/wheels \\
    python3 $(echo /wheels/pip-*.whl)/pip --python /opt/rhapsody/bin/python install --quiet \\
      --no-index --no-cache-dir --no-compile --find-links /wheels --prefix /opt/testing \\
      'rhapsody-py[dev,demo]' && \\
    echo /opt/testing/lib/python3.11/site-packages \\
      > /opt/rhapsody/lib/python3.11/site-packages/testing.pth
ENV PATH=/opt/rhapsody/bin:/opt/testing/bin:/usr/local/bin:/usr/bin:/bin
USER rhapsody
"""


def with_tools() -> str:
    """Build the image `full` with the extras dev and demo beside it, and return its name."""
    name = "rhapsody-test-tools:latest"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(_wheels(), Path(folder) / "wheels")
        (Path(folder) / "Dockerfile").write_text(_DOCKERFILE)
        arguments = ("--build-arg", f"IMAGE={docker_engine.image('full')}", "--tag", name)
        docker("build", *arguments, folder)
    return name


def _wheels() -> Path:
    """The wheels of the extras, kept by what pyproject.toml says."""
    key = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()[:16]
    folder = CACHE / f"tools-{key}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=CACHE))
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel"]
        wanted = [f"{ROOT}[dev,demo]", "pip"]
        done = subprocess.run(
            [*pip, "--wheel-dir", str(fresh), *wanted],
            capture_output=True,
            text=True,
            timeout=900,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        fresh.rename(folder)
    return folder


def tools_of(image: str) -> Path:
    """Take the tools out of their image, for the SIF to bind; returns where they are."""
    digest = docker("image", "inspect", "--format", "{{.Id}}", image).partition(":")[2][:16]
    folder = CACHE / f"testing-{digest}"
    if not folder.exists():
        for old in CACHE.glob("testing-*"):
            shutil.rmtree(old)
        container = docker("create", "--label", docker_engine.LABEL, image)
        docker("cp", f"{container}:{TOOLS}", str(folder))
        docker("rm", container)
    return folder


def sif() -> Path:
    """Build the SIF unless one of the same image is here, and return its path."""
    full = docker_engine.image("full")
    digest = docker("image", "inspect", "--format", "{{.Id}}", full).partition(":")[2][:16]
    path = CACHE / f"rhapsody-{digest}.sif"
    if not path.exists():
        for old in CACHE.glob("rhapsody-*.sif"):
            old.unlink()
        fresh = path.with_suffix(f".{os.getpid()}.sif")
        docker_engine.build("sif", options=("--sif", str(fresh)))
        fresh.rename(path)
    return path


def copy_project(folder: Path) -> Path:
    """Copy what the installed package's tests read, for users who cannot reach the clone."""
    project = folder / "project"
    project.mkdir()
    for name in PROJECT:
        source, target = ROOT / name, project / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    subprocess.run(["chmod", "-R", "a+rX", str(project)], check=True, timeout=60)
    return project


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may write to."""
    with tempfile.TemporaryDirectory(prefix="rhapsody-images-", dir="/var/tmp") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def in_docker(
    image: str, *command: str, options: Sequence[str] = (), timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a command in a new container, and return how it ended; it is gone then.

    Raises:
        TimeoutError: it still ran after `timeout` seconds; it is killed then.
    """
    name = f"rhapsody-images-{os.getpid()}-{next(_numbers)}"
    line = ["run", "--rm", "--name", name, "--label", docker_engine.LABEL, *options, image]
    try:
        return subprocess.run(
            [docker_engine.docker_command(), *line, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        docker("rm", "--force", name, check=False)
        raise TimeoutError(f"{command} in {image}: {error.stdout!r} {error.stderr!r}") from error
