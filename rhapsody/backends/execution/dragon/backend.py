"""Tasks on Dragon, on one node or several: functions and executables in its workers, MPI jobs.

This is V3, on Dragon's Batch: how its tasks are stopped, and how a Batch that has lost a worker is
replaced by another. The life of a task is in `base`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

from rhapsody.backends.base import Task
from rhapsody.runtime.errors import BackendError

from .agents import NodeAgents
from .base import ANSWER_TIMEOUT, CLOSE_TIMEOUT, BaseDragonBackend
from .batch import BatchExecutor
from .executor import Executor
from .node.context import GRACE
from .node.messages import RevokeReply, RevokeRequest, StopReply, WorkerLost, WorkerUp
from .options import OPTIONS, check_options
from .runtime import on_thread
from .task import DragonTask, Outcome

__all__ = ["DragonExecutionBackend", "DragonExecutionBackendV3"]

# What earlier releases had, and what does it now.
_REMOVED = {
    "num_workers": "batch_kwargs={'workers_per_node': n}",
    "disable_background_batching": "nothing: tasks always travel in bursts",
    "disable_batch_submission": "nothing: tasks always travel in bursts",
    "disable_telemetry": "batch_kwargs={'disable_telem': True}",
    "working_directory": "Session(work_dir=...), or cwd in task_backend_specific_kwargs",
    "resources": "num_nodes=, and batch_kwargs={'workers_per_node': n}",
}


class DragonExecutionBackendV3(BaseDragonBackend):
    """Runs tasks on Dragon's `Batch`.

    Under `dragon` or `rhapsody launch --dragon` it uses the runtime that is there. A program that
    was started by itself gets a runtime of its own, on this node, which ends with the backend.

    Args:
        name: by which tasks ask for this backend.
        num_nodes: how many nodes of the runtime to use; None for all.
        pool_nodes: taken, and left to Dragon, which gives each node a pool of its own.
        batch_kwargs: further arguments of `dragon.workflows.batch.Batch`, such as
            `workers_per_node` (by default as many as Batch and this machine's grant allow).
        node_timeout: seconds without a heartbeat after which a node is taken for lost.

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

    option_keys: ClassVar[frozenset[str]] = frozenset(OPTIONS)

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
        _check_arguments(name, batch_kwargs, removed)
        super().__init__(name, num_nodes, node_timeout)
        self._batch_kwargs = {**(batch_kwargs or {})}
        self._retired: set[int] = set()  # executors that have lost a worker: no new tasks
        self._leaving: set[int] = set()  # those of them that are being closed
        self._inquiries: dict[RevokeRequest, _Inquiry] = {}

    def _new_executor(self, number: int, agents: NodeAgents) -> Executor:
        return BatchExecutor(
            number, agents.context, self._report_executor, self._num_nodes, self._batch_kwargs
        )

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        nodes = self._agents.nodes if self._agents is not None else None
        check_options(task, options, nodes)

    # ------------------------------------------------------------------ cancel

    async def _stop_submitted(
        self, task: DragonTask, executor: Executor, ended: asyncio.Future[bool]
    ) -> None:
        assert isinstance(executor, BatchExecutor)
        await on_thread(executor.cancel, task, timeout=ANSWER_TIMEOUT)
        if not task.is_job and not task.started:
            running = await self._revoke(executor.number, task.number)
            if not (task.number in running or task.started):
                self._settle(task, Outcome("CANCELED", {}))
                return
        # Dragon looks every 0.1 s whether it should stop what runs, but takes its time with a job's
        # processes.
        await asyncio.wait([ended], timeout=CLOSE_TIMEOUT if task.is_job else GRACE + 3.0)

    async def _revoke(self, executor: int, number: int | None) -> set[int]:
        """Let a task, or all of an executor, not start any more; return the numbers of what runs.

        Raises:
            asyncio.TimeoutError: a node does not answer.
        """
        assert self._agents is not None
        request = RevokeRequest(executor, number)
        inquiry = self._inquiries[request] = _Inquiry(set(self._agents.nodes.cores))
        try:
            await on_thread(self._agents.revoke, request, timeout=ANSWER_TIMEOUT)
            await asyncio.wait_for(inquiry.answered.wait(), ANSWER_TIMEOUT)
        finally:
            del self._inquiries[request]
        return inquiry.running

    def _on_reply(self, message: RevokeReply | StopReply | WorkerUp) -> None:
        if isinstance(message, RevokeReply) and message.request in self._inquiries:
            self._inquiries[message.request].add(message)

    # ------------------------------------------------------------------ a Batch that lost a worker

    def _on_worker_lost(self, lost: WorkerLost) -> None:
        """Give new tasks to another Batch: the place of the worker in this one stays empty."""
        executor = self._executors.get(lost.executor)
        if executor is None or executor.number in self._retired:
            return
        self._retired.add(executor.number)
        if self._executor is executor:
            self._executor = None
            self._spawn(self._replace(), among=self._changes)
        self._spawn(self._move_unstarted(executor))

    async def _replace(self) -> None:
        try:
            await self._open_executor()
        except Exception as error:  # Dragon's own, of any class
            self._break(
                BackendError(
                    f"backend '{self.name}' lost workers, and Dragon could not replace them:"
                    f" {type(error).__name__}: {error}",
                    backend=self.name,
                    transient=True,
                )
            )

    async def _move_unstarted(self, executor: Executor) -> None:
        """Give what has not started to another executor.

        What Batch sent to its workers in one wave with the task that took one of them down may
        never start (seen in 0.15.0), even if workers are left.
        """
        running = await self._revoke(executor.number, None)
        moved = [
            task
            for task in self._tasks_of(executor)
            if not (task.started or task.is_job or task.number in running)
        ]
        for task in moved:
            del self._tasks[task.number]
            task.number, task.handle, task.executor = self._planner.next_number(), None, None
            self._tasks[task.number] = task
        self._give_to_executor(moved)
        self._leave_if_idle(executor)

    def _on_settled(self, task: DragonTask) -> None:
        if task.executor in self._retired and task.executor in self._executors:
            self._leave_if_idle(self._executors[task.executor])

    def _leave_if_idle(self, executor: Executor) -> None:
        """End a retired executor that runs nothing, and give its jobs to another one.

        A job cannot be kept from starting otherwise.
        """
        if executor.number in self._leaving or executor.number not in self._executors:
            return
        left = self._tasks_of(executor)
        if all(task.is_job and not task.started for task in left):
            self._leaving.add(executor.number)
            for task in left:
                task.executor = None
            self._spawn(self._leave(executor, left), among=self._changes)

    async def _leave(self, executor: Executor, left: list[DragonTask]) -> None:
        if await self._try(executor.close, "end a Batch that lost a worker"):
            self._executors.pop(executor.number, None)
            for task in left:
                task.handle = None
            self._give_to_executor([task for task in left if not task.ended])
        else:
            self._on_executor_failed(TimeoutError("a Batch that lost a worker does not end"))


class _Inquiry:
    """A question to the agents of all nodes: which of these tasks run there."""

    def __init__(self, hosts: set[str]) -> None:
        self._silent = hosts
        self.running: set[int] = set()
        self.answered = asyncio.Event()

    def add(self, reply: RevokeReply) -> None:
        """Take the answer of a node."""
        self._silent.discard(reply.host)
        self.running.update(reply.running)
        if not self._silent:
            self.answered.set()


def _check_arguments(name: str, batch_kwargs: object, removed: Mapping[str, object]) -> None:
    for key in removed:
        if key in _REMOVED:
            raise BackendError(f"{key} is no more; use {_REMOVED[key]}", backend=name)
        raise BackendError(
            f"unknown argument {key!r}; accepted: name, num_nodes, pool_nodes, batch_kwargs,"
            " node_timeout",
            backend=name,
        )
    if batch_kwargs is not None and not isinstance(batch_kwargs, Mapping):
        raise BackendError(f"batch_kwargs must be a dict, not {batch_kwargs!r}", backend=name)


DragonExecutionBackend = DragonExecutionBackendV3
