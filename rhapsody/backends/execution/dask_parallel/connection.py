"""Opens and closes the client and the cluster, and calls functions on the client's event loop.

Dask has two kinds of clients: a synchronous one has an event loop on a thread of its own, an
asynchronous one uses the caller's. `DaskConnection.call` runs a function on either loop and is
awaited on the caller's, so that the rest of the backend need not distinguish them.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

from rhapsody.backends.discovery import install_hint
from rhapsody.runtime.errors import BackendError

from .protocols import Client, Closable

__all__ = ["DaskConnection", "host_of", "is_reachable"]

T = TypeVar("T")

# Seconds for the client to connect, and for a cluster or client to close.
_CONNECT_TIMEOUT = 30.0
_CLOSE_TIMEOUT = 20.0


class DaskConnection:
    """Opens the cluster or client that the user described, or uses the one that was passed.

    It closes only what it has opened. For the arguments see `DaskExecutionBackend`.
    """

    def __init__(
        self,
        name: str,
        resources: Mapping[str, Any] | None,
        cluster: Any,
        client: Any,
        security: Any,
    ) -> None:
        self.name = name
        self.cluster = cluster
        self.owns_cluster = False
        #: whether a cluster that was opened here has been closed, and its workers have ended
        self.has_closed_cluster = False
        self._resources = dict(resources or {})
        self._given_client = client
        self._client: Client | None = None
        self._owns_client = False
        self._security = security

    # ------------------------------------------------------------------ open and close

    async def open(self) -> None:
        """Connect a client.

        Raises:
            BackendError: Dask is not installed, or the cluster cannot be reached or started.
        """
        try:
            import distributed
        except ImportError as error:
            raise BackendError(
                f"backend '{self.name}' needs Dask, which is not installed ({error});"
                f" install it with: {install_hint('dask')}",
                backend=self.name,
            ) from error
        try:
            await self._open(distributed)
        except BackendError:
            raise
        except Exception as error:  # a cluster manager may raise anything
            await self.close()
            raise BackendError(
                f"backend '{self.name}' cannot reach or start its Dask cluster:"
                f" {type(error).__name__}: {error}",
                backend=self.name,
                transient=isinstance(error, OSError),
            ) from error

    async def _open(self, distributed: Any) -> None:
        given = self._given_client
        if given is not None and not isinstance(given, str):
            if not isinstance(given, distributed.Client):
                raise BackendError(
                    f"client= must be a distributed.Client or an address, not {given!r}",
                    backend=self.name,
                )
            self._client = client = cast("Client", given)
            if client.status == "newly-created" and client.asynchronous:
                await cast("Awaitable[Client]", given)
            self.cluster = client.cluster
            return
        target: Any = given or self.cluster
        if target is None:
            target = self.cluster = await self._start_cluster(distributed)
        asynchronous = bool(getattr(target, "asynchronous", False))
        if asynchronous:
            # Starts a cluster that was only constructed. A synchronous one has started; it can be
            # awaited too, but would then do its work on a loop that is not its own.
            target = await target
        options: dict[str, Any] = {"set_as_default": False, "timeout": _CONNECT_TIMEOUT}
        if isinstance(target, str) and self._security is not None:
            options["security"] = self._address_security(distributed)
        if asynchronous:
            self._client = await distributed.Client(target, asynchronous=True, **options)
        else:
            self._client = await asyncio.to_thread(distributed.Client, target, **options)
        self._owns_client = True

    async def _start_cluster(self, distributed: Any) -> Any:
        import dask

        options = {"dashboard_address": "127.0.0.1:0", **self._resources}
        if "security" not in options and "protocol" not in options and self._security is not None:
            options["security"] = self._temporary_security(distributed)
            options["protocol"] = "tls"
        options.setdefault("resources", _worker_resources(options))
        # The HTTP pages of scheduler and workers have no access control: serve none, unless the
        # user asked for a dashboard.
        no_pages: dict[str, list[str]] = {
            f"distributed.{role}.http.routes": [] for role in ("scheduler", "worker")
        }
        with dask.config.set({} if "dashboard_address" in self._resources else no_pages):
            cluster = await asyncio.to_thread(distributed.LocalCluster, **options)
        self.owns_cluster = True
        return cluster

    def _temporary_security(self, distributed: Any) -> Any:
        if not isinstance(self._security, str):
            return self._security
        if self._security != "tls":
            raise BackendError(
                f"security= must be 'tls', a distributed.Security, a dict of TLS files, or None,"
                f" not {self._security!r}",
                backend=self.name,
            )
        try:
            return distributed.Security.temporary()
        except ImportError as error:
            raise BackendError(
                "temporary TLS credentials need the package 'cryptography';"
                f" {install_hint('dask')}, or pass security=None on a machine that you share with"
                " nobody",
                backend=self.name,
            ) from error

    def _address_security(self, distributed: Any) -> Any:
        if isinstance(self._security, str):
            return None  # "tls" means temporary credentials, for clusters that are started here
        if isinstance(self._security, Mapping):
            return distributed.Security(**self._security)
        return self._security

    async def close(self) -> None:
        """Close what was opened here; what the user passed stays open."""
        if self._owns_client and self._client is not None:
            await _close(self._client)
        if self.owns_cluster:
            await _close(self.cluster)
            self.has_closed_cluster = True
        self._owns_client = self.owns_cluster = False

    # ------------------------------------------------------------------ client and cluster

    @property
    def client(self) -> Client:
        """The client; to be read after `open` only."""
        assert self._client is not None
        return self._client

    @property
    def client_or_none(self) -> Client | None:
        """The client; None before `open`."""
        return self._client

    @property
    def scheduler_address(self) -> str:
        """`tcp://host:port`, or `(closed)`."""
        scheduler = self.client.scheduler
        return scheduler.address if scheduler is not None else "(closed)"

    @property
    def scheduler_host(self) -> str | None:
        """The host part of that, for errors."""
        return host_of(self.scheduler_address)

    async def call(
        self, function: Callable[..., Awaitable[T]], *args: object, **kwargs: object
    ) -> T:
        """Call a function on the client's loop, and await there what it returns."""

        async def on_client_loop() -> T:
            return await function(*args, **kwargs)

        loop = self.client.loop.asyncio_loop
        if loop is asyncio.get_running_loop():
            return await on_client_loop()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(on_client_loop(), loop))

    def drop(self, objects: list[Any]) -> None:
        """Empty a list on the client's loop, where futures in it are released at the least cost.

        Each that is released on another thread wakes the client's loop up.
        """
        try:
            self.client.loop.asyncio_loop.call_soon_threadsafe(objects.clear)
        except RuntimeError:  # the loop is closed
            objects.clear()

    def may_grow(self) -> bool:
        """Whether more workers may join, as far as the cluster object tells."""
        cluster = self.cluster
        if cluster is None or isinstance(cluster, str):
            return False
        # Read from distributed 2026.8: nothing public tells whether `adapt()` is on.
        if getattr(cluster, "_adaptive", None) is not None:
            return True
        return len(getattr(cluster, "plan", ())) > len(getattr(cluster, "observed", ()))


async def _close(opened: Closable) -> None:
    if opened.asynchronous:
        await opened.close(timeout=_CLOSE_TIMEOUT)
    else:
        await asyncio.to_thread(opened.close, timeout=_CLOSE_TIMEOUT)


def _worker_resources(options: Mapping[str, Any]) -> dict[str, float]:
    """Return what each worker of a `LocalCluster` with these options should advertise.

    Its threads and its memory limit in bytes, so that tasks with `Resources` count against them.
    This repeats how `LocalCluster` divides the machine, because workers have to be told when they
    start.
    """
    from dask.system import CPU_COUNT
    from dask.utils import parse_bytes
    from distributed.system import MEMORY_LIMIT

    default: Any = importlib.import_module("distributed.deploy.utils").nprocesses_nthreads
    threads = options.get("threads_per_worker")
    if threads is None:
        workers = options.get("n_workers")
        threads = max(1, CPU_COUNT // workers) if workers else default()[1]
    limit = options.get("memory_limit", "auto")
    if limit == "auto":
        memory = MEMORY_LIMIT * min(1.0, threads / CPU_COUNT)
    else:
        memory = parse_bytes(limit) if limit else MEMORY_LIMIT
    return {"CPU": threads, "MEMORY": int(memory)}


def host_of(address: str | None) -> str | None:
    """Return the host in `tcp://host:port`."""
    return address.rpartition("://")[2].rpartition(":")[0] if address else None


async def is_reachable(address: str, timeout: float = 2.0) -> bool:
    """Whether a worker's port accepts connections from here, within `timeout` seconds."""
    addressing: Any = importlib.import_module("distributed.comm.addressing")
    host, port = addressing.get_address_host_port(address)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
