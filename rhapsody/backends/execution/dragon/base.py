"""What all Dragon backends have in common: the life of a task, from submit to its one end.

All of it is on the event loop. An executor brings tasks to processes, the agents of the nodes and
the executor report from threads of theirs, and here is decided what becomes of a task. How a task
that runs is stopped, and what follows on a lost worker, a subclass says in the hooks below. It is
one life cycle with all its ends, which is why this module is longer than others.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar

from rhapsody.backends.base import BaseExecutionBackend, Event, Task
from rhapsody.backends.options import is_number
from rhapsody.runtime.errors import BackendError, RhapsodyError, TaskTimeoutError, WorkerLostError

from .agents import NodeAgents
from .executor import (
    Executor,
    ExecutorEvent,
    ExecutorFailed,
    ProcessesExited,
    ProcessesStarted,
    TaskCancelled,
    TaskRefused,
)
from .node.messages import NodeMessage, RevokeReply, StopReply, TaskStarted, WorkerLost, WorkerUp
from .results import NodeEvent, RankOutcome, TaskOutcome, job_outcome, join_rank_files, read
from .runtime import Runtime, on_thread
from .task import DragonTask, Outcome, Planner

__all__ = ["ANSWER_TIMEOUT", "CLOSE_TIMEOUT", "BaseDragonBackend"]

logger = logging.getLogger(__name__)

#: seconds for an executor to end
CLOSE_TIMEOUT = 20.0
#: seconds for Dragon, or the agents, to take a request
ANSWER_TIMEOUT = 10.0

_OPEN = 120.0  # seconds for agents and an executor to come up: 2 to 10 s on an idle machine
_RESULT = 5.0  # seconds for the result of a process that has ended with exit code 0
_CHECK_EVERY = 1.0  # seconds between two looks at the heartbeats


class BaseDragonBackend(BaseExecutionBackend, ABC):
    """A backend on Dragon, less its executor.

    Args:
        name: by which tasks ask for this backend.
        num_nodes: how many nodes of the runtime to use; None for all.
        node_timeout: seconds without a heartbeat after which a node is taken for lost.
        cwd: the folder in which tasks run that name none; None for the current one.
        all_jobs: whether every task runs in processes of its own.
        by_granted_cpus: count the ranks that run at once by granted CPUs, or as Batch does.

    Raises:
        BackendError: an argument is wrong; when started: Dragon is not there or does not come up.
    """

    kinds = frozenset({"function", "executable"})
    takes_plain_functions: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        num_nodes: int | None,
        node_timeout: float,
        *,
        cwd: str | None = None,
        all_jobs: bool = False,
        by_granted_cpus: bool = False,
    ) -> None:
        super().__init__(name)
        whole = isinstance(num_nodes, int) and not isinstance(num_nodes, bool)
        if num_nodes is not None and not (whole and num_nodes >= 1):
            raise BackendError(
                f"num_nodes must be an int of at least 1, not {num_nodes!r}", backend=name
            )
        if not is_number(node_timeout) or node_timeout < 3:
            raise BackendError(
                f"node_timeout must be 3 s or more, not {node_timeout!r}", backend=name
            )
        self._num_nodes = num_nodes
        self._node_timeout = node_timeout
        self._by_granted_cpus = by_granted_cpus
        self._planner = Planner(lambda: self.work_dir, cwd, all_jobs=all_jobs)
        self._runtime = Runtime(name, num_nodes)
        self._agents: NodeAgents | None = None
        self._executors: dict[int, Executor] = {}
        self._executor: Executor | None = None  # the one that gets new tasks
        self._last_executor = 0
        self._pending: list[DragonTask] = []  # while there is no executor
        self._tasks: dict[int, DragonTask] = {}
        self._by_uid: dict[str, DragonTask] = {}
        self._idle: asyncio.Event
        self._work: set[asyncio.Task[None]] = set()
        self._changes: set[asyncio.Task[None]] = set()  # of executors: those that come and go
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._heartbeats_checked = 0.0
        self._broken: BackendError | None = None
        self._ddicts: list[Any] = []  # Dragon's own

    # ------------------------------------------------------------------ hooks of a subclass

    @abstractmethod
    def _new_executor(self, number: int, agents: NodeAgents) -> Executor:
        """Make an executor, which is not open yet."""

    @abstractmethod
    async def _stop_submitted(
        self, task: DragonTask, executor: Executor, ended: asyncio.Future[bool]
    ) -> None:
        """Stop a task that its executor has given to Dragon, and settle it as CANCELED.

        Return when it has ended (then `ended` is done), or when it cannot be said when it will.

        Raises:
            asyncio.TimeoutError: Dragon, or an agent, does not answer.
        """

    def _on_reply(self, message: RevokeReply | StopReply | WorkerUp) -> None:
        """Take an answer of an agent, or the first message of a worker of a pool."""

    def _on_settled(self, task: DragonTask) -> None:
        """Take note that a task has ended."""

    def _on_worker_lost(self, lost: WorkerLost) -> None:
        """Make up for a worker; the task that it ran has been settled."""

    # ------------------------------------------------------------------ lifecycle

    async def _start(self) -> None:
        await self._runtime.open()
        self._idle = asyncio.Event()
        self._idle.set()
        self._agents = agents = NodeAgents(
            self._report_messages, by_granted_cpus=self._by_granted_cpus
        )
        try:
            await on_thread(agents.open, self._num_nodes, timeout=_OPEN)
            await self._open_executor()
        except BaseException as error:
            agents.abandon()
            await self._runtime.close()
            if isinstance(error, (asyncio.CancelledError, BackendError)):
                raise
            raise BackendError(
                f"backend '{self.name}' cannot set up Dragon: {type(error).__name__}: {error}",
                backend=self.name,
            ) from error
        self._check_heartbeats()

    async def _open_executor(self) -> None:
        """Make the executor that gets the tasks from now on."""
        agents = self._agents
        assert agents is not None
        self._last_executor += 1
        executor = self._new_executor(self._last_executor, agents)
        try:
            await on_thread(executor.open, agents.allocator, timeout=_OPEN)
        except BaseException:
            if self._broken is None:
                executor.cancel_open()
            else:
                executor.abandon()
            raise
        self._executors[executor.number] = self._executor = executor
        pending, self._pending = self._pending, []
        self._give_to_executor(pending)

    async def _stop(self) -> None:
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
        if self._broken is None:
            await self._cancel_waiting()
            if self._changes:  # a Batch that nobody ends keeps the program from ending
                await asyncio.wait(self._changes, timeout=CLOSE_TIMEOUT)
            children = [t for t in self._by_uid.values() if t.started and not t.is_function]
            await asyncio.gather(*map(self._stop_task, children))
        try:
            for executor in list(self._executors.values()):
                await self._close_executor(executor)
            if self._broken is None:
                await self._try(self._close_agents, "end its agents")
        finally:
            if self._agents is not None:
                self._agents.abandon()
            for work in (*self._work, *self._changes):
                work.cancel()
            await self._runtime.close()
            if self._work_dir is not None and self.is_attached:
                with contextlib.suppress(OSError):  # only an empty folder of a session is litter
                    os.rmdir(self._work_dir)

    async def _cancel_waiting(self) -> None:
        """Cancel what waits, or one task would start for each that is stopped."""
        for executor in list(self._executors.values()):
            try:
                for task in await on_thread(executor.drain, timeout=ANSWER_TIMEOUT):
                    self._settle(task, Outcome("CANCELED", {}))
            except asyncio.TimeoutError:
                logger.warning("backend '%s' is stuck in the start of a process", self.name)

    async def _close_executor(self, executor: Executor) -> None:
        """End an executor; what it still ran has ended with its processes."""
        self._executors.pop(executor.number, None)
        if self._broken is not None:
            executor.abandon()
        elif await self._try(executor.close, "end its processes"):
            for task in self._tasks_of(executor):
                self._settle(task, Outcome("CANCELED", {}))

    def _close_agents(self) -> None:
        for ddict in self._ddicts:
            ddict.destroy()
        if self._agents is not None:
            self._agents.close()

    async def _try(self, step: Callable[[], None], purpose: str) -> bool:
        """Take a step of the shutdown, in bounded time; the next is taken in any case."""
        try:
            await on_thread(step, timeout=CLOSE_TIMEOUT)
        except Exception as error:  # Dragon's own, of any class; nobody can do anything about it
            logger.warning("backend '%s' could not %s: %r", self.name, purpose, error)
            return False
        return True

    def _spawn(
        self, work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]] | None = None
    ) -> None:
        """Run a coroutine beside everything else; `_stop` ends it."""
        among = self._work if among is None else among
        task = asyncio.get_running_loop().create_task(work)
        among.add(task)
        task.add_done_callback(among.discard)

    # ------------------------------------------------------------------ what only Dragon has

    async def fence(self) -> None:
        """Wait until every task that was submitted so far has ended."""
        await self._started()
        await self._idle.wait()
        self._flush()  # or their owner would not know of it yet

    async def create_ddict(self, *args: Any, **kwargs: Any) -> Any:
        """Make a `dragon.data.ddict.DDict`, which tasks may share; destroyed at shutdown."""
        await self._started()
        module = importlib.import_module("dragon.data.ddict")
        ddict = await on_thread(lambda: module.DDict(*args, **kwargs), timeout=_OPEN)
        self._ddicts.append(ddict)
        return ddict

    def topology(self) -> dict[str, dict[str, Any]]:
        """Return, for each node by host name, its `workers`, `cores` (as Batch counts) and `gpus`.

        Raises:
            BackendError: the backend is not started.
        """
        if self._agents is None or self._executor is None:
            raise BackendError(f"backend '{self.name}' is not started", backend=self.name)
        nodes = self._agents.nodes
        return {
            host: {
                "workers": self._executor.workers.get(host, 0),
                "cores": cores,
                "gpus": list(nodes.gpus.get(host, ())),
            }
            for host, cores in nodes.cores.items()
        }

    # ------------------------------------------------------------------ submit

    async def _submit(self, tasks: list[Task]) -> None:
        if self._broken is not None:
            raise self._broken
        pickled: dict[int, bytes] = {}
        planned: list[DragonTask] = []
        for given in tasks:
            try:
                task = self._planner.plan(given, pickled)
            except RhapsodyError as error:
                self.deliver(given, "FAILED", exception=error)
                continue
            self._tasks[task.number] = self._by_uid[task.uid] = task
            planned.append(task)
        if planned:
            assert self._agents is not None
            self._idle.clear()
            self._agents.busy.set()
            self._give_to_executor(planned)

    def _give_to_executor(self, tasks: list[DragonTask]) -> None:
        if self._executor is None:
            self._pending += tasks
            return
        for task in tasks:
            task.executor = self._executor.number
        self._executor.submit(tasks)

    # ------------------------------------------------------------------ reports

    def _report_messages(self, messages: list[NodeMessage]) -> None:
        """On the thread of the agents: unpickle results there, then wake the loop once."""
        self._on_loop(self._on_node_events, [read(message) for message in messages])

    def _report_executor(self, executor: Executor, event: ExecutorEvent) -> None:
        """On a thread of an executor."""
        self._on_loop(self._on_executor_event, executor, event)

    def _on_loop(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody needs to know
            self._loop.call_soon_threadsafe(function, *args)

    def _on_node_events(self, events: Sequence[NodeEvent]) -> None:
        burst: deque[Event] = deque()
        for event in events:
            if isinstance(event, TaskOutcome):
                if (task := self._tasks.get(event.number)) is not None:
                    task.host = event.hostname
                    burst.append(self._end(task, event.outcome))
            elif isinstance(event, TaskStarted):
                if (task := self._tasks.get(event.number)) is not None:
                    self._begin(task, event.hostname)
            elif isinstance(event, RankOutcome):
                if (task := self._tasks.get(event.number)) is not None:
                    task.rank_outcomes[event.rank] = event.outcome
                    self._try_job(task)
            elif isinstance(event, WorkerLost):
                self._fail_with_worker(event)
            elif isinstance(event, (RevokeReply, StopReply, WorkerUp)):
                self._on_reply(event)
        self.deliver_burst(burst)

    def _on_executor_event(self, executor: Executor, event: ExecutorEvent) -> None:
        if isinstance(event, ExecutorFailed):
            self._on_executor_failed(event.error)
        elif event.task.executor != executor.number:  # it was given to another one
            return
        elif isinstance(event, ProcessesStarted):
            self._begin(event.task, None)
        elif isinstance(event, TaskCancelled):
            self._settle(event.task, Outcome("CANCELED", {}))
        elif isinstance(event, ProcessesExited):
            event.task.exit_codes = event.exit_codes
            self._try_job(event.task)
        else:
            verb = "refused" if isinstance(event, TaskRefused) else "gave up"
            error = BackendError(
                f"Dragon {verb} task '{event.task.uid}': {type(event.error).__name__}:"
                f" {event.error}",
                backend=self.name,
            )
            error.__cause__ = event.error
            self._fail(event.task, error)

    # ------------------------------------------------------------------ begin and end of a task

    def _begin(self, task: DragonTask, hostname: str | None) -> None:
        if task.started or task.ended:
            return
        task.started, task.host = True, hostname
        self.deliver(task.task, "RUNNING", started=time.monotonic())
        if task.timeout is not None:
            assert self._loop is not None
            task.timer = self._loop.call_later(
                task.timeout, lambda: self._spawn(self._time_out(task))
            )

    def _end(self, task: DragonTask, outcome: Outcome) -> Event:
        """Take a task that has not ended off the lists, and return its event."""
        task.ended = True
        self._tasks.pop(task.number, None)
        if self._by_uid.get(task.uid) is task:
            del self._by_uid[task.uid]
        if task.timer is not None:
            task.timer.cancel()
        if isinstance(task.rank_call, str):
            with contextlib.suppress(OSError):  # the task has ended, whatever became of its file
                os.unlink(task.rank_call)
        state, fields = outcome
        if task.stop_result is not None and not task.stop_result.done():
            task.stop_result.set_result(state == "CANCELED")
        if state == "CANCELED" and task.timed_out:
            assert task.timeout is not None
            state, fields = "FAILED", {"exception": TaskTimeoutError(task.uid, task.timeout)}
        if not self._tasks:
            self._idle.set()
            if self._agents is not None:
                self._agents.busy.clear()
        self._on_settled(task)
        return Event(task.task, state, fields)

    def _settle(self, task: DragonTask, outcome: Outcome) -> None:
        if not task.ended:
            self.deliver_burst([self._end(task, outcome)])

    def _fail(self, task: DragonTask, error: BaseException) -> None:
        self._settle(task, Outcome("FAILED", {"exception": error}))

    def _try_job(self, task: DragonTask) -> None:
        """End a job, if all is known of it: the exit codes, and what the ranks sent."""
        if task.exit_codes is None or task.ended or task.stopping_on_nodes:
            return
        if not task.is_function:
            self._spawn(self._end_executable(task))
        elif len(task.rank_outcomes) < task.ranks and not any(task.exit_codes):
            assert self._loop is not None
            self._loop.call_later(_RESULT, self._fail_without_result, task)
        else:
            self._settle(task, job_outcome(task, self.name))

    def _fail_without_result(self, task: DragonTask) -> None:
        """A process ended with 0, and its function did not return: os._exit(0), for example."""
        if len(task.rank_outcomes) < task.ranks and not task.stopping_on_nodes:
            message = (
                f"a process of task '{task.uid}' ended before its function did, with exit code 0"
            )
            self._fail(task, WorkerLostError(message, backend=self.name))

    async def _end_executable(self, task: DragonTask) -> None:
        fields = await asyncio.to_thread(join_rank_files, task, self.work_dir)
        state, more = job_outcome(task, self.name, fields["stderr"])
        self._settle(task, Outcome(state, {**fields, **more}))

    # ------------------------------------------------------------------ cancel and time limits

    async def _cancel(self, task: Task) -> bool:
        found = self._by_uid.get(task["uid"])
        return found is not None and await self._stop_task(found)

    async def _stop_task(self, task: DragonTask) -> bool:
        """Stop a task wherever it is; True when it is known to be stopped."""
        if self._broken is not None or task.ended:
            return False
        if task.stop_result is None:
            task.stop_result = asyncio.get_running_loop().create_future()
            self._spawn(self._try_to_stop(task, task.stop_result))
        return await asyncio.shield(task.stop_result)

    async def _try_to_stop(self, task: DragonTask, ended: asyncio.Future[bool]) -> None:
        executor = None if task.executor is None else self._executors.get(task.executor)
        try:
            if task in self._pending:
                self._pending.remove(task)
                self._settle(task, Outcome("CANCELED", {}))
            elif executor is None:
                pass  # on its way from one executor to another, or the last is being closed
            elif await on_thread(executor.withdraw, task, timeout=ANSWER_TIMEOUT):
                self._settle(task, Outcome("CANCELED", {}))
            elif not task.ended:
                await self._stop_submitted(task, executor, ended)
        except asyncio.TimeoutError:
            logger.warning("no answer to the request to stop task '%s'", task.uid)
        finally:
            if task.stop_result is ended:
                task.stop_result = None  # another attempt may be made
            if not ended.done():
                ended.set_result(False)

    async def _time_out(self, task: DragonTask) -> None:
        assert task.timeout is not None
        task.timed_out = True
        if not await self._stop_task(task):
            self._fail(task, TaskTimeoutError(task.uid, task.timeout, stopped=False))

    # ------------------------------------------------------------------ losses

    def _fail_with_worker(self, lost: WorkerLost) -> None:
        """A worker has died: its task is lost with it, unless it was an agent that killed it."""
        if self._stopping is not None:  # then it is this backend that ends them
            return
        task = self._tasks.get(lost.number)
        if task is not None and not task.stopping_on_nodes:
            error = WorkerLostError(
                f"the worker process that ran task '{task.uid}' died (pid {lost.pid} on"
                f" {lost.hostname}): os._exit, a crash, or killed, for example for its memory",
                backend=self.name,
                host=lost.hostname,
                transient=True,
            )
            self._fail(task, error)
        self._on_worker_lost(lost)

    def _tasks_of(self, executor: Executor) -> list[DragonTask]:
        return [task for task in self._by_uid.values() if task.executor == executor.number]

    def _on_executor_failed(self, error: BaseException) -> None:
        if self._stopping is None:
            self._break(
                BackendError(
                    f"backend '{self.name}' cannot run tasks on Dragon any more: {error!r}",
                    backend=self.name,
                    transient=True,
                )
            )

    def _check_heartbeats(self) -> None:
        assert self._loop is not None
        assert self._agents is not None
        now = time.monotonic()
        if self._heartbeats_checked and now - self._heartbeats_checked > 3 * _CHECK_EVERY:
            # This process stood still: it was stopped, the laptop suspended, the loop blocked.
            self._agents.forgive_silence()
        self._heartbeats_checked = now
        silent = self._agents.silent_hosts(self._node_timeout)
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
        self._heartbeat_timer = self._loop.call_later(_CHECK_EVERY, self._check_heartbeats)

    def _break(self, error: BackendError) -> None:
        """Close the backend to new work, and fail everything in flight."""
        self._broken = error
        if self._agents is not None:
            self._agents.abandon()
        for executor in self._executors.values():
            executor.abandon()
        for task in list(self._by_uid.values()):
            self._fail(task, error)
