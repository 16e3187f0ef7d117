"""Engines that more than one folder of tests has: a conftest imports those that it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from . import docker_engine, machine, slurm_site


@pytest.fixture(scope="session")
def ledger() -> machine.Ledger:
    """The machine has what the tests need, and nothing that an earlier run left."""
    machine.install()
    ledger = machine.Ledger()
    slurm_site.sweep(ledger)
    for name in ledger.sweep():
        sys.stderr.write(f"swept {name}, which an earlier test run left\n")
    return ledger


@pytest.fixture(scope="session")
def engine(ledger: machine.Ledger) -> Iterator[None]:
    """A Docker Engine."""
    daemon = docker_engine.start(ledger)
    try:
        docker_engine.sweep()
        yield
    finally:
        docker_engine.sweep()
        if daemon is not None:
            ledger.stop(daemon.pid)
            daemon.wait(10)
