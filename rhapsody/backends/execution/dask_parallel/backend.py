"""The Dask backend: tasks as keys of a Dask cluster, on a laptop or over a batch system.

A burst of tasks becomes one graph message; how its keys end comes back as one event per burst (see
`_dask_herald`), and the results are gathered together. This module has the backend;
`_dask_engine` the connection, `_dask_flight` what is kept of a task, `_dask_pack` and
`_dask_graphs` its way to Dask and `_dask_results` its way back, `_dask_stop` how it is stopped;
`_dask_worker` and `_dask_herald` run on workers and scheduler. It is long, because what is in
flight has one owner, on two loops.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import uuid
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from rhapsody.backends.base import BaseExecutionBackend, Event, Task
from rhapsody.runtime.errors import (
    BackendError,
    DependencyError,
    ResourceError,
    RhapsodyError,
)

from .cancellation import ANSWER, tell_to_stop
from .connection import DaskEngine, host_of
from .task import (
    DASK_KEYS,
    PROGRAM_KEYS,
    DaskTask,
    Ending,
    check_options,
    descent,
    describe,
    describe_all,
    fits,
)

if TYPE_CHECKING:
    from .packing import TaskSerializer
    from .results import ResultGatherer
    from .submission import GraphSubmitter

__all__ = ["DaskExecutionBackend"]

logger = logging.getLogger(__name__)

# Results gathered at once: bounds what is in flight to the client, and how long the first waits.
_GATHER_KEYS = 4096
_GATHER_BYTES = 64 << 20
# Tasks pickled per turn of the event loop.
_CHUNK = 256
# Seconds for a step of the shutdown: both rounds of telling the workers to stop, and some.
_STEP = 3 * ANSWER


class DaskExecutionBackend(BaseExecutionBackend):
    """Run functions and executables on a Dask cluster.

    Args:
        resources: what a `LocalCluster` that the backend starts takes (`{"n_workers": 4,
            "memory_limit": "2GB"}`), where neither cluster nor client is given.
        cluster: any Dask cluster, synchronous or not, or the address of a scheduler. It stays
            open at shutdown.
        client: a `distributed.Client` of either kind. It stays open at shutdown.
        name: by which tasks ask for this backend.
        security: `"tls"` encrypts a cluster that the backend starts, with temporary credentials,
            so that no other account of the machine can use it; None leaves it open on loopback.
            For an address a `distributed.Security`, or a dict of its TLS files (`tls_ca_file`,
            `tls_client_cert`, `tls_client_key`, `require_encryption`).
        worker_timeout: seconds that a task waits for a worker that can take it, where the cluster
            may still grow (adaptive, jobs queued, a worker restarting), and that all tasks wait
            where it has no worker at all; `math.inf` waits for ever.

    Raises:
        BackendError: an argument is of a wrong type, or at odds with another one.
        BackendError: when started: Dask is not installed, or the cluster cannot be reached or
            started, or its workers have no rhapsody.
    """

    kinds = frozenset({"function", "executable"})
    option_keys: ClassVar[frozenset[str]] = DASK_KEYS | PROGRAM_KEYS
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
        for wrong in _wrong_in(resources, cluster, client, worker_timeout):
            raise BackendError(wrong, backend=name)
        self._engine = DaskEngine(name, resources, cluster, client, security)
        self._worker_timeout = worker_timeout
        self._plugin = f"rhapsody-{uuid.uuid4().hex[:12]}"
        # By uid, on the loop of the backend; by key, on the loop of the client. A key that is
        # popped is settled by who popped it.
        self._by_uid: dict[str, DaskTask] = {}
        self._flights: dict[str, DaskTask] = {}
        self._ended: list[tuple[str, str, float, int]] = []
        self._gathers: set[asyncio.Task[None]] = set()
        self._gathering = 0  # how many of them have not seen that there is no more
        self._watch: asyncio.Task[None] | None = None
        self._connected = False
        self._offers: list[dict[str, float]] = []
        self._seen_offers: dict[str, dict[str, float]] = {}
        self._workers = -1  # how many there are; not known yet
        self._no_workers: asyncio.TimerHandle | None = None
        self._to_cancel: dict[DaskTask, asyncio.Future[bool]] = {}
        self._stops: set[asyncio.Task[None]] = set()
        self._packer: TaskSerializer | None = None
        self._graphs: GraphSubmitter
        self._reader: ResultGatherer

    @property
    def client(self) -> Any:
        """The `distributed.Client`; None before the start."""
        return self._engine.client

    # ------------------------------------------------------------------ lifecycle

    async def _start(self) -> None:
        await self._engine.open()
        # These need Dask, which is there only now.
        from .packing import TaskSerializer
        from .results import ResultGatherer
        from .submission import GraphSubmitter

        self._packer = TaskSerializer(self._plugin, self._by_uid, lambda: self.work_dir)
        self._graphs = GraphSubmitter(
            self.name, self._engine, self._plugin, self._flights, self._settle
        )
        self._reader = ResultGatherer(self.name, self._engine, lambda: self.work_dir)
        try:
            await self._connect()
        except BaseException:
            await self._engine.close()
            raise

    async def _connect(self) -> None:
        """Put our plugins on the cluster, and listen."""
        from .scheduler_plugin import CompletionNotifier
        from .worker_plugin import TaskTracker

        client, call = self._engine.client, self._engine.call
        self._connected = True
        try:
            await call(client.subscribe_topic, self._plugin, self._on_news)
            await call(client.register_plugin, TaskTracker(self._plugin))
            await call(client.register_plugin, CompletionNotifier(self._plugin, client.id))
        except Exception as error:
            self._connected = False
            raise BackendError(
                f"backend '{self.name}' cannot set up the Dask cluster: {type(error).__name__}:"
                f" {error}; scheduler and workers need rhapsody, the same version as here",
                backend=self.name,
                transient=isinstance(error, OSError),
            ) from error
        await call(self._start_watch)

    def _start_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = asyncio.get_running_loop().create_task(self._watch_scheduler())

    async def _watch_scheduler(self) -> None:
        """Wait on the scheduler for what never comes: any answer means that it has gone."""
        why = "the connection was closed"
        try:
            await self._farewell().wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a closed connection has many names here
            why = f"{type(error).__name__}: {error}"
        if self._connected:
            self._lose(f"the Dask scheduler at {self._address()} was lost ({why})")

    def _farewell(self) -> Any:
        """The event on the scheduler that we set when we leave."""
        distributed: Any = importlib.import_module("distributed")
        return distributed.Event(self._plugin, client=self._engine.client)

    def _address(self) -> str:
        scheduler = self._engine.client.scheduler
        return str(scheduler.address) if scheduler is not None else "(closed)"

    def _lose(self, message: str) -> None:
        """Fail everything in flight: the scheduler knows nothing of it any more."""
        self._connected = False
        self._graphs.close()
        self._fail_all(message)

    def _host(self) -> str | None:
        return host_of(self._address())

    async def _stop(self) -> None:
        live = [flight for flight in self._by_uid.values() if flight.key in self._flights]
        try:
            if self._connected:
                if live:
                    await self._try(self._stop_flights(live))
                await self._try(self._engine.call(self._leave))
        finally:
            await self._engine.close()
            if self._engine.owns_cluster_closed:
                # Its worker processes have ended, and with them what could not be interrupted.
                left = [f for f in live if self._flights.pop(f.key, None) is not None]
                self._settle([(flight, "CANCELED", None) for flight in left])
            if self._packer is not None:
                self._packer.close()
            if self._work_dir is not None and self.is_attached:
                with contextlib.suppress(OSError):  # only an empty folder of a session is litter
                    os.rmdir(self._work_dir)
            await asyncio.sleep(0)  # what has been settled is handed back in the next turn

    async def _try(self, step: Coroutine[Any, Any, Any]) -> None:
        """Take a step of the shutdown, in bounded time; the next is taken in any case."""
        try:
            await asyncio.wait_for(step, _STEP)
        except (OSError, asyncio.TimeoutError) as error:
            logger.warning("backend '%s' could not take leave of Dask: %r", self.name, error)

    async def _leave(self) -> None:
        """Take our plugins off a cluster that lives on. On the client's loop."""
        client = self._engine.client
        self._connected = False
        if self._no_workers is not None:
            self._no_workers.cancel()
        self._graphs.close()
        for gather in self._gathers:
            gather.cancel()
        if client.status == "running":
            await self._farewell().set()
            if self._watch is not None:
                await self._watch
            client.unsubscribe_topic(self._plugin)
            await client.unregister_scheduler_plugin(self._plugin)
            if not self._engine.owns_cluster:
                await client.unregister_worker_plugin(self._plugin)

    # ------------------------------------------------------------------ submit

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        check_options(task, options)

    async def _submit(self, tasks: list[Task]) -> None:
        if not self._connected:
            await self._reconnect()
        packer = self._packer
        assert packer is not None
        pickled: dict[int, bytes] = {}
        flights: list[DaskTask] = []
        for number, task in enumerate(tasks):
            try:
                flight = packer.pack(task, pickled)
            except RhapsodyError as error:
                self.deliver(task, "FAILED", exception=error)
                continue
            self._by_uid[flight.uid] = flight
            flights.append(flight)
            if number % _CHUNK == _CHUNK - 1:
                await asyncio.sleep(0)
        try:
            await self._engine.call(self._launch, flights)
        except Exception as error:  # the client's loop is closed
            for flight in flights:
                self._flights.pop(flight.key, None)
                self._by_uid.pop(flight.uid, None)
            raise BackendError(
                f"the Dask client took no tasks: {type(error).__name__}: {error}",
                backend=self.name,
                transient=True,
            ) from error

    async def _reconnect(self) -> None:
        """Set up again after the scheduler was lost, if its client has found one.

        Raises:
            BackendError: there is none.
        """
        client = self._engine.client
        if client.status != "running":
            raise BackendError(
                f"the Dask scheduler was lost, and the client is {client.status}",
                backend=self.name,
                host=self._host(),
                transient=client.status != "closed",
            )
        await self._connect()

    # ---------------------------------------------------------------- on the client's loop: submit

    def _launch(self, flights: list[DaskTask]) -> None:
        self._graphs.launch(flights)
        if not self._workers:
            self._arm_no_workers()

    # ------------------------------------------------------------------ on the client's loop: news

    def _on_news(self, event: tuple[float, dict[str, Any]]) -> None:
        """Take what `CompletionNotifier` and `TaskTracker` tell."""
        news = event[1]
        if "running" in news:
            self._on_running(news["running"], news["worker"])
            return
        if "workers" in news:
            self._on_workers(news["workers"], news["offers"])
        for key in news.get("unstuck", ()):
            if (flight := self._flights.get(key)) is not None:
                flight.stop_timer()
        for key in news.get("stuck", ()):
            if (flight := self._flights.get(key)) is not None:
                self._on_stuck(flight)
        if "ended" in news:
            self._ended += news["ended"]
            self._start_gather()

    def _start_gather(self) -> None:
        # One beside the one that runs: what comes in between goes together.
        if self._gathering < 2:
            self._gathering += 1
            gather = asyncio.get_running_loop().create_task(self._gather())
            self._gathers.add(gather)
            gather.add_done_callback(self._gathers.discard)

    def _on_running(self, keys: Iterable[str], worker: str) -> None:
        events: list[Event] = []
        for key in keys:
            if (flight := self._flights.get(key)) is not None:
                flight.worker = worker
                events.append(Event(flight.task, "RUNNING"))
        if events:
            self.deliver_burst(events)

    def _on_workers(self, count: int, offers: list[dict[str, float]]) -> None:
        self._workers = count
        self._offers = offers
        self._seen_offers.update({repr(offer): offer for offer in offers})
        if count and self._no_workers is not None:
            self._no_workers.cancel()
            self._no_workers = None
        elif not count and self._flights:
            self._arm_no_workers()

    def _arm_no_workers(self) -> None:
        if self._no_workers is None:
            loop = asyncio.get_running_loop()
            self._no_workers = loop.call_later(self._worker_timeout, self._give_up_all)

    def _give_up_all(self) -> None:
        self._no_workers = None
        self._fail_all(
            f"the Dask cluster at {self._address()} has had no worker for"
            f" {self._worker_timeout:g} s (worker_timeout=)"
        )

    def _fail_all(self, message: str) -> None:
        flights = list(self._flights.values())
        self._flights.clear()
        error = BackendError(message, backend=self.name, host=self._host(), transient=True)
        self._settle([(flight, "FAILED", {"exception": error}) for flight in flights])

    def _on_stuck(self, flight: DaskTask) -> None:
        """No worker may take it: fail it, unless one may yet come."""
        named = flight.options.get("workers")
        if not self._workers or not (flight.wants or named):
            return  # there was no worker at all, and the clock of all tasks runs
        lost = not named and any(fits(flight.wants, o) for o in self._seen_offers.values())
        if lost or self._engine.may_grow():
            if flight.timer is None:
                loop = asyncio.get_running_loop()
                flight.timer = loop.call_later(self._worker_timeout, self._give_up, flight)
        else:
            self._give_up(flight)

    def _give_up(self, flight: DaskTask) -> None:
        waited = f" within {self._worker_timeout:g} s" if flight.timer is not None else ""
        flight.timer = None
        if self._flights.pop(flight.key, None) is None:
            return
        need = describe(flight.wants) if flight.wants else "one of the workers that it names"
        restriction = flight.options.get("workers")
        where = f" on workers={restriction!r}" if restriction else ""
        error = ResourceError(
            f"task '{flight.uid}' asks for {need}{where}, and no worker of the cluster could take"
            f" it{waited}; its {self._workers} workers advertise {describe_all(self._offers)}"
        )
        self._settle([(flight, "FAILED", {"exception": error})])

    # ---------------------------------------------------------------- on the client's loop: results

    async def _gather(self) -> None:
        """Fetch and deliver the results of what has ended, until there is no more."""
        try:
            while self._ended:
                await self._gather_some()
        finally:
            # In the turn in which there was no more, or news in between would wait for ever.
            self._gathering -= 1

    async def _gather_some(self) -> None:
        flights: list[DaskTask] = []
        endings: list[Ending] = []
        news, size = self._take()
        for item in news:
            key, word, seconds, _ = item
            flight = self._flights.get(key)
            if flight is None:
                continue
            flight.seconds = seconds
            if word == "memory":
                flights.append(flight)
            elif flight.is_stopping():
                flight.held = item  # its worker says what it means
            else:
                endings.append(await self._reader.failure(flight, word))
        endings += await self._reader.results(flights, size)
        self._settle([e for e in endings if self._flights.pop(e[0].key, None) is not None])

    def _take(self) -> tuple[list[tuple[str, str, float, int]], int]:
        """Take as many ends as may be fetched together; returns their bytes, too."""
        size = 0
        for count, (_, _, _, nbytes) in enumerate(self._ended):
            if count == _GATHER_KEYS or (size and size + nbytes > _GATHER_BYTES):
                break
            size += nbytes
        else:
            count = len(self._ended)
        taken, self._ended = self._ended[:count], self._ended[count:]
        return taken, size

    def _settle(self, endings: Sequence[Ending]) -> None:
        """Report ends, and let go of the flights when their owner has heard."""
        if not endings:
            return
        for flight, _, _ in endings:
            flight.stop_timer()
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._hand_back, endings)
        except RuntimeError:  # the loop is closed, and nobody is left to hear of it
            self.dropped_events += len(endings)

    def _hand_back(self, endings: Sequence[Ending]) -> None:
        self.deliver_burst([(flight.task, state, fields) for flight, state, fields in endings])
        self._forget([flight for flight, _, _ in endings])

    def _forget(self, flights: list[DaskTask]) -> None:
        """Let go of flights, and so of their results on the cluster.

        Until the owner has heard of a parent's end, it may still hand over a child of it.
        """
        early = []
        for flight in flights:
            if self._by_uid.get(flight.uid) is not flight:
                continue
            if flight.uid in self._live:
                early.append(flight)
                continue
            del self._by_uid[flight.uid]
            flight.parents = []
        if early and self._loop is not None:
            self._loop.call_soon(self._forget, early)

    # ------------------------------------------------------------------ cancel

    async def _cancel(self, task: Task) -> bool:
        flight = self._by_uid.get(task["uid"])
        if flight is None:
            return False
        # All that are canceled in one turn of the loop go to the workers together.
        if not self._to_cancel:
            asyncio.get_running_loop().call_soon(self._spawn_stop)
        if flight not in self._to_cancel:
            self._to_cancel[flight] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._to_cancel[flight])

    def _spawn_stop(self) -> None:
        asked, self._to_cancel = self._to_cancel, {}
        task = asyncio.get_running_loop().create_task(self._answer(asked))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _answer(self, asked: dict[DaskTask, asyncio.Future[bool]]) -> None:
        stopped: set[DaskTask] = set()
        try:
            stopped = await self._stop_flights(list(asked))
        except (OSError, asyncio.TimeoutError) as error:
            logger.warning("backend '%s' could not cancel: %r", self.name, error)
        finally:
            for flight, future in asked.items():
                if not future.done():
                    future.set_result(flight in stopped)

    async def _stop_flights(self, flights: list[DaskTask]) -> set[DaskTask]:
        """Stop calls wherever they are; returns those that are known not to run any more.

        Every worker is asked: one that has not started a call will now refuse it, so that none can
        slip through while it moves from worker to worker.
        """
        keys = [flight.key for flight in flights]
        for flight in flights:
            flight.stopping = True
        try:
            words = await tell_to_stop(self._engine, self._plugin, keys)
        except BaseException:
            await self._engine.call(self._resume, flights)
            raise
        stopped = [f for f in flights if words[f.key] <= {"stopped", "absent"}]
        dropped: set[DaskTask] = await self._engine.call(self._drop, stopped)
        await self._engine.call(self._resume, [f for f in flights if f not in dropped])
        return dropped

    def _resume(self, flights: list[DaskTask]) -> None:
        """Flights that were not stopped after all: what came of them meanwhile counts."""
        for flight in flights:
            flight.stopping = False
        for flight in descent(flights):
            if flight.held is not None:
                self._ended.append(flight.held)
                flight.held = None
        if self._ended:
            self._start_gather()

    async def _drop(self, stopped: list[DaskTask]) -> set[DaskTask]:
        """Take stopped calls out of Dask, and their children. On the client's loop."""
        mine = [f for f in stopped if self._flights.pop(f.key, None) is not None]
        if not mine:
            return set()
        endings: list[Ending] = [(flight, "CANCELED", None) for flight in mine]
        dropped = set(mine)
        for child in descent(mine):
            if self._flights.pop(child.key, None) is not None:
                parent = next((p for p in child.parents if p in dropped), child.parents[0])
                dropped.add(child)
                child.failure = DependencyError(child.uid, parent.uid, parent.failure)
                endings.append((child, "FAILED", {"exception": child.failure}))
        await self._engine.client.cancel([flight.future for flight, _, _ in endings])
        self._settle(endings)
        return set(mine)


def _wrong_in(resources: object, cluster: Any, client: Any, worker_timeout: object) -> list[str]:
    """What is wrong with the arguments of a backend, as far as it can be told without Dask."""
    wrong = []
    if cluster is not None and client is not None:
        wrong.append("give cluster= or client=, not both")
    if not isinstance(resources, (Mapping, type(None))) or not all(
        isinstance(name, str) for name in resources or ()
    ):
        wrong.append(
            f"resources must be a dict of what LocalCluster takes, such as {{'n_workers': 4}},"
            f" not {resources!r}"
        )
    elif resources and (cluster is not None or client is not None):
        wrong.append(
            "resources are for a cluster that the backend starts; give them to your own when you"
            f" start it, not here: {resources!r}"
        )
    number = isinstance(worker_timeout, (int, float)) and not isinstance(worker_timeout, bool)
    if not (number and cast("float", worker_timeout) >= 0):  # NaN is not
        wrong.append(f"worker_timeout must be seconds, 0 or more, not {worker_timeout!r}")
    return wrong
