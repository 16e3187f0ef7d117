"""The images under Docker: what is in them, and that all of it runs, as root and not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration import docker_engine, machine
from integration.docker_engine import ROOT, docker, image

from .images import PROJECT, SHM, SMALL, SMALL_MELT, in_docker

TARGETS = ("core", "dask", "dragon", "full")
SQUARES = "[0, 1, 4, 9, 16, 25, 36, 49]"

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def workflow(folder: Path) -> Path:
    """A folder with the workflow in it, for a container to mount."""
    shutil.copy(Path(__file__).with_name("workflows.py"), folder / "workflow.py")
    return folder


# ---------------------------------------------------------------------- what is in them


@pytest.mark.parametrize("target", TARGETS)
def test_doctor_finds_no_problem(images: None, target: str) -> None:
    done = in_docker(image(target), "rhapsody", "doctor", "--json", options=[SHM])
    report = json.loads(done.stdout)
    assert (done.returncode, report["problems"]) == (0, 0), report


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_small_labelled_and_an_ordinary_users(images: None, target: str) -> None:
    facts = json.loads(docker("image", "inspect", image(target)))[0]
    assert len(facts["RootFS"]["Layers"]) <= 3  # the base, ours, and an empty one
    config = facts["Config"]
    assert config["User"] == "rhapsody"
    assert config["Entrypoint"][0] == "tini"
    labels = config["Labels"]
    commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True)
    assert labels["org.opencontainers.image.revision"] == commit.strip()
    assert labels["org.opencontainers.image.version"]
    assert ("Healthcheck" in config) == (target == "dask")
    script = "id -u; command -v pip pip3 gcc cc make git; ls -d /wheels /out; true"
    done = in_docker(image(target), "sh", "-c", script)
    assert done.stdout == "1000\n", "it has what is only for builds"


def test_two_builds_have_the_same_layers(images: None) -> None:
    docker_engine.build("core", name="rhapsody-again", options=("--no-cache",))
    layers = ["image", "inspect", "--format", "{{.RootFS.Layers}}"]
    again = "rhapsody-again-core"
    try:
        assert docker(*layers, image("core")) == docker(*layers, f"{again}:latest")
    finally:
        names = docker("images", "--format", "{{.Repository}}:{{.Tag}}", again).split()
        docker("rmi", *names)


def test_the_bills_of_materials(images: None, tmp_path: Path) -> None:
    docker_engine.build("full", options=("--sbom", str(tmp_path)))
    named: dict[str, set[str]] = {}
    for part in ("python", "debian"):
        bill = json.loads((tmp_path / f"full.{part}.cdx.json").read_text())
        assert bill["bomFormat"] == "CycloneDX"
        named[part] = {component["name"] for component in bill["components"]}
    assert {"distributed", "dragonhpc", "mpich", "click"} <= named["python"]
    assert {"python3", "tini", "openssh-client", "libc6"} <= named["debian"]


def test_a_build_without_an_engine_says_so(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "containers/build"), "core", "--engine", "buildah"]
    done = subprocess.run(line, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    said = "build: buildah does not work here: is it installed, and does its daemon run?\n"
    assert done.stderr == said


# ---------------------------------------------------------------------- what runs in them


def test_the_units_of_the_installed_package(tools: str) -> None:
    volumes = [f"--volume={ROOT / name}:/project/{name}:ro" for name in PROJECT]
    done = in_docker(
        tools,
        *("pytest", "-p", "no:cacheprovider", "-q", "-m", "not demo"),
        options=["--shm-size=1g", "--workdir=/project", *volumes],
        timeout=800,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr


def test_the_melt_example(tools: str, folder: Path) -> None:
    done = in_docker(
        tools,
        *("rhapsody", "run", "/examples/melt/workflow.py", "--out", "/out/melt", *SMALL_MELT),
        options=[
            "--shm-size=1g",
            f"--volume={ROOT}/examples:/examples:ro",
            f"--volume={folder}:/out",
        ],
        timeout=300,
    )
    assert done.returncode == 0, done
    assert "melting temperature" in done.stdout
    assert (folder / "melt/melt.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("target", "user"), [("dragon", "1000"), ("dragon", "0"), ("full", "4242")]
)
def test_a_workflow_under_dragon(images: None, workflow: Path, target: str, user: str) -> None:
    done = in_docker(
        image(target),
        *("dragon", "-s", "workflow.py", "dragon"),
        options=[
            *(SHM, f"--user={user}", f"--env=PYTHONPATH={SMALL}", "--env=HOME=/tmp"),
            *(f"--volume={workflow}:/work", "--workdir=/work"),
        ],
    )
    assert done.returncode == 0, done
    assert done.stdout.startswith(SQUARES)
    assert f"user {user}\n" in done.stdout


def test_dragon_is_refused_too_little_shared_memory(images: None, workflow: Path) -> None:
    began = time.monotonic()
    for line in (["dragon", "-s"], ["rhapsody", "launch", "--dragon"]):
        done = in_docker(
            image("dragon"),
            *(*line, "workflow.py", "dragon"),
            options=["--shm-size=4g", f"--volume={workflow}:/work", "--workdir=/work"],
        )
        assert done.returncode == 2, done
        assert "4,096 MiB are free, and Dragon needs 4,272 MiB" in done.stderr
        assert "docker run --shm-size=6g" in done.stderr
    assert time.monotonic() - began < 30  # Dragon itself would hang for good


def test_launch_watches_dragon(images: None, workflow: Path) -> None:
    done = in_docker(
        image("dragon"),
        *("rhapsody", "launch", "--dragon", "--small-machine", "workflow.py", "dragon"),
        options=[SHM, f"--volume={workflow}:/work", "--workdir=/work"],
    )
    assert done.returncode == 0, done
    assert done.stdout.startswith(SQUARES)


def test_two_ranks_of_mpi(images: None) -> None:
    # Large enough for a rank to read it out of the other's memory, which Docker forbids.
    script = (
        "from mpi4py import MPI; import sys; big = MPI.COMM_WORLD.bcast(bytes(1 << 22));"
        "sys.stdout.write(f'{len(big)}\\n')"  # one piece, as ranks' lines mix
    )
    done = in_docker(image("full"), "mpiexec", "-n", "2", "python", "-c", script)
    assert (done.returncode, done.stdout) == (0, "4194304\n" * 2), done


def test_a_command_that_is_not_there(images: None) -> None:
    done = in_docker(image("core"), "rhapsodie")
    assert (done.returncode, done.stderr) == (
        127,
        "rhapsody: rhapsodie: No such file or directory\n",
    )


def test_a_stop_reaches_what_a_workflow_started(images: None, folder: Path) -> None:
    (folder / "workflow.py").write_text(
        "import asyncio\n"
        "from rhapsody import ComputeTask, Session\n"
        "from rhapsody.backends import ConcurrentExecutionBackend\n"
        "async def main():\n"
        "    async with Session(backends=[ConcurrentExecutionBackend()]) as session:\n"
        "        script = 'trap \"echo ended > /work/ended; exit\" TERM; echo > /work/runs; '\n"
        "        script += 'while :; do sleep 0.1; done'\n"
        "        task = ComputeTask(executable='sh', arguments=['-c', script])\n"
        "        await session.submit_tasks([task])\n"
        "        await session.wait_tasks([task])\n"
        "asyncio.run(main())\n"
    )
    name = f"rhapsody-images-stop-{os.getpid()}"
    options = ["--label", docker_engine.LABEL, f"--volume={folder}:/work", "--workdir=/work"]
    docker(
        "run", "--detach", "--name", name, *options, image("core"), "rhapsody", "run", "workflow.py"
    )
    try:
        machine.until((folder / "runs").exists, 30, "the task to run")
        began = time.monotonic()
        docker("stop", "--time", "30", name)
        assert time.monotonic() - began < 15
        assert (folder / "ended").read_text() == "ended\n"
        assert docker("inspect", "--format", "{{.State.ExitCode}}", name) == "143"
    finally:
        docker("rm", "--force", name)
