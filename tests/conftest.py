"""What every test module finds: an environment that nobody has touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pipes import Fifo

import pytest


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions leave their folders below the current one; and what the user set is not ours."""
    monkeypatch.chdir(tmp_path)
    for name in ("RHAPSODY_WORK_DIR", "RHAPSODY_LOG_LEVEL", "RHAPSODY_SITE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _shared_memory_of_killed_ranks() -> Iterator[None]:
    """MPICH's programs leave their segment behind when they are killed: take it away."""
    here = Path("/dev/shm")
    before = set(here.glob("mpich_shm_*"))
    yield
    for segment in set(here.glob("mpich_shm_*")) - before:
        segment.unlink(missing_ok=True)


@pytest.fixture
def roster(tmp_path: Path) -> Iterator[Fifo]:
    """Where processes report, and which they hold open while they live."""
    with Fifo(tmp_path / "roster") as fifo:
        yield fifo


@pytest.fixture
def go(tmp_path: Path) -> Iterator[Fifo]:
    """Where they wait until the test lets them go on."""
    with Fifo(tmp_path / "go") as fifo:
        yield fifo
