"""Tasks on Dragon, on one node or several: functions and executables in its workers, MPI jobs.

The work is shared with modules beside this one: `runtime` finds or starts the runtime,
`task` checks tasks and makes orders of them, `batch` holds the Batches and the
threads that wait for Dragon, `results` reads what they hear, `node.worker` is what runs on
the nodes. This one is on the event loop, and decides what becomes of a task: one life cycle with
all its ends, which is why it is longer than others.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

from rhapsody.backends.base import BaseExecutionBackend, Event, Task
from rhapsody.runtime.errors import (
    BackendError,
    RhapsodyError,
    TaskTimeoutError,
    WorkerLostError,
)

from .batch import BatchExecutor, NodeAgents
from .node.worker import GRACE, RunContext
from .options import OPTIONS, check_options
from .results import RankFiles, job_end, read_end, read_news
from .runtime import Runtime, on_thread
from .task import DragonTask, Planner

__all__ = ["DragonExecutionBackend", "DragonExecutionBackendV3"]

logger = logging.getLogger(__name__)

_OPEN = 120.0  # seconds for agents and a Batch to come up: 2 to 10 s on an idle machine
_CLOSE = 20.0  # seconds for a Batch to be terminated
_ANSWER = 10.0  # seconds for Dragon, or the agents, to take a request
_RESULT = 5.0  # seconds for the result of a process that has ended with exit code 0
_CHECK_EVERY = 1.0  # seconds between two looks at the beats
# What earlier releases had, and what does it now.
_REMOVED = {
    "num_workers": "batch_kwargs={'workers_per_node': n}",
    "disable_background_batching": "nothing: tasks always travel in bursts",
    "disable_batch_submission": "nothing: tasks always travel in bursts",
    "disable_telemetry": "batch_kwargs={'disable_telem': True}",
    "working_directory": "Session(work_dir=...), or cwd in task_backend_specific_kwargs",
    "resources": "num_nodes=, and batch_kwargs={'workers_per_node': n}",
}


class DragonExecutionBackendV3(BaseExecutionBackend):
    """Runs tasks on Dragon's `Batch`.

    Under `dragon` or `rhapsody launch --dragon` it uses the runtime that is there. A program that
    was started by itself gets a runtime of its own, on this node, which ends with the backend.

    Args:
        name: by which tasks ask for this backend.
        num_nodes: how many nodes of the runtime to use; None for all.
        pool_nodes: taken, and left to Dragon, which gives each node a pool of its own.
        batch_kwargs: further arguments of `dragon.workflows.batch.Batch`, such as
            `workers_per_node` (by default as many as Batch and this machine's grant allow).
        node_timeout: seconds without a sign of life after which a node is taken for lost.

    Keys of `task_backend_specific_kwargs`: `process_template`, a dict of `cwd`, `env`, `stdin`,
    `stdout`, `stderr`, `policy` and `options` for a process that Dragon starts for this task;
    `process_templates`, a list of `(number of ranks, dict)` for a job of several; `pmi`, `"pmix"`
    (the default of jobs), `"cray"` or None; `isolated: True`, a function in a process of its own;
    `timeout` in seconds; and for an executable without these `cwd`, `env`, `env_replace`, `shell`
    and `stdin`, as on the local backend.

    A function of several ranks returns the list of what its ranks returned.

    Raises:
        BackendError: an argument is wrong; when started: Dragon is not there or does not come up.
    """

    kinds = frozenset({"function", "executable"})
    option_keys: ClassVar[frozenset[str]] = frozenset(OPTIONS)
    takes_plain_functions = True

    def __init__(
        self,
        name: str | Mapping[str, Any] = "dragon",
        num_nodes: int | None = None,
        pool_nodes: int | None = None,
        batch_kwargs: Mapping[str, Any] | None = None,
        *,
        node_timeout: float = 15.0,
        **removed: Any,
    ) -> None:
        if not isinstance(name, str):  # as 0.6 had it: DragonExecutionBackend({...})
            batch_kwargs, name = name, "dragon"
        super().__init__(name)
        _refuse(name, num_nodes, batch_kwargs, node_timeout, removed)
        self._num_nodes = num_nodes
        self._batch_kwargs = {**(batch_kwargs or {})}
        self._node_timeout = node_timeout
        self._runtime = Runtime(name, num_nodes)
        self._post: NodeAgents | None = None
        self._crew: BatchExecutor | None = None  # the one that gets new tasks
        self._crews: dict[int, BatchExecutor] = {}
        self._numbers = 0
        self._changes: set[asyncio.Task[Any]] = set()  # crews that come and go
        self._pending: list[DragonTask] = []  # while there is no crew
        self._flights: dict[int, DragonTask] = {}
        self._by_uid: dict[str, DragonTask] = {}
        self._empty: asyncio.Event
        self._work: set[asyncio.Task[Any]] = set()
        self._checker: asyncio.TimerHandle | None = None
        self._checked = 0.0
        self._broken: BackendError | None = None
        self._ddicts: list[Any] = []
        # (crew, number): the hosts that have not answered, what runs there, and when all have
        self._revoking: dict[tuple[int, int | None], _Inquiry] = {}
        self._planner = Planner(lambda: self.work_dir)

    # ------------------------------------------------------------------ lifecycle

    async def _start(self) -> None:
        await self._runtime.open()
        self._empty = asyncio.Event()
        self._empty.set()
        self._post = self._new_post()
        try:
            await on_thread(self._post.open, self._num_nodes, timeout=_OPEN)
            await self._renew()
        except BaseException as error:
            self._post.abandon()
            await self._runtime.close()
            if isinstance(error, (asyncio.CancelledError, BackendError)):
                raise
            raise BackendError(
                f"backend '{self.name}' cannot set up Dragon: {type(error).__name__}: {error}",
                backend=self.name,
            ) from error
        self._check_beats()

    def _new_post(self) -> NodeAgents:
        return NodeAgents(self._from_post)

    def _new_crew(self, number: int, site: RunContext) -> BatchExecutor:
        return BatchExecutor(number, site, self._from_crew)

    async def _renew(self) -> None:
        """Make a crew, which gets the tasks from now on."""
        assert self._post is not None
        self._numbers += 1
        crew = self._new_crew(self._numbers, self._post.site)
        try:
            await on_thread(
                crew.open, self._num_nodes, self._post.places, self._batch_kwargs, timeout=_OPEN
            )
        except BaseException:
            if self._broken is None:
                crew.give_up()
            else:
                crew.abandon()
            raise
        self._crews[crew.number] = self._crew = crew
        pending, self._pending = self._pending, []
        self._hand_over(pending)

    async def _stop(self) -> None:
        if self._checker is not None:
            self._checker.cancel()
        if self._broken is None:
            if self._changes:  # a Batch that nobody ends keeps the program from ending
                await asyncio.wait(self._changes, timeout=_CLOSE)
            children = [f for f in self._by_uid.values() if f.begun and not f.is_function]
            await asyncio.gather(*(self._stop_flight(flight) for flight in children))
        try:
            for crew in list(self._crews.values()):
                await self._close_crew(crew)
            if self._broken is None:
                await self._try(self._close_rest, "take leave of Dragon")
        finally:
            if self._post is not None:
                self._post.abandon()
            for work in (*self._work, *self._changes):
                work.cancel()
            await self._runtime.close()
            if self._work_dir is not None and self.is_attached:
                with contextlib.suppress(OSError):  # only an empty folder of a session is litter
                    os.rmdir(self._work_dir)

    def _close_rest(self) -> None:
        for ddict in self._ddicts:
            ddict.destroy()
        if self._post is not None:
            self._post.close()

    async def _close_crew(self, crew: BatchExecutor) -> None:
        """End a Batch; what it still ran has ended with its workers."""
        self._crews.pop(crew.number, None)
        if self._broken is not None:
            crew.abandon()
            return
        if await self._try(crew.close, "end a Batch"):
            for flight in self._of(crew):
                self._finish(flight, "CANCELED", {})

    async def _try(self, step: Any, words: str) -> bool:
        """Take a step of the shutdown, in bounded time; the next is taken in any case."""
        try:
            await on_thread(step, timeout=_CLOSE)
        except Exception as error:  # Dragon's own, of any class; nobody can do anything about it
            logger.warning("backend '%s' could not %s: %r", self.name, words, error)
            return False
        return True

    # ------------------------------------------------------------------ what only Dragon has

    async def fence(self) -> None:
        """Wait until every task that was submitted so far has ended."""
        await self._started()
        await self._empty.wait()
        self._flush()  # or their owner would not have heard of them yet

    async def create_ddict(self, *args: Any, **kwargs: Any) -> Any:
        """Make a `dragon.data.ddict.DDict`, which tasks may share; destroyed at shutdown."""
        await self._started()
        module: Any = importlib.import_module("dragon.data.ddict")
        ddict = await on_thread(lambda: module.DDict(*args, **kwargs), timeout=_OPEN)
        self._ddicts.append(ddict)
        return ddict

    def topology(self) -> dict[str, dict[str, Any]]:
        """Return, for each node by host name, its `workers`, `cores` (as Batch counts) and `gpus`.

        Raises:
            BackendError: the backend is not started.
        """
        if self._post is None or self._crew is None:
            raise BackendError(f"backend '{self.name}' is not started", backend=self.name)
        return {
            host: {
                "workers": self._crew.workers.get(host, 0),
                "cores": cores,
                "gpus": list(self._post.nodes.gpus.get(host, ())),
            }
            for host, cores in self._post.nodes.cores.items()
        }

    # ------------------------------------------------------------------ submit

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        nodes = self._post.nodes if self._post is not None else None
        check_options(task, options, nodes)

    async def _submit(self, tasks: list[Task]) -> None:
        if self._broken is not None:
            raise self._broken
        pickled: dict[int, bytes] = {}
        flights: list[DragonTask] = []
        for task in tasks:
            try:
                flight = self._planner.plan(task, pickled)
            except RhapsodyError as error:
                self.deliver(task, "FAILED", exception=error)
                continue
            self._flights[flight.number] = self._by_uid[flight.uid] = flight
            flights.append(flight)
        if flights:
            assert self._post is not None
            self._empty.clear()
            self._post.busy.set()
            self._hand_over(flights)

    def _hand_over(self, flights: list[DragonTask]) -> None:
        if self._crew is None:
            self._pending += flights
            return
        for flight in flights:
            flight.crew = self._crew
        self._crew.submit(flights)

    # ------------------------------------------------------------------ news from the nodes

    def _from_post(self, news: list[tuple[Any, ...]]) -> None:
        """On the post's thread: unpickle results there, then wake the loop once."""
        now = time.monotonic()
        told = [read_news(one, now) for one in news if one[0] not in ("beat", "facts")]
        if told:
            self._on_loop(self._on_news, told)

    def _on_loop(self, function: Any, *args: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(function, *args)

    def _on_news(self, news: list[tuple[Any, ...]]) -> None:
        burst: deque[Event] = deque()
        for word, number, *rest in news:
            if word == "revoked":
                self._on_answer(number, *rest)
                continue
            flight = self._flights.get(number)
            if word == "lost":
                self._on_lost(flight, *rest)
            elif flight is None:
                continue
            elif word == "ended":
                state, fields, flight.host = rest
                if (event := self._end(flight, state, fields)) is not None:
                    burst.append(event)
            elif word == "begun":
                self._begin(flight, rest[0])
            elif word == "rank":
                rank, said = rest
                flight.rank_ends[rank] = read_end(said)
                self._try_job(flight)
        self.deliver_burst(burst)

    def _begin(self, flight: DragonTask, host: str | None) -> None:
        if flight.begun:
            return
        flight.begun, flight.host = True, host
        flight.started = time.monotonic()
        self.deliver(flight.task, "RUNNING", started=flight.started)
        options = flight.task.get("task_backend_specific_kwargs") or {}
        if (timeout := options.get("timeout")) is not None:
            assert self._loop is not None
            flight.timer = self._loop.call_later(timeout, self._spawn, self._time_out, flight)

    def _end(self, flight: DragonTask, state: str, fields: dict[str, Any]) -> Event | None:
        """Take a flight off the lists and return its event; None where it had ended before."""
        if flight.ended:
            return None
        flight.ended = True
        self._flights.pop(flight.number, None)
        if self._by_uid.get(flight.uid) is flight:
            del self._by_uid[flight.uid]
        if flight.timer is not None:
            flight.timer.cancel()
        if isinstance(flight.call, str):
            with contextlib.suppress(OSError):  # who needs it no more does not fail for it
                os.unlink(flight.call)
        if flight.stopping is not None and not flight.stopping.done():
            flight.stopping.set_result(state == "CANCELED")
        if state == "CANCELED" and flight.overdue is not None:
            state, fields = "FAILED", {"exception": TaskTimeoutError(flight.uid, flight.overdue)}
        if not self._flights:
            self._empty.set()
            if self._post is not None:
                self._post.busy.clear()
        crew = flight.crew
        if crew is not None and crew.retired:
            self._leave_if_idle(crew)
        return Event(flight.task, state, fields)

    def _finish(self, flight: DragonTask, state: str, fields: dict[str, Any]) -> None:
        if (event := self._end(flight, state, fields)) is not None:
            self.deliver_burst([event])

    # ------------------------------------------------------------------ news from a crew

    def _from_crew(
        self, crew: BatchExecutor, flight: DragonTask | None, word: str, value: Any
    ) -> None:
        self._on_loop(self._on_crew, crew, flight, word, value)

    def _on_crew(
        self, crew: BatchExecutor, flight: DragonTask | None, word: str, value: Any
    ) -> None:
        if flight is None:
            self._on_broken(crew, value)
        elif flight.crew is not crew:  # it was given to another one
            return
        elif word == "begun":
            self._begin(flight, None)
        elif word == "cancelled" or type(value).__name__ == "Revoked":
            self._finish(flight, "CANCELED", {})
        elif word == "exited":
            flight.codes = value if isinstance(value, list) else [value]
            self._try_job(flight)
        else:  # refused at submit, or failed in a way that is not the task's own
            error = BackendError(
                f"Dragon {'refused' if word == 'refused' else 'gave up'} task '{flight.uid}':"
                f" {type(value).__name__}: {value}",
                backend=self.name,
            )
            error.__cause__ = value
            self._finish(flight, "FAILED", {"exception": error})

    def _try_job(self, flight: DragonTask) -> None:
        """End a job, if all is known of it: the exit codes, and what the ranks sent."""
        if flight.codes is None or flight.ended:
            return
        if flight.is_function:
            if len(flight.rank_ends) < flight.ranks() and not any(flight.codes):
                assert self._loop is not None
                self._loop.call_later(_RESULT, self._give_up, flight)
                return
            self._finish(flight, *job_end(flight, self.name))
        else:
            self._spawn(self._end_program, flight)

    def _give_up(self, flight: DragonTask) -> None:
        """A process ended well, and its function did not: os._exit(0), for example."""
        if len(flight.rank_ends) < flight.ranks():
            error = WorkerLostError(
                f"a process of task '{flight.uid}' ended before its function did, with exit code 0",
                backend=self.name,
            )
            self._finish(flight, "FAILED", {"exception": error})

    async def _end_program(self, flight: DragonTask) -> None:
        files = RankFiles(flight, self.work_dir)
        fields = await asyncio.to_thread(files.collect)
        state, more = job_end(flight, self.name, fields["stderr"])
        self._finish(flight, state, {**fields, **more})

    def _spawn(
        self, function: Any, *args: Any, among: set[asyncio.Task[Any]] | None = None
    ) -> None:
        among = self._work if among is None else among
        work = asyncio.get_running_loop().create_task(function(*args))
        among.add(work)
        work.add_done_callback(among.discard)

    # ------------------------------------------------------------------ cancel and time limits

    async def _cancel(self, task: Task) -> bool:
        flight = self._by_uid.get(task["uid"])
        return flight is not None and await self._stop_flight(flight)

    async def _stop_flight(self, flight: DragonTask) -> bool:
        if self._broken is not None or flight.ended:
            return False
        if flight.stopping is None:
            flight.stopping = asyncio.get_running_loop().create_future()
            self._spawn(self._stop_it, flight, flight.stopping)
        return bool(await asyncio.shield(flight.stopping))

    async def _stop_it(self, flight: DragonTask, stopped: asyncio.Future[bool]) -> None:
        """Stop a task wherever it is, and wait until it is known to be stopped."""
        try:
            if flight in self._pending:
                self._pending.remove(flight)
                self._finish(flight, "CANCELED", {})
            elif flight.crew is None:
                pass  # on its way from one crew to another
            elif await on_thread(flight.crew.withdraw, flight, timeout=_ANSWER):
                self._finish(flight, "CANCELED", {})
            else:
                await on_thread(flight.crew.cancel, flight, timeout=_ANSWER)
                if not flight.jobs and not flight.begun and await self._revoke(flight):
                    self._finish(flight, "CANCELED", {})
                elif not stopped.done():
                    # Dragon looks every 0.1 s whether it should stop what runs, but takes its time
                    # with a job's processes.
                    await asyncio.wait([stopped], timeout=_CLOSE if flight.jobs else GRACE + 3.0)
        except asyncio.TimeoutError:
            logger.warning("Dragon does not answer a request to cancel task '%s'", flight.uid)
        finally:
            if flight.stopping is stopped:
                flight.stopping = None  # another attempt may be made
            if not stopped.done():
                stopped.set_result(False)

    async def _revoke(self, flight: DragonTask) -> bool:
        """See to it that a task never begins; False where it has begun."""
        runs = await self._inquire(flight.crew.number, flight.number)
        return not (flight.number in runs or flight.begun or flight.ended)

    async def _inquire(self, crew: int, number: int | None) -> set[int]:
        """Let a task, or all of a crew, not begin any more; returns the numbers of what runs.

        Raises:
            asyncio.TimeoutError: a node does not answer.
        """
        post = self._post
        assert post is not None
        inquiry = self._revoking[crew, number] = _Inquiry(set(post.nodes.cores))
        await on_thread(post.revoke, crew, number, timeout=_ANSWER)
        await asyncio.wait_for(inquiry.answered.wait(), _ANSWER)
        del self._revoking[crew, number]
        return inquiry.runs

    def _on_answer(self, about: tuple[int, int | None], host: str, runs: list[int]) -> None:
        if (inquiry := self._revoking.get(about)) is not None:
            inquiry.hosts.discard(host)
            inquiry.runs.update(runs)
            if not inquiry.hosts:
                inquiry.answered.set()

    async def _time_out(self, flight: DragonTask) -> None:
        options = flight.task.get("task_backend_specific_kwargs") or {}
        flight.overdue = float(options["timeout"])
        if not await self._stop_flight(flight):
            error = TaskTimeoutError(flight.uid, flight.overdue, stopped=False)
            self._finish(flight, "FAILED", {"exception": error})

    # ------------------------------------------------------------------ losses

    def _on_lost(self, flight: DragonTask | None, host: str, number: int, pid: int) -> None:
        """A worker has died: its task is lost with it, and its place in its Batch."""
        if self._stopping is not None:  # it is we who end them
            return
        if flight is not None:
            error = WorkerLostError(
                f"the worker process that ran task '{flight.uid}' died (pid {pid} on {host}):"
                " os._exit, a crash, or killed, for example for its memory",
                backend=self.name,
                host=host,
                transient=True,
            )
            self._finish(flight, "FAILED", {"exception": error})
        crew = self._crews.get(number)
        if crew is not None and not crew.retired:
            crew.retired = True
            if self._crew is crew:
                self._crew = None
                self._spawn(self._replace, among=self._changes)
            self._spawn(self._salvage, crew)

    async def _salvage(self, crew: BatchExecutor) -> None:
        """Give what has not begun to another crew.

        What Batch sent to its workers in one wave with the task that took one of them down may
        never begin (seen in 0.15.0), even if workers are left.
        """
        runs = await self._inquire(crew.number, None)
        moved = [f for f in self._of(crew) if not (f.begun or f.jobs or f.number in runs)]
        for flight in moved:
            del self._flights[flight.number]
            flight.number, flight.handle, flight.crew = self._planner.number(), None, None
            self._flights[flight.number] = flight
        self._hand_over(moved)
        self._leave_if_idle(crew)

    def _of(self, crew: BatchExecutor) -> list[DragonTask]:
        return [flight for flight in self._by_uid.values() if flight.crew is crew]

    async def _replace(self) -> None:
        try:
            await self._renew()
        except Exception as error:  # Dragon's own, of any class
            self._break(
                BackendError(
                    f"backend '{self.name}' lost workers, and Dragon could not replace them:"
                    f" {type(error).__name__}: {error}",
                    backend=self.name,
                    transient=True,
                )
            )

    def _leave_if_idle(self, crew: BatchExecutor) -> None:
        """End a retired crew that runs nothing, and give its jobs to another one.

        A job cannot be kept from beginning otherwise.
        """
        left = self._of(crew)
        idle = all(f.jobs and not f.begun for f in left)
        if idle and crew.number in self._crews and not crew.leaving:
            crew.leaving = True
            for flight in left:
                flight.crew = None
            self._spawn(self._leave, crew, left, among=self._changes)

    async def _leave(self, crew: BatchExecutor, left: list[DragonTask]) -> None:
        if await self._try(crew.close, "end a Batch that lost a worker"):
            self._crews.pop(crew.number, None)
            for flight in left:
                flight.handle = None
            self._hand_over([flight for flight in left if not flight.ended])
        else:
            self._on_broken(crew, TimeoutError("it does not end"))

    def _on_broken(self, crew: BatchExecutor, error: BaseException) -> None:
        if self._stopping is not None:
            return
        self._break(
            BackendError(
                f"the Dragon Batch of backend '{self.name}' failed: {error!r}",
                backend=self.name,
                transient=True,
            )
        )

    def _check_beats(self) -> None:
        """Look whether every node has given a sign of life."""
        assert self._loop is not None
        assert self._post is not None
        now = time.monotonic()
        if self._checked and now - self._checked > 3 * _CHECK_EVERY:
            # It is we who stood still: a stopped process, a suspended laptop, a blocked loop.
            self._post.beats.update(dict.fromkeys(self._post.beats, now))
        self._checked = now
        silent = [h for h, beat in self._post.beats.items() if now - beat > self._node_timeout]
        if silent and self._broken is None:
            self._break(
                WorkerLostError(
                    f"node {', '.join(silent)} was lost: no sign of life for"
                    f" {self._node_timeout:g} s; Dragon cannot go on without it",
                    backend=self.name,
                    host=silent[0],
                    transient=True,
                )
            )
        self._checker = self._loop.call_later(_CHECK_EVERY, self._check_beats)

    def _break(self, error: BackendError) -> None:
        """Close the backend to new work, and fail everything in flight."""
        self._broken = error
        if self._post is not None:
            self._post.abandon()
        for crew in self._crews.values():
            crew.abandon()
        for flight in list(self._by_uid.values()):
            self._finish(flight, "FAILED", {"exception": error})


class _Inquiry:
    """A question to the agents of all nodes: what of it runs there."""

    def __init__(self, hosts: set[str]) -> None:
        self.hosts = hosts  # those that have not answered
        self.runs: set[int] = set()
        self.answered = asyncio.Event()


def _refuse(
    name: str,
    num_nodes: Any,
    batch_kwargs: Any,
    node_timeout: Any,
    removed: Mapping[str, Any],
) -> None:
    for key in removed:
        if key in _REMOVED:
            raise BackendError(f"{key} is no more; use {_REMOVED[key]}", backend=name)
        raise BackendError(
            f"unknown argument {key!r}; accepted: name, num_nodes, pool_nodes, batch_kwargs,"
            " node_timeout",
            backend=name,
        )
    whole = isinstance(num_nodes, int) and not isinstance(num_nodes, bool)
    if num_nodes is not None and not (whole and num_nodes >= 1):
        raise BackendError(f"num_nodes must be a number of at least 1, not {num_nodes!r}")
    if batch_kwargs is not None and not isinstance(batch_kwargs, Mapping):
        raise BackendError(f"batch_kwargs must be a dict, not {batch_kwargs!r}", backend=name)
    if not isinstance(node_timeout, (int, float)) or node_timeout < 3:
        raise BackendError(f"node_timeout must be 3 s or more, not {node_timeout!r}", backend=name)


DragonExecutionBackend = DragonExecutionBackendV3
