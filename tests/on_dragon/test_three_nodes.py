"""The harness with Dragon on three nodes, in a module of its own for one runtime at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import raw
from .nodes import Nodes
from .runtime import Runtime


@pytest.fixture(scope="module")
def batch(runtime_on_three: Runtime) -> Iterator[Runtime]:
    runtime_on_three.call(raw.open_batch)
    yield runtime_on_three
    runtime_on_three.call(raw.close_batch)


def test_all_nodes_are_there(runtime_on_three: Runtime, three_nodes: Nodes) -> None:
    assert runtime_on_three.call(raw.nodes) == [(host, 4, 0) for host in three_nodes.hosts]


def test_functions_run_on_all(batch: Runtime, three_nodes: Nodes) -> None:
    assert sorted(batch.call(raw.hosts_of_functions, 60)) == three_nodes.hosts
