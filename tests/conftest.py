"""What every test module finds: an environment that nobody has touched."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from pytest_timeout import Settings

from commands import HEADER
from fifos import Fifo
from shared_memory import mpich_segments, remove_orphans

#: of what follows a test; a fixture's own bounds are shorter, and say what it waited for
TEARDOWN = Settings(
    timeout=120.0, method="thread", func_only=False, disable_debugger_detection=False
)

#: Modules that `nox -s tests` runs on one Python; the noxfile says why. Folders end with a slash.
ONE_PYTHON = (
    "backends/dask_parallel/",
    "launch/",
    "runtime/test_mpi",
    "test_helpers",
    "test_leaks",
    "test_load",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what does not depend on the version of Python and takes long."""
    here = Path(__file__).parent
    for item in items:
        if os.path.relpath(item.path, here).startswith(ONE_PYTHON):
            item.add_marker(pytest.mark.one_python)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions leave their folders below the current one; and what the user set is not ours."""
    monkeypatch.chdir(tmp_path)
    for name in ("RHAPSODY_WORK_DIR", "RHAPSODY_LOG_LEVEL", "RHAPSODY_SITE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _shared_memory_of_killed_ranks() -> Iterator[None]:
    """Take away what this test's MPI programs have left, and nobody else's."""
    before = mpich_segments()
    yield
    remove_orphans(mpich_segments() - before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Limit the time of the fixtures' ends too: pytest-timeout stops its clock at a failure."""
    hook = item.ihook
    hook.pytest_timeout_cancel_timer(item=item)
    hook.pytest_timeout_set_timer(item=item, settings=TEARDOWN)
    yield
    hook.pytest_timeout_cancel_timer(item=item)


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


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Write a workflow script: the header, then a body."""

    def write(body: str, name: str = "workflow.py", header: str = HEADER) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(header + textwrap.dedent(body))
        return path

    return write
