"""The SIF under Apptainer: its own test and apps, every engine, a host's MPI; as root and not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from integration import docker_engine, machine

from . import images as built
from .images import SMALL

SQUARES = "[0, 1, 4, 9, 16, 25, 36, 49]"
# An account of every Debian; its home is made for the test.
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def workflow(folder: Path) -> Path:
    """A folder with the workflow in it."""
    shutil.copy(Path(__file__).with_name("workflows.py"), folder / "workflow.py")
    return folder


def run(
    apptainer: Path,
    *words: str | Path,
    folder: Path,
    user: Sequence[str] = (),
    timeout: float = 120.0,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command of Apptainer's, with nothing of this process's own environment inside."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder), **(env or {})}
    return subprocess.run(
        [*user, str(apptainer), "--quiet", *map(str, words)],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_its_own_test(sif: Path, apptainer: Path, folder: Path) -> None:
    for user in ([], NOBODY):
        done = run(apptainer, "test", sif, folder=folder, user=user)
        assert done.returncode == 0, done
        assert "a workflow on the local backend and on Dask: right\n" in done.stdout


def test_doctor_finds_no_problem(sif: Path, apptainer: Path, folder: Path) -> None:
    done = run(apptainer, "exec", sif, "rhapsody", "doctor", "--json", folder=folder, user=NOBODY)
    report = json.loads(done.stdout)
    assert (done.returncode, report["problems"]) == (0, 0), report


def test_help_labels_and_the_app_that_measures(sif: Path, apptainer: Path, folder: Path) -> None:
    assert "rhapsody launch --image" in run(apptainer, "run-help", sif, folder=folder).stdout
    labels = run(apptainer, "inspect", "--labels", sif, folder=folder).stdout
    assert "org.opencontainers.image.version" in labels
    listed = run(apptainer, "inspect", "--list-apps", sif, folder=folder).stdout.split()
    assert sorted(listed) == ["bench", "dask-scheduler", "dask-worker", "dragon"]
    words = ("run", "--app", "bench", sif, "--repeat", "1", "--scale", "0.01", "--json")
    done = run(apptainer, *words, folder=folder)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)


def test_the_units_of_the_installed_package(
    sif: Path, apptainer: Path, tools: str, folder: Path
) -> None:
    """Those of what an image might break: processes, signals, MPI and memory."""
    local = ["executables", "warden", "workers", "mpi", "driver_death"]
    words: list[str | Path] = ["exec", "--bind", f"{built.tools_of(tools)}:{built.TOOLS}"]
    words += ["--bind", f"{built.copy_project(folder)}:/project:ro", "--pwd", "/project", sif]
    words += ["pytest", "-p", "no:cacheprovider", "-q", f"--basetemp={folder}/pytest"]
    words += [f"tests/runtime/test_{name}.py" for name in local]
    words += ["tests/test_mixture.py", "tests/launch/test_launch.py"]
    env = {
        "APPTAINERENV_PYTHONPATH": f"{built.TOOLS}/lib/python3.11/site-packages",
        "APPTAINERENV_PREPEND_PATH": f"{built.TOOLS}/bin",
        "APPTAINERENV_PYTHONDONTWRITEBYTECODE": "1",
    }
    done = run(apptainer, *words, folder=folder, user=NOBODY, env=env, timeout=500)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr


def test_the_melt_example(sif: Path, apptainer: Path, tools: str, folder: Path) -> None:
    words: list[str | Path] = ["exec", "--bind", f"{built.tools_of(tools)}:{built.TOOLS}"]
    words += ["--bind", f"{built.copy_project(folder)}/examples:/examples:ro", sif]
    words += ["rhapsody", "run", "/examples/melt/workflow.py", *built.SMALL_MELT]
    env = {
        "APPTAINERENV_PYTHONPATH": f"{built.TOOLS}/lib/python3.11/site-packages",
        "APPTAINERENV_PREPEND_PATH": f"{built.TOOLS}/bin",
    }
    done = run(apptainer, *words, folder=folder, user=NOBODY, env=env, timeout=300)
    assert done.returncode == 0, done
    assert "melting temperature" in done.stdout


@pytest.mark.parametrize("user", [[], NOBODY], ids=["root", "nobody"])
def test_a_workflow_under_dragon(
    sif: Path, apptainer: Path, workflow: Path, user: list[str]
) -> None:
    env = {"APPTAINERENV_PYTHONPATH": SMALL}
    line = ("exec", sif, "dragon", "-s", "workflow.py", "dragon")
    done = run(apptainer, *line, folder=workflow, user=user, env=env)
    assert done.returncode == 0, done
    assert done.stdout.startswith(SQUARES)
    assert f"user {65534 if user else 0}\n" in done.stdout


def test_a_cluster_of_dask_by_its_apps(sif: Path, apptainer: Path, workflow: Path) -> None:
    """Scheduler and worker run in the image, with credentials; the client too."""
    pem = workflow / "dask.pem"
    done = run(apptainer, "exec", sif, "rhapsody-dask-credentials", pem, folder=workflow)
    assert done.returncode == 0, done
    names = ("CA_FILE", "SCHEDULER__CERT", "WORKER__CERT", "CLIENT__CERT")
    secret = {f"APPTAINERENV_DASK_DISTRIBUTED__COMM__TLS__{name}": str(pem) for name in names}
    secret |= {"PATH": "/usr/bin:/bin", "HOME": str(workflow)}
    address = "tls://127.0.0.1:18786"
    scheduler = ["dask-scheduler", "--host", address, "--scheduler-file", "up.json"]
    worker = ["dask-worker", address, "--nthreads", "1", "--local-directory", str(workflow)]
    running = []
    try:
        for app, *words in (scheduler, worker):
            line = [str(apptainer), "run", "--app", app, str(sif), *words]
            with (workflow / f"{app}.log").open("w") as log:
                running.append(
                    subprocess.Popen(line, cwd=workflow, env=secret, stdout=log, stderr=log)
                )
        script = ("python", "workflow.py", "dask", address)
        machine.until((workflow / "up.json").exists, 60, "the scheduler")
        done = run(apptainer, "exec", sif, *script, folder=workflow, env=secret)
        assert done.returncode == 0, done
        assert done.stdout.startswith(SQUARES)
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGINT)
        for process in reversed(running):
            process.wait(30)


def test_a_hosts_mpi_takes_the_place_of_the_images(
    sif: Path, apptainer: Path, folder: Path
) -> None:
    """The host's mpiexec starts two ranks in the image, which are bound to the host's library."""
    host = Path(sys.prefix)  # where the extra `dev` has put MPICH
    assert (host / "lib/libmpi.so.12").exists()
    script = (
        "from mpi4py import MPI; w = MPI.COMM_WORLD; big = w.bcast(bytes(1 << 22)); import sys;"
        "found = {m.split()[-1] for m in open('/proc/self/maps') if 'libmpi.so' in m};"
        "sys.stdout.write(f'{w.size} {len(big)} {found}\\n')"  # one piece, as ranks' lines mix
    )
    library = "/host/mpi/lib"
    inside = [str(apptainer), "exec", "--bind", f"{host}/lib:{library}:ro", str(sif)]
    done = subprocess.run(
        [host / "bin/mpiexec", "-n", "2", *inside, "python", "-c", script],
        cwd=folder,
        env={**os.environ, "APPTAINERENV_MPI4PY_LIBMPI": f"{library}/libmpi.so.12"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done
    for line in done.stdout.splitlines():
        assert line.startswith("2 4194304"), done
        assert f"{library}/libmpi.so.12" in line, done
    assert len(done.stdout.splitlines()) == 2


def test_a_signed_image(sif: Path, apptainer: Path, folder: Path) -> None:
    key, public = folder / "key.pem", folder / "public.pem"
    for words in (["genrsa", "-out", key, "2048"], ["rsa", "-in", key, "-pubout", "-out", public]):
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    signed = folder / "signed.sif"
    docker_engine.build("sif", options=("--sif", str(signed), "--key", str(key)))
    done = run(apptainer, "verify", "--key", public, signed, folder=folder)
    assert done.returncode == 0, done
    with signed.open("r+b") as file:  # in the midst of the file system
        file.seek(signed.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 255]))
    done = run(apptainer, "verify", "--key", public, signed, folder=folder)
    assert done.returncode != 0, done
