"""The executor of V3: a Batch of Dragon's, which has a queue and workers of its own."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import queue as queues
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .executor import (
    Executor,
    ExecutorFailed,
    ProcessesExited,
    ProcessesStarted,
    Report,
    TaskCancelled,
    TaskFailed,
    TaskRefused,
)
from .node.context import RunContext
from .node.group_join import GroupJoinPatch
from .node.worker import run_task
from .placement import Allocation, NodeAllocator
from .processes import placement_policy, rank_target
from .task import TEMPLATE_KEYS, DragonTask
from .topology import workers_per_node

__all__ = ["BatchExecutor"]

# Bytes of shared memory for Batch's own results, per node: ours do not pass there.
_RESULTS = 128 << 20
_POLL = 0.25  # seconds for which a thread waits for Batch, before it looks for what has started
_JOBS_PER_LOOK = 64  # jobs whose files are looked at, in their order
_ASK = 5.0  # seconds for Batch to take a request to cancel, or to end
_RESULT = 30.0  # seconds for the result of a task that Batch says has ended
# The exceptions, by name, with which a task ends that was cancelled in Batch, or revoked by us.
_CANCELLED = ("TaskCancelledError", "Revoked")


class BatchExecutor(Executor):
    """One Batch with its workers, and the tasks that it has.

    A worker that a function takes down is lost to its Batch for good. So a Batch that has lost one
    gets no new tasks, and another executor takes its place.

    Args:
        number: tells it from the executors before it.
        context: of the backend.
        report: called for each event, on a thread of this executor.
        num_nodes: how many nodes to use; None for all.
        batch_kwargs: further arguments of `Batch`.
    """

    def __init__(
        self,
        number: int,
        context: RunContext,
        report: Report,
        num_nodes: int | None,
        batch_kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__(number, context, report)
        self._num_nodes = num_nodes
        self._batch_kwargs = batch_kwargs
        self._batch: Any = None
        self._lock = threading.Lock()
        self._cancelled = False  # while it was being opened
        self._submitted: queues.SimpleQueue[Sequence[DragonTask] | None] = queues.SimpleQueue()
        self._tasks: dict[str, DragonTask] = {}  # those that Batch has, by its own id
        self._ended_early: set[str] = set()  # ids of those that ended before they were in `_tasks`
        self._starting: dict[str, DragonTask] = {}  # jobs, by the file that their first rank opens

    def open(self, allocator: NodeAllocator) -> None:
        """Make the Batch, and start the threads. Blocks."""
        module = importlib.import_module("dragon.workflows.batch.batch")
        cores = allocator.nodes.cores
        self._allocator = allocator
        allocator.on_free(self._submit_waiting)
        settings = {
            "workers_per_node": workers_per_node(cores),
            "results_ddict_mem": _RESULTS * len(cores),
            **self._batch_kwargs,
        }
        batch = module.Batch(num_nodes=self._num_nodes, **settings)
        with self._lock:
            self._batch = batch
            cancelled = self._cancelled
        if cancelled:
            self.close()
            return
        topology = batch.topology()
        for hosts, workers in zip(topology.pool_hostnames, topology.workers_per_pool, strict=True):
            self.workers[hosts[0]] = workers
        threading.Thread(target=self._submit_all, daemon=True, name="dragon-submit").start()
        threading.Thread(target=self._poll, daemon=True, name="dragon-poll").start()

    def cancel_open(self) -> None:
        """End the Batch as soon as it is made, on a thread that nobody waits for."""
        with self._lock:
            self._cancelled = True
            made = self._batch is not None
        if made:
            threading.Thread(target=self.close, daemon=True, name="dragon-close").start()

    def submit(self, tasks: Sequence[DragonTask]) -> None:
        """Take tasks; does not block."""
        self._submitted.put(tasks)

    def withdraw(self, task: DragonTask) -> bool:
        """Keep a task from being given to Batch; False where it is there already. Blocks."""
        with self._lock:
            if task.handle is not None:
                return False
            self._withdrawn.add(task)
            return True

    def cancel(self, task: DragonTask) -> None:
        """Ask Batch to cancel a task; it may still run, or start. Blocks."""
        if task.handle is not None:
            with contextlib.suppress(queues.Empty):  # no answer in time
                task.handle.cancel(timeout=_ASK)

    def close(self) -> None:
        """End the Batch with what still runs there. Blocks, for good where a node is lost."""
        self._closing = True
        self._submitted.put(None)
        self._batch.terminate(timeout=_ASK)
        for task in list(self._tasks.values()):
            self._allocator.release(task)

    def abandon(self) -> None:
        """Leave the Batch as it is, for good: a call of its might never return."""
        self._closing = True
        self._submitted.put(None)
        if self._batch is None:  # Dragon still makes it, or never will
            return
        # At exit Batch would try to end it, and block, and a thread of its group would keep the
        # program from ending. There is no public way; read in 0.15.0.
        self._batch._unregister_atexit()
        self._batch.terminated = True
        if self._batch.grp is not None:
            self._batch.grp._exq_shutdown.set()

    # ------------------------------------------------------------------ the thread that submits

    def _submit_all(self) -> None:
        # For cores or the MPI lock, in the order in which they came.
        waiting: deque[DragonTask] = deque()
        while (tasks := self._submitted.get()) is not None:
            for task in tasks:
                if task.pinned or task.is_mpi_job:
                    waiting.append(task)
                else:
                    self._submit(task)
            while waiting and not self._closing:
                if not (self._is_obsolete(waiting[0]) or self._may_start(waiting[0])):
                    break
                self._submit(waiting.popleft())

    def _may_start(self, task: DragonTask) -> bool:
        if task.pinned:
            return self._allocator.allocate(task) is Allocation.DONE
        return self._allocator.acquire_mpi_lock(task)

    def _submit_waiting(self) -> None:
        """Look again at what waits: something has become free."""
        if not self._closing:
            self._submitted.put(())

    def _is_obsolete(self, task: DragonTask) -> bool:
        return task.ended or task in self._withdrawn

    def _submit(self, task: DragonTask) -> None:
        with self._lock:
            early = self._give_to_batch(task)
        if early:
            self._on_ended(early)

    def _give_to_batch(self, task: DragonTask) -> str | None:
        """Give a task to Batch, unless it was withdrawn; return its id if it has ended already."""
        if self._is_obsolete(task):
            self._withdrawn.discard(task)
            self._allocator.release(task)
            return None
        try:
            task.handle = self._job(task) if task.is_job else self._function(task)
        except Exception as error:  # what Dragon finds wrong with a task has any class
            self._allocator.release(task)
            self._report(self, TaskRefused(task, error))
            return None
        name: str = task.handle.uid
        self._tasks[name] = task
        if task.is_job and isinstance(path := task.templates[0].get("stdout"), str):
            self._starting[path] = task
        if name in self._ended_early:
            self._ended_early.remove(name)
            return name
        return None

    def _function(self, task: DragonTask) -> Any:
        return self._batch.function(run_task, self._context, self.number, task.number, task.payload)

    def _job(self, task: DragonTask) -> Any:
        process = importlib.import_module("dragon.native.process")
        facts = importlib.import_module("dragon.infrastructure.facts")
        templates = []
        for rank, given in enumerate(task.templates):
            kept = {key: value for key, value in given.items() if key in TEMPLATE_KEYS}
            if task.placements:
                kept["policy"] = placement_policy(task.placements[rank], kept.get("policy"))
            target, args = rank_target(self._context, task, rank)
            templates.append(process.ProcessTemplate(target, args=args, **kept))
        templates[0].group_join_patch = GroupJoinPatch()
        if len(templates) == 1:
            return self._batch.process(templates[0])
        pmi = facts.PMIBackend.from_str(task.pmi) if task.pmi else None
        return self._batch.options(pmi=pmi).job([(1, template) for template in templates])

    # ------------------------------------------------------------------ the thread that polls

    def _poll(self) -> None:
        while not self._closing:
            try:
                name = self._batch.poll(timeout=_POLL)
            except Exception as error:  # the Batch is broken, or gone
                if not self._closing:
                    self._report(self, ExecutorFailed(error))
                return
            if name is not None:
                self._on_ended(name)
            if self._starting:
                self._find_started()

    def _find_started(self) -> None:
        """Report jobs whose output files exist: Dragon opens them when it starts the processes."""
        with self._lock:
            first = list(itertools.islice(self._starting.items(), _JOBS_PER_LOOK))
        for path, task in first:
            if task.ended or os.path.exists(path):
                self._starting.pop(path, None)
                self._report(self, ProcessesStarted(task))

    def _on_ended(self, name: str) -> None:
        """Report how a job ended, or a task that never started; workers report the others."""
        with self._lock:
            task = self._tasks.pop(name, None)
            if task is None:
                self._ended_early.add(name)
                return
            if task.is_job:
                self._starting.pop(str(task.templates[0].get("stdout")), None)
        self._allocator.release(task)
        # Batch keeps every task for ever; there is no public way to drop one. Read in 0.15.0.
        self._batch._task_log_tasks.pop(name, None)
        if task.ended and not task.is_job:
            return
        try:
            value = task.handle.get(timeout=_RESULT)
        except Exception as error:  # a cancelled task's, or anything of Dragon's
            cancelled = type(error).__name__ in _CANCELLED
            self._report(self, TaskCancelled(task) if cancelled else TaskFailed(task, error))
        else:
            if task.is_job:
                codes = value if isinstance(value, list) else [value]
                self._report(self, ProcessesExited(task, codes))
