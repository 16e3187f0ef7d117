"""Nodes and runtimes for the tests of Dragon; the package's docstring says how they are used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from . import machine, small
from .nodes import Nodes, Sandbox
from .runtime import Runtime


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect these only with `-m dragon`: they need root, and an engine that others lack."""
    expression = str(config.getoption("markexpr"))
    wanted = "dragon" in expression and "not dragon" not in expression
    return None if wanted or collection_path.name == "conftest.py" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked, and what needs several nodes is so a second time."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.dragon)
            if {"two_nodes", "three_nodes"} & set(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.multinode)


@pytest.fixture(scope="session", autouse=True)
def _machine() -> None:
    """The machine has what the tests need, or they fail and say what is missing."""
    machine.require()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One node for the tests of a module."""
    with Sandbox() as place:
        yield place


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Nodes]:
    """A front end and two nodes for the tests of a module."""
    with Nodes(2) as place:
        yield place


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Nodes]:
    """A front end and three nodes for the tests of a module."""
    with Nodes(3) as place:
        yield place


@contextmanager
def _runtime(place: Sandbox | Nodes, folder: Path) -> Iterator[Runtime]:
    """A runtime that ends as it should: by itself, with code 0, and without a trace."""
    # Each of Batch's workers, which are half as many as CPUs, takes a second to start.
    cpus = 8 if isinstance(place, Sandbox) else 4
    with Runtime(place, small.environment(cpus), cwd=folder) as runtime:
        yield runtime
        result = runtime.stop()
        assert result.code == 0, result
        assert place.left() == []


@pytest.fixture(scope="module")
def runtime(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A runtime of one node, for the tests of a module."""
    with _runtime(sandbox, tmp_path_factory.mktemp("one")) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def runtime_on_two(two_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A runtime of two nodes, for the tests of a module."""
    with _runtime(two_nodes, tmp_path_factory.mktemp("two")) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def runtime_on_three(
    three_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runtime]:
    """A runtime of three nodes, for the tests of a module."""
    with _runtime(three_nodes, tmp_path_factory.mktemp("three")) as runtime:
        yield runtime
