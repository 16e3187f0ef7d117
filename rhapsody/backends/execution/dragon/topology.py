"""Asks the Dragon runtime of this process what its nodes have. Calls may block."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from rhapsody.runtime.machine.hardware import granted_cores

__all__ = ["Node", "find_nodes", "topology", "workers_per_node"]


class Node(NamedTuple):
    """A node as Dragon describes it."""

    host: str
    cores: int  # as Batch counts
    gpus: list[int]


def find_nodes(num_nodes: int | None = None) -> list[Node]:
    """Return the nodes, or the first of them."""
    machine = importlib.import_module("dragon.native.machine")
    found = [machine.Node(uid) for uid in machine.System().nodes][:num_nodes]
    # Batch takes every core for two hardware threads.
    return [Node(n.hostname, max(1, n.num_cpus // 2), list(n.gpus or ())) for n in found]


def workers_per_node(cores: Mapping[str, int]) -> int:
    """How many workers a Batch gets on each node: Slurm may grant less than it would take."""
    return max(1, min(len(granted_cores()), *cores.values()))


def topology() -> dict[str, dict[str, Any]]:
    """Return, by host name, `workers`, `cores` and `gpus` of the nodes, for a Batch on all of them.

    Raises:
        RuntimeError: this process is part of no runtime.
    """
    if not importlib.import_module("dragon").in_dragon():
        raise RuntimeError("this process is part of no Dragon runtime")
    nodes = find_nodes()
    workers = workers_per_node({node.host: node.cores for node in nodes})
    return {
        node.host: {"workers": workers, "cores": node.cores, "gpus": node.gpus} for node in nodes
    }
