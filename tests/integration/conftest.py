"""Engines for the integration tests: installed, started and swept as needed.

Nothing is skipped: a test whose engine cannot be had fails, and says what is missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Its reaper is an image from a registry; what it would reap is swept by label instead.
os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"

from . import docker_engine, machine, slurm_site
from .fixtures import engine, ledger

__all__ = ["engine", "ledger"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect these only with `-m integration`: they import what other environments lack."""
    expression = str(config.getoption("markexpr"))
    wanted = "integration" in expression and "not integration" not in expression
    return None if wanted or collection_path.name == "conftest.py" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked, so that `-m "not integration"` leaves it out."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def dask_image(engine: None) -> str:
    """The image with Dask and rhapsody, of this interpreter's version."""
    docker_engine.build("dask")
    image = docker_engine.image("dask")
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    there = docker_engine.docker("run", "--rm", image, "python", "-c", script)
    here = "{}.{}".format(*sys.version_info[:2])
    if there != here:
        pytest.fail(
            f"functions are pickled as byte code: the containers have Python {there}, so run these"
            f" tests with it, and not with {here}"
        )
    return image


@pytest.fixture(scope="session")
def slurm(ledger: machine.Ledger) -> Iterator[slurm_site.Slurm]:
    """A Slurm of two nodes."""
    with slurm_site.running(ledger) as slurm:
        os.environ["SLURM_CONF"] = slurm.conf
        yield slurm
        del os.environ["SLURM_CONF"]
