"""The Dask backend's connection: a client on some cluster, and whose they are.

Dask's clients come in two kinds. A synchronous one has an event loop on a thread of its own; an
asynchronous one lives on the caller's loop. `DaskEngine.call` runs things where the client lives
and is awaited where the caller is, so that the backend is written once.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rhapsody.backends.discovery import install_hint
from rhapsody.runtime.errors import BackendError

# Seconds for a connection, and for a cluster or client to close.
_CONNECT = 30.0
_CLOSE = 20.0


class DaskEngine:
    """Opens what the user described, or uses what the user passed; closes only what it opened."""

    def __init__(
        self,
        name: str,
        resources: Mapping[str, Any] | None,
        cluster: Any,
        client: Any,
        security: Any,
    ) -> None:
        self.name = name
        self.resources = dict(resources or {})
        self.cluster = cluster
        self.client = client
        self.security = security
        self.owns_cluster = False
        self.owns_client = False
        self.owns_cluster_closed = False

    # ------------------------------------------------------------------ open and close

    async def open(self) -> None:
        """Have a connected client.

        Raises:
            BackendError: Dask is not installed, or there is no cluster to be had.
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
        except Exception as error:  # whatever a cluster manager raises, the user hears whose it is
            await self.close()
            raise BackendError(
                f"backend '{self.name}' cannot reach or start its Dask cluster:"
                f" {type(error).__name__}: {error}",
                backend=self.name,
                transient=isinstance(error, OSError),
            ) from error

    async def _open(self, distributed: Any) -> None:
        if self.client is not None and not isinstance(self.client, str):
            if not isinstance(self.client, distributed.Client):
                raise BackendError(
                    f"client= must be a distributed.Client or an address, not {self.client!r}",
                    backend=self.name,
                )
            if self.client.status == "newly-created" and self.client.asynchronous:
                await self.client
            self.cluster = self.client.cluster
            return
        target: Any = self.client or self.cluster
        if target is None:
            target = self.cluster = await self._local_cluster(distributed)
        asynchronous = bool(getattr(target, "asynchronous", False))
        if asynchronous:
            # Starts one that was only constructed. A synchronous one has started, and though it can
            # be awaited too, that would do its work on a loop that is not its own.
            target = await target
        options: dict[str, Any] = {"set_as_default": False, "timeout": _CONNECT}
        if isinstance(target, str) and self.security is not None:
            options["security"] = self._address_security(distributed)
        if asynchronous:
            self.client = await distributed.Client(target, asynchronous=True, **options)
        else:
            self.client = await asyncio.to_thread(distributed.Client, target, **options)
        self.owns_client = True

    async def _local_cluster(self, distributed: Any) -> Any:
        import dask

        options = {"dashboard_address": "127.0.0.1:0", **self.resources}
        if "security" not in options and "protocol" not in options and self.security is not None:
            options["security"] = self._temporary_security(distributed)
            options["protocol"] = "tls"
        options.setdefault("resources", _local_resources(options))
        # The pages of scheduler and workers know no credentials: none, unless they were asked for.
        asked = "dashboard_address" in self.resources
        pages: dict[str, list[str]] = {
            f"distributed.{role}.http.routes": [] for role in ("scheduler", "worker")
        }
        with dask.config.set({} if asked else pages):
            cluster = await asyncio.to_thread(distributed.LocalCluster, **options)
        self.owns_cluster = True
        return cluster

    def _temporary_security(self, distributed: Any) -> Any:
        if not isinstance(self.security, str):
            return self.security
        if self.security != "tls":
            raise BackendError(
                f"security= must be 'tls', a distributed.Security, a dict of TLS files, or None,"
                f" not {self.security!r}",
                backend=self.name,
            )
        try:
            return distributed.Security.temporary()
        except ImportError as error:
            raise BackendError(
                f"temporary TLS credentials need the package 'cryptography'; {install_hint('dask')},"
                " or pass security=None on a machine that you share with nobody",
                backend=self.name,
            ) from error

    def _address_security(self, distributed: Any) -> Any:
        if isinstance(self.security, str):
            return None  # temporary credentials are for clusters that we start
        if isinstance(self.security, Mapping):
            return distributed.Security(**self.security)
        return self.security

    async def close(self) -> None:
        """Close what we opened; what the user passed stays open."""
        client, cluster = self.client, self.cluster
        for owned, what in ((self.owns_client, client), (self.owns_cluster, cluster)):
            if owned:
                if what.asynchronous:
                    await what.close(timeout=_CLOSE)
                else:
                    await asyncio.to_thread(what.close, timeout=_CLOSE)
        self.owns_cluster_closed = self.owns_cluster
        self.owns_client = self.owns_cluster = False

    # ------------------------------------------------------------------ where the client lives

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop on which the client lives."""
        loop: asyncio.AbstractEventLoop = self.client.loop.asyncio_loop
        return loop

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function on the client's loop and await there what it returns."""

        async def there() -> Any:
            value = function(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value

        if self.loop is asyncio.get_running_loop():
            return await there()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there(), self.loop))

    # ------------------------------------------------------------------ what the cluster may become

    def may_grow(self) -> bool:
        """Whether workers may come that are not there yet, as far as the cluster object tells."""
        cluster = self.cluster
        if cluster is None or isinstance(cluster, str):
            return False
        # Read from distributed 2026.8: there is no public word for "adapt() is on".
        if getattr(cluster, "_adaptive", None) is not None:
            return True
        return len(getattr(cluster, "plan", ())) > len(getattr(cluster, "observed", ()))


def _local_resources(options: Mapping[str, Any]) -> dict[str, float]:
    """What each worker of a `LocalCluster` with these options should advertise.

    Its threads and its memory limit, so that tasks with `Resources` are counted against them. How
    Dask shares the machine out is repeated here, since the workers must be told when they start.
    """
    from dask.system import CPU_COUNT
    from dask.utils import parse_bytes
    from distributed.system import MEMORY_LIMIT

    share: Any = importlib.import_module("distributed.deploy.utils").nprocesses_nthreads
    threads = options.get("threads_per_worker")
    if threads is None:
        workers = options.get("n_workers")
        threads = max(1, CPU_COUNT // workers) if workers else share()[1]
    limit = options.get("memory_limit", "auto")
    if limit == "auto":
        memory = MEMORY_LIMIT * min(1.0, threads / CPU_COUNT)
    else:
        memory = parse_bytes(limit) if limit else MEMORY_LIMIT
    return {"CPU": threads, "MEMORY": int(memory)}


def host_of(address: str | None) -> str | None:
    """Return the host in `tcp://host:port`."""
    return address.rpartition("://")[2].rpartition(":")[0] if address else None


async def reachable(address: str, seconds: float = 2.0) -> bool:
    """Whether a worker's port takes connections from here, so that it can be asked directly."""
    addressing: Any = importlib.import_module("distributed.comm.addressing")
    host, port = addressing.get_address_host_port(address)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), seconds)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
