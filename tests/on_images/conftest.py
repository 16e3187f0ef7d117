"""The images and the SIF, built as a user builds them; nothing is skipped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration import docker_engine
from integration.fixtures import engine, ledger

from . import apptainer as apptainer_of_debian
from . import images as built

__all__ = ["engine", "ledger"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect these only with `-m images` or `-m sif`: they need root, Docker and Apptainer."""
    expression = str(config.getoption("markexpr"))
    wanted = expression in ("images", "sif", "images or sif")
    return None if wanted or collection_path.name == "conftest.py" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked, by whether it runs in Docker or in Apptainer."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            sif = {"sif", "apptainer"} & set(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.sif if sif else pytest.mark.images)


@pytest.fixture(scope="session")
def images(engine: None) -> None:
    """All images, as `built.name` names them."""
    sys.stderr.write("building the images\n")
    docker_engine.build("core", "dask", "dragon", "full")


@pytest.fixture(scope="session")
def tools(images: None) -> str:
    """The image `full` with what the tests and the examples need beside it."""
    return built.with_tools()


@pytest.fixture(scope="session")
def apptainer() -> Iterator[Path]:
    """Apptainer's program, which a build of ours finds on the PATH."""
    program = apptainer_of_debian.ensure()
    sys.stderr.write(f"{apptainer_of_debian.version(program)}\n")
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("PATH", str(program.parent), prepend=os.pathsep)
        # Fast to make; the default is of the smallest size, and known to every Apptainer.
        environ.setenv("APPTAINER_MKSQUASHFS_ARGS", "-comp zstd -Xcompression-level 1")
        yield program


@pytest.fixture(scope="session")
def sif(images: None, apptainer: Path) -> Path:
    """The SIF of the image `full`."""
    return built.sif()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that ordinary users can write to as well; pytest's own are root's alone."""
    with built.open_folder() as path:
        yield path
