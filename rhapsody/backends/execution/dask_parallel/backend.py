"""The Dask backend: tasks as keys of a Dask cluster, on a laptop or over a batch system.

A burst of tasks becomes one graph; the scheduler reports in bursts which keys have completed, and
their results are gathered together. Two event loops take part, the backend's and the client's,
which are one where the client is asynchronous; a comment tells which one runs the functions below.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import uuid
from collections.abc import Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from rhapsody.backends.base import BaseExecutionBackend, Event, Task
from rhapsody.runtime.errors import BackendError, RhapsodyError

from .capacity import WorkerCapacity
from .connection import DaskConnection
from .messages import CompletedKey, Message
from .options import OPTIONS, check_options
from .task import DaskTask, PendingTasks, TaskResult

if TYPE_CHECKING:
    from .cancellation import TaskCanceller
    from .packing import TaskSerializer
    from .results import ResultGatherer
    from .submission import GraphSubmitter

__all__ = ["DaskExecutionBackend"]

logger = logging.getLogger(__name__)

# Tasks that are serialised per turn of the event loop.
_TASKS_PER_TURN = 256


class DaskExecutionBackend(BaseExecutionBackend):
    """Run functions and executables on a Dask cluster.

    Args:
        resources: keyword arguments of the `LocalCluster` that the backend starts if neither
            cluster nor client is given, such as `{"n_workers": 4, "memory_limit": "2GB"}`.
        cluster: any Dask cluster, synchronous or not, or the address of a scheduler. It stays
            open at shutdown.
        client: a `distributed.Client` of either kind. It stays open at shutdown.
        name: by which tasks choose this backend.
        security: `"tls"` encrypts a cluster that the backend starts, with temporary credentials,
            so that no other account of the machine can use it; None leaves it open on loopback.
            For an address a `distributed.Security`, or a dict of its TLS files (`tls_ca_file`,
            `tls_client_cert`, `tls_client_key`, `require_encryption`).
        worker_timeout: seconds that a task waits for a worker that can run it, if the cluster may
            still grow (adaptive, jobs queued, a worker restarting), and that all tasks wait if it
            has no worker at all; `math.inf` waits for ever.

    Raises:
        BackendError: an argument is of a wrong type, or contradicts another one.
        BackendError: when started: Dask is not installed, or the cluster cannot be reached or
            started, or its workers have no rhapsody.
    """

    kinds = frozenset({"function", "executable"})
    option_keys: ClassVar[frozenset[str]] = frozenset(OPTIONS)
    native_dependencies: ClassVar[bool] = True
    supports_implicit_data_linking: ClassVar[bool] = True
    supports_explicit_data_linking: ClassVar[bool] = True

    def __init__(
        self,
        resources: Mapping[str, Any] | None = None,
        cluster: Any = None,
        client: Any = None,
        name: str = "dask",
        *,
        security: Any = "tls",
        worker_timeout: float = 300.0,
    ) -> None:
        super().__init__(name)
        for problem in _problems(resources, cluster, client, worker_timeout):
            raise BackendError(problem, backend=name)
        self._plugin = f"rhapsody-{uuid.uuid4().hex[:12]}"  # and the topic of its messages
        self._connection = DaskConnection(name, resources, cluster, client, security)
        self._is_connected = False
        self._scheduler_watch: asyncio.Task[None] | None = None
        self._by_uid: dict[str, DaskTask] = {}  # on the backend's loop: whose end was not told yet
        self._pending = PendingTasks(self._report)  # on the client's loop: that were not settled
        self._capacity = WorkerCapacity(self._connection, self._pending, worker_timeout)
        # These need Dask, and so are made when the backend starts.
        self._serializer: TaskSerializer | None = None
        self._submitter: GraphSubmitter
        self._gatherer: ResultGatherer
        self._canceller: TaskCanceller

    @property
    def client(self) -> Any:
        """The `distributed.Client`; None before the start."""
        return self._connection.client_or_none

    # ------------------------------------------------------------------ start

    async def _start(self) -> None:
        await self._connection.open()
        from .cancellation import TaskCanceller
        from .packing import TaskSerializer
        from .results import ResultGatherer
        from .submission import GraphSubmitter

        connection, plugin, pending = self._connection, self._plugin, self._pending
        self._serializer = TaskSerializer(plugin, self._by_uid, lambda: self.work_dir)
        self._submitter = GraphSubmitter(connection, plugin, pending)
        self._gatherer = ResultGatherer(connection, pending, lambda: self.work_dir)
        self._canceller = TaskCanceller(connection, plugin, pending, self._gatherer)
        try:
            await connection.call(self._register_plugins)
        except BaseException:
            await connection.close()
            raise

    async def _register_plugins(self) -> None:
        """Install the plugins on the cluster, subscribe to what they report, watch the scheduler.

        On the client's loop.

        Raises:
            BackendError: scheduler or workers cannot import rhapsody, or the connection is broken.
        """
        from .scheduler_plugin import CompletionNotifier
        from .worker_plugin import TaskTracker

        client = self._connection.client
        self._is_connected = True
        try:
            client.subscribe_topic(self._plugin, self._on_event)
            await client.register_plugin(TaskTracker(self._plugin))
            await client.register_plugin(CompletionNotifier(self._plugin, client.id))
        except Exception as error:
            self._is_connected = False
            raise BackendError(
                f"backend '{self.name}' cannot set up the Dask cluster: {type(error).__name__}:"
                f" {error}; scheduler and workers need rhapsody, the same version as here",
                backend=self.name,
                transient=isinstance(error, OSError),
            ) from error
        if self._scheduler_watch is not None:
            self._scheduler_watch.cancel()
        self._scheduler_watch = asyncio.get_running_loop().create_task(self._watch_scheduler())

    async def _reconnect(self) -> None:
        """Register anew after the scheduler was lost, if the client has found one again.

        Raises:
            BackendError: it has not.
        """
        client = self._connection.client
        if client.status != "running":
            raise BackendError(
                f"the Dask scheduler was lost, and the client is {client.status}",
                backend=self.name,
                host=self._connection.scheduler_host,
                transient=client.status != "closed",
            )
        await self._connection.call(self._register_plugins)

    # ------------------------------------------------------------------ stop

    async def _stop(self) -> None:
        running = [task for task in self._by_uid.values() if task.key in self._pending]
        try:
            if self._is_connected:
                from .cancellation import STOP_TIMEOUT

                if running:
                    await self._try(self._canceller.stop(running), STOP_TIMEOUT)
                await self._try(self._connection.call(self._unregister_plugins), STOP_TIMEOUT)
        finally:
            await self._connection.close()
            if self._connection.has_closed_cluster:
                # Its worker processes have ended, and with them what could not be interrupted.
                self._pending.settle(TaskResult(task, "CANCELED") for task in running)
            if self._serializer is not None:
                self._serializer.close()
            if self._work_dir is not None and self.is_attached:
                with contextlib.suppress(OSError):  # a session's folder is removed if it is empty
                    os.rmdir(self._work_dir)
            await asyncio.sleep(0)  # what has been settled is delivered in the next turn

    async def _try(self, step: Coroutine[Any, Any, Any], timeout: float) -> None:
        """Await a step of the shutdown; if it fails or takes too long, the next one follows."""
        try:
            await asyncio.wait_for(step, timeout)
        except (OSError, asyncio.TimeoutError) as error:
            logger.warning("backend '%s' could not leave the Dask cluster: %r", self.name, error)

    async def _unregister_plugins(self) -> None:
        """Remove the plugins from a cluster that lives on. On the client's loop."""
        client = self._connection.client
        self._is_connected = False
        self._capacity.close()
        self._submitter.close()
        self._gatherer.close()
        if client.status == "running":
            await self._leave_event().set()
            if self._scheduler_watch is not None:
                await self._scheduler_watch
            client.unsubscribe_topic(self._plugin)
            await client.unregister_scheduler_plugin(self._plugin)
            if not self._connection.owns_cluster:
                await client.unregister_worker_plugin(self._plugin)

    # ---------------------------------------------------------------- on the client's loop: loss

    async def _watch_scheduler(self) -> None:
        """Wait for an event that is set only when we leave: before that any answer means a loss."""
        reason = "the connection was closed"
        try:
            await self._leave_event().wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # for a closed connection Dask raises various errors here
            reason = f"{type(error).__name__}: {error}"
        if self._is_connected:
            self._on_scheduler_lost(reason)

    def _leave_event(self) -> Any:
        """Return the `distributed.Event` of the plugin's name, which lives on the scheduler."""
        distributed: Any = importlib.import_module("distributed")
        return distributed.Event(self._plugin, client=self._connection.client)

    def _on_scheduler_lost(self, reason: str) -> None:
        """Fail all tasks: when the client reconnects, the scheduler does not know them any more."""
        self._is_connected = False
        self._submitter.close()
        self._pending.fail_all(
            BackendError(
                f"the Dask scheduler at {self._connection.scheduler_address} was lost ({reason})",
                backend=self.name,
                host=self._connection.scheduler_host,
                transient=True,
            )
        )

    # ------------------------------------------------------------------ submit and cancel

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        check_options(task, options)

    async def _submit(self, tasks: list[Task]) -> None:
        if not self._is_connected:
            await self._reconnect()
        serializer = self._serializer
        assert serializer is not None
        pickled: dict[int, bytes] = {}
        batch: list[DaskTask] = []
        for number, submitted in enumerate(tasks, start=1):
            try:
                task = serializer.serialize(submitted, pickled)
            except RhapsodyError as error:
                self.deliver(submitted, "FAILED", exception=error)
                continue
            self._by_uid[task.uid] = task
            batch.append(task)
            if number % _TASKS_PER_TURN == 0:
                await asyncio.sleep(0)
        try:
            await self._connection.call(self._submit_batch, batch)
        except Exception as error:  # the client's loop is closed
            for task in batch:
                self._pending.discard(task)
                self._by_uid.pop(task.uid, None)
            raise BackendError(
                f"the Dask client took no tasks: {type(error).__name__}: {error}",
                backend=self.name,
                transient=True,
            ) from error

    async def _cancel(self, task: Task) -> bool:
        found = self._by_uid.get(task["uid"])
        return found is not None and await self._canceller.cancel(found)

    # ---------------------------------------------------------------- on the client's loop: events

    async def _submit_batch(self, batch: list[DaskTask]) -> None:
        self._submitter.submit(batch)
        self._capacity.start_timer()

    def _on_event(self, event: tuple[float, Message]) -> None:
        """Handle a message of `CompletionNotifier` or of `TaskTracker`; Dask adds its time."""
        _, message = event
        if "running" in message:
            self._on_running(message["running"], message["worker"])
        if "worker_count" in message:
            self._capacity.update(message["worker_count"], message["advertised"])
        for key in message.get("runnable", ()):
            if (task := self._pending.get(key)) is not None:
                task.cancel_timer()
        for key in message.get("unrunnable", ()):
            if (task := self._pending.get(key)) is not None:
                self._capacity.on_unrunnable(task)
        if "completed" in message:
            self._gatherer.add(CompletedKey(*completed) for completed in message["completed"])

    def _on_running(self, keys: Iterable[str], worker: str) -> None:
        events: list[Event] = []
        for key in keys:
            if (task := self._pending.get(key)) is not None:
                task.worker = worker
                events.append(Event(task.submitted, "RUNNING"))
        if events:
            self.deliver_burst(events)

    def _report(self, results: list[TaskResult]) -> None:
        """Deliver results on the backend's loop, and then forget their tasks."""
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._deliver_results, results)
        except RuntimeError:  # the loop is closed, and nothing can be delivered any more
            self.dropped_events += len(results)

    # ------------------------------------------------------------------ on the backend's loop

    def _deliver_results(self, results: list[TaskResult]) -> None:
        self.deliver_burst([(task.submitted, state, fields) for task, state, fields in results])
        self._forget([result.task for result in results])

    def _forget(self, tasks: list[DaskTask]) -> None:
        """Drop tasks, and so their results on the cluster, when their owner was told their end.

        Until then it may still submit a child of one of them.
        """
        too_early, forgotten = [], []
        while tasks:  # no reference may stay here, see `drop`
            task = tasks.pop()
            if self._by_uid.get(task.uid) is not task:
                continue
            if task.uid in self._live:
                too_early.append(task)
                continue
            del self._by_uid[task.uid]
            task.parents = []
            forgotten.append(task)
            del task
        if too_early and self._loop is not None:
            self._loop.call_soon(self._forget, too_early)
        if forgotten:
            self._connection.drop(forgotten)


def _problems(resources: object, cluster: Any, client: Any, worker_timeout: object) -> list[str]:
    """Return what is wrong with the arguments of a backend, as far as is known without Dask."""
    problems = []
    if cluster is not None and client is not None:
        problems.append("give cluster= or client=, not both")
    if not isinstance(resources, (Mapping, type(None))) or not all(
        isinstance(name, str) for name in resources or ()
    ):
        problems.append(
            f"resources must be a dict of arguments of LocalCluster, such as {{'n_workers': 4}},"
            f" not {resources!r}"
        )
    elif resources and (cluster is not None or client is not None):
        problems.append(
            "resources are for a cluster that the backend starts; give them to your own when you"
            f" start it, not here: {resources!r}"
        )
    number = isinstance(worker_timeout, (int, float)) and not isinstance(worker_timeout, bool)
    if not (number and cast("float", worker_timeout) >= 0):  # NaN is not
        problems.append(f"worker_timeout must be seconds, 0 or more, not {worker_timeout!r}")
    return problems
