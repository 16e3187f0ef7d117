"""The harness with Dragon on two nodes, of which one dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import raw, small
from .nodes import Nodes
from .runtime import Runtime


@pytest.mark.multinode
def test_a_node_that_dies_under_a_runtime(tmp_path: Path) -> None:
    """Dragon goes on as if nothing were; the harness knows, and ends it with nothing left."""
    with Nodes(2) as nodes, Runtime(nodes, small.environment(), cwd=tmp_path) as runtime:
        head = runtime.call(raw.here, 0)
        other = next(host for host in nodes.hosts if host != head)
        nodes.kill(other)
        assert not nodes.alive(other)
        assert runtime.call(raw.here, 0) == head
        nodes.kill_all()
        assert runtime.command.wait(10).code != 0
        assert nodes.processes() == {}
