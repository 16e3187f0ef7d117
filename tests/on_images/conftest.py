"""The image and its runner, for the tests of images: RHAPSODY_SIF, and apptainer on the PATH."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect these only with `-m images`: they need root and an image that takes minutes."""
    expression = str(config.getoption("markexpr"))
    wanted = "images" in expression and "not images" not in expression
    return None if wanted or collection_path.name == "conftest.py" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path).startswith(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.images)


@pytest.fixture(scope="session")
def sif() -> Path:
    return Path(os.environ["RHAPSODY_SIF"]).absolute()


@pytest.fixture(scope="session")
def apptainer() -> Path:
    path = shutil.which("apptainer")
    assert path is not None
    return Path(path)
