"""The part of Dask's classes that the backend uses, as types.

Releases of distributed are partly typed or not at all, and its client returns results or awaitables
by the thread that calls it. These are the signatures as seen on the client's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeVar

K = TypeVar("K")


class Addressed(Protocol):
    """Whatever listens on an address: `tcp://host:port`."""

    address: str


class Future(Protocol):
    """`distributed.Future`: keeps its key's result on the cluster while it exists."""

    @property
    def status(self) -> str:
        """`pending`, `finished`, `error`, `cancelled` or `lost`."""

    def exception(self) -> Awaitable[BaseException | None]:
        """Wait for the key, and return what it raised."""


class IOLoop(Protocol):
    """The tornado loop of a client."""

    asyncio_loop: asyncio.AbstractEventLoop


class Closable(Protocol):
    """A client or a cluster that the backend has opened."""

    asynchronous: bool

    def close(self, timeout: float) -> Any:
        """Return when it is closed; of an asynchronous one an awaitable of that."""


class Client(Closable, Protocol):
    """`distributed.Client`."""

    id: str
    status: str
    loop: IOLoop
    cluster: Any
    scheduler: Addressed | None

    def map(
        self,
        func: Callable[..., Any],
        *iterables: Sequence[object],
        key: list[str],
        pure: bool,
        resources: Mapping[str, float] | None,
        **options: Any,
    ) -> list[Future]:
        """Submit one key per element."""

    def gather(
        self, futures: dict[K, Future], errors: str, direct: bool
    ) -> Awaitable[dict[K, Any]]:
        """Fetch results."""

    def cancel(self, futures: list[Future]) -> Awaitable[None]:
        """Release keys, whether they have started or not."""

    def who_has(self, futures: list[Future]) -> Awaitable[Mapping[str, Sequence[str]]]:
        """Return the addresses of the workers that hold each result."""

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        workers: list[str] | None,
        on_error: str,
    ) -> Awaitable[dict[str, Any]]:
        """Call a function on workers, outside the task queue; returns its values by address."""

    def run_on_scheduler(self, function: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        """Call a function in the scheduler's process."""

    def subscribe_topic(self, topic: str, handler: Callable[[Any], None]) -> None:
        """Have `handler` called with each (time, event) of a topic."""

    def unsubscribe_topic(self, topic: str) -> None:
        """End that."""

    def register_plugin(self, plugin: object) -> Awaitable[Any]:
        """Install a plugin on the scheduler, or on all workers, by its class."""

    def unregister_scheduler_plugin(self, name: str) -> Awaitable[Any]:
        """Remove a plugin from the scheduler."""

    def unregister_worker_plugin(self, name: str) -> Awaitable[Any]:
        """Remove a plugin from all workers."""


class Worker(Addressed, Protocol):
    """`distributed.Worker`."""

    plugins: Mapping[str, object]
    data: Mapping[str, object]
    local_directory: str
    loop: IOLoop

    def log_event(self, topic: str, msg: object) -> None:
        """Send an event to the clients that have subscribed to its topic."""


class SchedulerTask(Protocol):
    """`distributed.scheduler.TaskState`."""

    state: str
    processing_on: Addressed | None


class SchedulerWorker(Protocol):
    """`distributed.scheduler.WorkerState`."""

    resources: dict[str, float]


class Scheduler(Protocol):
    """`distributed.Scheduler`, as a plugin in its process sees it."""

    tasks: Mapping[str, SchedulerTask]
    workers: Mapping[str, SchedulerWorker]
    clients: Mapping[str, object]
    plugins: Mapping[str, Any]
    handlers: MutableMapping[str, Callable[..., Any]]

    def log_event(self, topic: str, msg: object) -> None:
        """Send an event to the clients that have subscribed to its topic."""

    def remove_plugin(self, name: str) -> None:
        """Remove a plugin from this scheduler."""

    def unregister_worker_plugin(self, comm: None, name: str) -> Awaitable[Any]:
        """Remove a plugin from all workers."""
