"""A site without Docker and without a way out: Podman, and what was carried over."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from integration.docker_engine import ROOT, docker

# Podman asks for more of its own accord, which needs a privilege that root may lack.
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")
BUILD = [sys.executable, str(ROOT / "containers" / "build")]


@pytest.fixture
def podman_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Podman's images and containers, in a folder of the test."""
    # Not pytest's: its sockets lie there, whose paths have to be short.
    with tempfile.TemporaryDirectory(prefix="rhapsody-podman-") as folder:
        conf = Path(folder, "storage.conf")
        folders = f"graphroot = '{folder}/images'\nrunroot = '{folder}/run'\n"
        conf.write_text(f"[storage]\ndriver = 'overlay'\n{folders}")
        monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(conf))
        engine = Path(folder, "containers.conf")
        engine.write_text("[engine]\nlock_type = 'file'\n")  # else one stays in /dev/shm
        monkeypatch.setenv("CONTAINERS_CONF", str(engine))
        yield
        run(["podman", "system", "reset", "--force"])


def run(line: Sequence[str]) -> str:
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done
    return done.stdout


def test_an_image_from_what_was_carried_over(
    images: None, podman_storage: None, tmp_path: Path
) -> None:
    wheels, archive = tmp_path / "wheels", tmp_path / "base.tar"
    run([*BUILD, "fetch", str(wheels)])
    base, *_ = docker("images", "--format", "{{.Repository}}:{{.Tag}}", "rhapsody-base").split()
    docker("save", "--output", str(archive), base)

    # Nothing below can open a connection, not even to its own loopback.
    cut_off = ["unshare", "--net"]
    run([*cut_off, "podman", "load", "--input", str(archive)])
    line = [*BUILD, "dask", "--engine", "podman", "--wheels", str(wheels), "--base", base]
    said = run([*cut_off, *line, "--name", "carried"])
    assert said.startswith("carried-dask:")
    labels = "{{.Labels}} {{.HealthCheck}}"
    seen = run(["podman", "image", "inspect", "--format", labels, "carried-dask"])
    assert "org.opencontainers.image.title:rhapsody" in seen
    assert "rhapsody-healthcheck" in seen

    start = ["podman", "run", "--rm", "--network=none", *LIMITS, "carried-dask"]
    selftest = "/usr/local/share/rhapsody/selftest.py"
    done = run([*start, "python", selftest])
    assert done == "a workflow on the local backend and on Dask: right\n"
    assert run([*start, "id", "--user"]) == "1000\n"
