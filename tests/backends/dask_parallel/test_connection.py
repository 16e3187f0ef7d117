"""Clusters and clients of all kinds, of the backend and of the user."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rhapsody.api import ComputeTask, Resources, Session
from rhapsody.api.errors import BackendError
from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

from .helpers import Client, LocalCluster, Security, add, ended

pytestmark = pytest.mark.timeout(180)


def test_an_own_cluster_has_credentials_and_is_closed(tmp_path: Path) -> None:
    async def main() -> str:
        backend = await DaskExecutionBackend({"n_workers": 1, "threads_per_worker": 2})
        async with Session(backends=[backend], work_dir=tmp_path) as session:
            address = str(backend.client.scheduler.address)
            (task,) = await ended(
                session, ComputeTask(function=add, args=(1,), resources=Resources(cores_per_rank=2))
            )
            assert task.return_value == 2
            with pytest.raises(OSError):
                await Client(
                    address.replace("tls://", "tcp://"),
                    asynchronous=True,
                    set_as_default=False,
                    timeout=2,
                )
        await backend.shutdown()
        assert backend.state() == "SHUTDOWN"
        return address

    address = asyncio.run(main())
    assert address.startswith("tls://127.0.0.1:")
    port = int(address.rpartition(":")[2])
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 2).close()


def test_without_credentials_when_asked() -> None:
    async def main() -> None:
        async with DaskExecutionBackend({"n_workers": 1}, security=None) as backend:
            assert str(backend.client.scheduler.address).startswith("tcp://127.0.0.1")

    asyncio.run(main())


def test_a_client_stays_open(cluster: Any, tmp_path: Path) -> None:
    with Client(cluster, set_as_default=False) as client:

        async def main() -> None:
            backend = await DaskExecutionBackend(client=client)
            async with Session(backends=[backend], work_dir=tmp_path) as session:
                assert await session.map(add, range(3)) == [1, 2, 3]

        asyncio.run(main())
        asyncio.run(main())
        assert client.submit(add, 1).result(timeout=30) == 2


def test_asynchronous_cluster_and_client(tmp_path: Path) -> None:
    async def main() -> None:
        async with LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", asynchronous=True
        ) as cluster:
            backend = await DaskExecutionBackend(cluster=cluster)
            async with Session(backends=[backend], work_dir=tmp_path) as session:
                assert await session.map(add, range(30)) == list(range(1, 31))
            async with Client(cluster, asynchronous=True, set_as_default=False) as client:
                backend = await DaskExecutionBackend(client=client)
                async with Session(backends=[backend], work_dir=tmp_path) as session:
                    (task,) = await ended(session, ComputeTask(executable="echo", arguments=["x"]))
                    assert task.stdout == "x\n"
                assert await client.submit(add, 1) == 2
        constructed = LocalCluster(n_workers=1, dashboard_address="127.0.0.1:0", asynchronous=True)
        backend = await DaskExecutionBackend(cluster=constructed)
        async with Session(backends=[backend], work_dir=tmp_path) as session:
            assert await session.map(add, range(3)) == [1, 2, 3]
        await constructed.close()

    asyncio.run(main())


def test_an_address_with_tls_files(tmp_path: Path) -> None:
    security = Security.temporary()
    files = {}
    for name in ("tls_ca_file", "tls_client_cert", "tls_client_key"):
        files[name] = str(tmp_path / name)
        Path(files[name]).write_text(getattr(security, name))
    with LocalCluster(
        n_workers=1, dashboard_address="127.0.0.1:0", security=security, protocol="tls"
    ) as cluster:

        async def main() -> None:
            backend = await DaskExecutionBackend(
                cluster=cluster.scheduler_address,
                security={**files, "require_encryption": True},
            )
            async with Session(backends=[backend], work_dir=tmp_path) as session:
                assert await session.map(add, range(3)) == [1, 2, 3]

        asyncio.run(main())


def test_what_is_no_cluster() -> None:
    async def main() -> None:
        with pytest.raises(BackendError, match=r"distributed\.Client"):
            await DaskExecutionBackend(client=object())
        with pytest.raises(BackendError, match="cannot reach"):
            await DaskExecutionBackend({"no_such_option": 1})
        with pytest.raises(BackendError, match="not both"):
            DaskExecutionBackend(client="a", cluster="b")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"resources": 5}, "resources must be a dict"),
        ({"resources": "n_workers=4"}, "resources must be a dict"),
        ({"resources": {4: "n_workers"}}, "resources must be a dict"),
        ({"resources": {"n_workers": 4}, "cluster": "tcp://127.0.0.1:1"}, "your own"),
        ({"resources": {"n_workers": 4}, "client": "tcp://127.0.0.1:1"}, "your own"),
        ({"cluster": "tcp://127.0.0.1:1", "client": "tcp://127.0.0.1:1"}, "not both"),
        ({"worker_timeout": "5"}, "worker_timeout"),
        ({"worker_timeout": None}, "worker_timeout"),
        ({"worker_timeout": True}, "worker_timeout"),
        ({"worker_timeout": -1}, "worker_timeout"),
        ({"worker_timeout": float("nan")}, "worker_timeout"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        DaskExecutionBackend(**arguments)


def test_without_dask_the_module_imports_and_the_start_says_what_to_install(tmp_path: Path) -> None:
    script = """
    import asyncio, sys
    sys.modules["distributed"] = None
    from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend
    from rhapsody.api.errors import BackendError
    try:
        asyncio.run(DaskExecutionBackend()._started())
    except BackendError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert "pip install" in done.stdout
    assert "conda" in done.stdout
    assert "spack" in done.stdout
