"""The backend of this machine: functions on threads or in processes, executables as children."""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from rhapsody.backends.base import BaseExecutionBackend, Event, Task, kind_of
from rhapsody.backends.options import EXECUTABLE_OPTIONS, check_options
from rhapsody.runtime.arguments import inputs_of
from rhapsody.runtime.errors import BackendError, ResourceError
from rhapsody.runtime.local.calls import Call
from rhapsody.runtime.local.children import Children, Ended, Started
from rhapsody.runtime.local.executables import ExecutableRun, describe, start_error
from rhapsody.runtime.local.process_pool import ProcessPool
from rhapsody.runtime.local.thread_pool import ThreadPool
from rhapsody.runtime.local.worker_process import WorkerSpec
from rhapsody.runtime.machine import hardware
from rhapsody.runtime.machine.mpi import local_mpiexec
from rhapsody.runtime.machine.slots import Grant, Slots
from rhapsody.runtime.resources import Resources
from rhapsody.runtime.task import EventTuple

__all__ = ["ConcurrentExecutionBackend"]


# Executables that wait at the warden, per slot: enough of the shortest ones for the time in which
# it tells of several ends at once and we answer. Measured with `true` on 2 cores: 3 of them are at
# times used up, and cost a tenth more; more than 12 change nothing.
_QUEUED_PER_SLOT = 12


class _Running:
    """An executable that runs, or one without a grant, that is queued at the warden."""

    __slots__ = ("grant", "key", "run", "stopped", "task")

    def __init__(self, key: int, task: Task, run: ExecutableRun, grant: Grant | None) -> None:
        self.key = key
        self.task = task
        self.run = run
        self.grant = grant
        self.stopped: asyncio.Future[bool] | None = None  # whether it was, once asked to


class ConcurrentExecutionBackend(BaseExecutionBackend):
    """Runs tasks on this machine.

    Args:
        executor: where functions run. None: threads, one per core and four more, as Python's own
            default. A `ThreadPoolExecutor` (or another whose jobs run in this process) is used as
            it is, and stays open at shutdown. Of a `ProcessPoolExecutor` the settings are used
            (`max_workers`, `mp_context`, `initializer`, `initargs`, `max_tasks_per_child`): the
            functions run in workers of our own, because one dead worker breaks a whole
            `ProcessPoolExecutor`.
        name: the backend's name.
        slots: how many executables run at once; by default one per core that the affinity mask,
            the control group and Slurm (`SLURM_CPUS_ON_NODE`) grant.
        grace: seconds between SIGTERM and SIGKILL when an executable is stopped.

    Keys of `task_backend_specific_kwargs`, all for executables: `cwd`; `env`, added over the
    parent's environment, or with `env_replace: True` in its place; `shell: True` runs `executable`
    as a command line (arguments are quoted and appended); `stdin`, a `str` or `bytes` to read, or a
    `pathlib.Path` to read from.

    A task with `Resources` has its cores, GPUs and memory to itself. `Resources(ranks=n)` with
    more than one rank starts an executable under `mpiexec`.

    Raises:
        BackendError: an argument is of a wrong type.
    """

    option_keys = frozenset(EXECUTABLE_OPTIONS)
    takes_plain_functions = True

    def __init__(
        self,
        executor: Executor | None = None,
        name: str = "concurrent",
        slots: int | None = None,
        *,
        grace: float = 5.0,
    ) -> None:
        super().__init__(name)
        _check_arguments(name, executor, slots, grace)
        self._executor = executor
        self._own_executor: ThreadPoolExecutor | None = None
        self._grace = grace
        self._cores = hardware.granted_cores()
        self._slots = Slots(self._cores, hardware.visible_gpus(), hardware.total_memory(), slots)
        self._queue: deque[Task] = deque()  # tasks that wait for a slot
        self._running: dict[int, _Running] = {}  # executables, by the key of their process
        self._queued: deque[int] = deque()  # keys of those that are queued at the warden
        self._keys: dict[str, int] = {}
        self._grants: dict[str, Grant] = {}  # of function tasks with resources, by uid

    # ------------------------------------------------------------------ lifecycle

    async def _start(self) -> None:
        self._children = Children(self._on_children)
        self._pool: ThreadPool | ProcessPool
        if isinstance(self._executor, ProcessPoolExecutor):
            width, spec = _read_pool(self._executor)
            self._pool = ProcessPool(width, spec, self._report, self._children, self.name)
            return
        executor = self._executor
        if executor is None:
            width = len(self._cores) + 4
            executor = self._own_executor = ThreadPoolExecutor(width, "rhapsody")
        self._pool = ThreadPool(executor, _width_of(executor, len(self._cores)), self._report)

    async def _stop(self) -> None:
        canceled: list[Event] = [Event(task, "CANCELED") for task in self._queue]
        self._queue.clear()
        self.deliver_burst(canceled)
        try:
            await asyncio.gather(*(self._stop_process(key) for key in list(self._running)))
            await self._stop_functions()
        finally:  # also where the event loop ends meanwhile, and takes this with it
            await self._children.close()
        if self._work_dir is not None and self.is_attached:
            # The session made this directory, and no task has written to it.
            _remove_if_empty(self._work_dir)

    async def _stop_functions(self) -> None:
        if isinstance(self._pool, ProcessPool):
            await self._pool.stop(self._grace)
            return
        self._pool.cancel_waiting()
        running = self._pool.coroutines
        await asyncio.gather(*(self._pool.cancel(uid, self._grace) for uid in running))
        if self._own_executor is not None:
            self._own_executor.shutdown(wait=False)

    # ------------------------------------------------------------------ submit

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        uid, kind = task["uid"], kind_of(task)
        check_options(task, options, EXECUTABLE_OPTIONS)
        need: Resources | None = task.get("resources")
        if need is None:
            return
        self._slots.check(uid, need)
        if kind == "executable":
            if need.ranks > 1:
                local_mpiexec(uid, need.ranks)
        elif need.ranks > 1:
            raise ResourceError(
                f"task '{uid}': backend '{self.name}' runs a function as one rank; make it an"
                " executable, or use a backend with MPI functions"
            )
        elif not isinstance(self._executor, ProcessPoolExecutor) and (
            need.gpus or need.env or need.cwd
        ):
            raise ResourceError(
                f"task '{uid}': GPUs, env and cwd belong to a process, and this function runs on a"
                " thread; give the backend a ProcessPoolExecutor"
            )
        elif need.cwd:
            raise ResourceError(f"task '{uid}': cwd is for executables on backend '{self.name}'")

    async def _submit(self, tasks: list[Task]) -> None:
        calls = []
        for task in tasks:
            if kind_of(task) == "function" and task.get("resources") is None:
                calls.append(_call_of(task))
            else:
                self._queue.append(task)
        if calls:
            self._pool.submit(calls)
        if self._queue:
            self._children.sync_environment()
            self._fill_slots()

    def _fill_slots(self) -> None:
        """Start what waits, in order, so that small tasks do not starve a large one."""
        while self._queued and (grant := self._slots.acquire(None)) is not None:
            key = self._queued.popleft()
            self._running[key].grant = grant
            self._children.start_now(key)
        while self._queue:
            task = self._queue[0]
            need = task.get("resources")
            if need is not None and self._queued:
                return
            grant = self._slots.acquire(need)
            if grant is None and (
                need is not None or len(self._queued) >= _QUEUED_PER_SLOT * self._slots.total
            ):
                return
            self._queue.popleft()
            try:
                if kind_of(task) == "function":
                    assert grant is not None  # a function is only here for its resources
                    self._start_function(task, grant)
                else:
                    self._start_process(task, grant)
            except Exception as error:
                # Of this task alone, such as an argument's __str__ that raises; the others go on.
                self._grants.pop(task["uid"], None)
                if grant is not None:
                    self._slots.release(grant)
                self.deliver(task, "FAILED", exception=start_error(error, self.name))

    def _start_function(self, task: Task, grant: Grant) -> None:
        call = _call_of(task, grant)
        self._grants[task["uid"]] = grant
        try:
            self._pool.submit([call])
        except RuntimeError as error:  # its owner has shut the executor down
            raise BackendError(f"cannot run the task: {error}") from error

    def _start_process(self, task: Task, grant: Grant | None) -> None:
        run = ExecutableRun(describe(task, grant), self.work_dir)
        key = self._children.run(run.launch, queued=grant is None)
        if grant is None:
            self._queued.append(key)
        self._running[key] = _Running(key, task, run, grant)
        self._keys[task["uid"]] = key

    # ------------------------------------------------------------------ ends

    def _report(self, events: Sequence[EventTuple]) -> None:
        """Deliver events of functions, from any thread."""
        if self._grants and self._loop is not None:
            for task, state, _ in events:
                # Before the report: after it, the same uid may be submitted again.
                if state != "RUNNING" and task["uid"] in self._grants:
                    _on_loop(self._loop, self._release, task["uid"])
        self.deliver_burst(events)

    def _release(self, uid: str) -> None:
        grant = self._grants.pop(uid, None)
        if grant is not None:
            self._slots.release(grant)
            self._fill_slots()

    def _on_children(self, events: list[Started | Ended]) -> None:
        burst: list[Event] = []
        for event in events:
            if isinstance(event, Started):
                if event.key in self._running:
                    burst.append(Event(self._running[event.key].task, "RUNNING"))
                continue
            running = self._running.pop(event.key, None)
            if running is None:
                continue
            self._keys.pop(running.task["uid"], None)
            self._pass_on(event, running.grant)
            state, fields = self._outcome(running.run, event)
            burst.append(Event(running.task, state, fields))
            if running.stopped is not None and not running.stopped.done():
                running.stopped.set_result(state == "CANCELED")
        self._fill_slots()  # before the report, so that the next children start at once
        self.deliver_burst(burst)

    def _outcome(self, run: ExecutableRun, end: Ended) -> tuple[str, dict[str, Any]]:
        try:
            outcome = run.outcome(end, self.name)
        except (OSError, ValueError) as error:  # the note of its ranks is unreadable
            return "FAILED", {"exception": start_error(error, self.name)}
        return outcome.state, outcome.fields()

    def _pass_on(self, end: Ended, grant: Grant | None) -> None:
        """Give the grant of an ended process to the one that was started in its place."""
        if grant is None:  # it ended while it was queued
            if end.key in self._queued:
                self._queued.remove(end.key)
            return
        successor = None if end.successor is None else self._running.get(end.successor)
        if successor is None or successor.grant is not None:
            self._slots.release(grant)
        else:
            successor.grant = grant
            self._queued.remove(successor.key)

    # ------------------------------------------------------------------ cancel

    async def _cancel(self, task: Task) -> bool:
        uid = task["uid"]
        for index, waiting in enumerate(self._queue):
            if waiting is task:
                del self._queue[index]
                self.deliver(task, "CANCELED")
                self._fill_slots()
                return True
        if uid in self._keys:
            return await self._stop_process(self._keys[uid])
        return await self._pool.cancel(uid, self._grace)

    async def _stop_process(self, key: int) -> bool:
        running = self._running.get(key)
        if running is None:  # it ended just now
            return False
        if running.stopped is None:
            running.stopped = asyncio.get_running_loop().create_future()
            self._children.kill(key, self._grace)
        return await asyncio.shield(running.stopped)


# ---------------------------------------------------------------------- helpers


def _check_arguments(name: Any, executor: Any, slots: Any, grace: Any) -> None:
    def is_number(value: Any, *kinds: type) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    if not isinstance(name, str) or not name:
        fault = f"name must be a str that is not empty, not {name!r}"
    elif executor is not None and not isinstance(executor, Executor):
        fault = f"executor must be a concurrent.futures.Executor, not {executor!r}"
    elif slots is not None and not (is_number(slots, int) and slots > 0):
        fault = f"slots must be an int of at least 1, not {slots!r}"
    elif not (is_number(grace, int, float) and 0 <= grace < math.inf):
        fault = f"grace must be seconds, 0 or more, not {grace!r}"
    else:
        return
    raise BackendError(fault, backend=name if isinstance(name, str) else None)


def _read_pool(pool: ProcessPoolExecutor) -> tuple[int, WorkerSpec]:
    """Return the settings of a pool; there is no public way. Read in CPython 3.10 to 3.13."""
    seen = vars(pool)
    return seen["_max_workers"], WorkerSpec(
        seen["_mp_context"],
        seen["_initializer"],
        seen["_initargs"],
        seen.get("_max_tasks_per_child"),  # from 3.11 on
    )


def _width_of(executor: Executor, default: int) -> int:
    """Return how many jobs an executor runs at once; there is no public way either."""
    width = getattr(executor, "_max_workers", default)
    return width if isinstance(width, int) and width > 0 else default


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[str], None], uid: str) -> None:
    try:
        loop.call_soon_threadsafe(function, uid)
    except RuntimeError:  # the loop is closed, and the backend with it
        return


def _call_of(task: Task, grant: Grant | None = None) -> Call:
    args, kwargs = inputs_of(task)
    function = task["function"] if isinstance(task, dict) else task.function
    assert function is not None
    uid = task["uid"] if isinstance(task, dict) else task.uid
    if grant is None:
        return Call(task, uid, function, args, kwargs)
    need: Resources = task["resources"]
    return Call(task, uid, function, args, kwargs, grant.cores, {**(need.env or {}), **grant.env})


def _remove_if_empty(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError:  # it is not empty, or was never made
        return
