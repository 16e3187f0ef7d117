"""What every test module finds: async tests, and an environment that nobody has touched."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    # Not through getfixturevalue: parameters of parametrize are in funcargs too.
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True


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
