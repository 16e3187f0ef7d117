"""The melt example, unchanged: by Python alone, under `dragon`, and over two nodes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from test_examples import SMALL, WORKFLOW, check_results

from . import small
from .nodes import Nodes, Sandbox

# Fewer ranks than the example would take: its MPI is not started by Dragon's PMIx.
OPTIONS = [*SMALL, "--more", "1", "--backend", "dragon", "--ranks", "1"]

pytestmark = pytest.mark.timeout(300)  # LAMMPS is slow where others use the cores too


def melt(place: Sandbox | Nodes, launcher: Sequence[str], folder: Path) -> None:
    environment = small.environment(4)
    line = [*launcher, WORKFLOW, *OPTIONS, "--out", str(folder / "out")]
    result = place.run(line, env=environment, cwd=folder, timeout=240)
    assert result.code == 0, result
    check_results(folder / "out")
    assert place.left(grace=20) == []


@pytest.mark.parametrize("launcher", [[sys.executable], ["dragon", "-s"]], ids=["python", "dragon"])
def test_melt_on_one_node(sandbox: Sandbox, launcher: list[str], tmp_path: Path) -> None:
    melt(sandbox, launcher, tmp_path)


def test_melt_over_two_nodes(two_nodes: Nodes, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "rhapsody", "launch", "--dragon"]
    melt(two_nodes, [*launch, "--hosts", ",".join(two_nodes.hosts)], tmp_path)
