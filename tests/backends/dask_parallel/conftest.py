"""A cluster of this machine for all tests of this folder: real scheduler, workers, children."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody.api import Session
from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

from .helpers import LocalCluster


@pytest.fixture(scope="package")
def cluster() -> Iterator[Any]:
    """Two workers of one thread."""
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        resources={"CPU": 2, "SLOT": 1},
        memory_limit="1GiB",
    ) as cluster:
        yield cluster


@pytest.fixture
def run(cluster: Any, tmp_path: Path) -> Callable[..., Any]:
    """Run `scenario(session, backend)` in a session on the shared cluster."""

    def run(scenario: Callable[..., Coroutine[Any, Any, Any]], **options: Any) -> Any:
        async def main() -> Any:
            backend = await DaskExecutionBackend(**{"cluster": cluster, **options})
            async with Session(backends=[backend], work_dir=tmp_path) as session:
                return await asyncio.wait_for(scenario(session, backend), 90)

        return asyncio.run(main())

    return run
