"""The harness with Dragon on two nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rhapsody.cli import doctor

from . import raw
from .nodes import Nodes
from .runtime import Runtime


@pytest.fixture(scope="module")
def batch(runtime_on_two: Runtime) -> Iterator[Runtime]:
    runtime_on_two.call(raw.open_batch)
    yield runtime_on_two
    runtime_on_two.call(raw.close_batch)


def test_both_nodes_are_there(runtime_on_two: Runtime, two_nodes: Nodes) -> None:
    assert runtime_on_two.call(raw.nodes) == [(host, 4, 0) for host in two_nodes.hosts]


def test_doctor_shows_both_nodes(runtime_on_two: Runtime, two_nodes: Nodes) -> None:
    found = runtime_on_two.call(doctor.check_dragon)
    assert "under Dragon on 2 nodes: " in found.found
    assert sorted(found.data["nodes"]) == two_nodes.hosts


def test_functions_run_on_both(batch: Runtime, two_nodes: Nodes) -> None:
    ran = batch.call(raw.hosts_of_functions, 50)
    assert sorted(ran) == two_nodes.hosts
    assert sum(ran.values()) == 50


def test_a_process_runs_where_it_is_pinned(
    batch: Runtime, two_nodes: Nodes, tmp_path: Path
) -> None:
    for host in two_nodes.hosts:
        assert batch.call(raw.run_hostname, str(tmp_path), host) == (0, host)


def test_a_job_of_two_ranks(batch: Runtime, two_nodes: Nodes, tmp_path: Path) -> None:
    codes, hosts = batch.call(raw.run_job, str(tmp_path), 2)
    assert codes == [0, 0]
    assert set(hosts) <= set(two_nodes.hosts)
