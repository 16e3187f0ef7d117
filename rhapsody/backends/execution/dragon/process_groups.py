"""The executor of V1: processes for each task, one per rank, which it starts and watches."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .executor import ProcessesExited, ProcessesStarted, QueuedExecutor, Report, TaskRefused
from .node.context import TASK_VARIABLE, RunContext, task_mark
from .placement import Allocation, NodeAllocator
from .processes import end_processes, placement_policy, rank_target
from .task import TEMPLATE_KEYS, DragonTask

__all__ = ["ProcessGroupExecutor"]

# Seconds between two questions whether processes have ended: after a change, and at most.
_ASK_SOON = 0.01
_ASK_AT_MOST = 0.1


@dataclass(slots=True, eq=False)
class _ProcessGroup:
    """The processes of one task."""

    task: DragonTask
    puids: list[int] = field(default_factory=list)  # Dragon's ids, in rank order
    exit_codes: dict[int, int] = field(default_factory=dict)  # by puid
    mpi_group: Any = None  # Dragon's ProcessGroup, of an MPI job


class ProcessGroupExecutor(QueuedExecutor):
    """Starts processes for each task, as many at once as there are cores."""

    def __init__(self, number: int, context: RunContext, report: Report) -> None:
        super().__init__(number, context, report)
        self._start_lock = threading.Lock()  # held while a task is taken from the queue and started
        self._groups: list[_ProcessGroup] = []  # those that run
        self._pause = _ASK_SOON
        self._mpi_locked = False  # the first that waits, by another backend's job

    def open(self, allocator: NodeAllocator) -> None:
        """Start the thread."""
        self.workers = dict(allocator.nodes.cores)
        self._allocator = allocator
        self._thread.start()

    def withdraw(self, task: DragonTask) -> bool:
        """Keep a task from being started; False where it is. Blocks while one is being started."""
        with self._start_lock:
            if task.handle is not None:
                return False
            self._withdrawn.add(task)
            return True

    def drain(self) -> list[DragonTask]:
        """Give back the tasks that have not been started. Blocks while one is being started."""
        with self._start_lock:
            drained = list(self._waiting)
            self._waiting.clear()
        return drained

    def hosts_of(self, task: DragonTask) -> set[str]:
        """Return the nodes of a task's ranks."""
        return {placement.host for placement in task.placements}

    def close(self) -> None:
        """End what runs. Blocks, for good where a node is lost."""
        self._stop_thread()
        end_processes(
            puid for group in self._groups for puid in group.puids if puid not in group.exit_codes
        )
        for group in self._groups:
            self._release(group)

    # ------------------------------------------------------------------ the thread

    def _step(self) -> None:
        with self._changed:
            watching = self._groups or self._mpi_locked
            if not self._closing and (watching or not self._waiting):
                self._changed.wait(self._pause if watching else None)
            if self._closing:
                return
        changed = self._start_what_fits()
        changed |= self._find_exited()
        self._pause = _ASK_SOON if changed else min(self._pause * 1.3, _ASK_AT_MOST)

    def _start_what_fits(self) -> bool:
        """Start tasks in the order in which they came, so that a wide job is not overtaken."""
        started = False
        while not self._closing:
            with self._start_lock:
                if not self._waiting:
                    self._mpi_locked = False
                    break
                task = self._waiting[0]
                obsolete = task.ended or task in self._withdrawn
                answer = None if obsolete else self._allocator.allocate(task)
                self._mpi_locked = answer is Allocation.MPI_LOCKED
                if self._mpi_locked or (answer is Allocation.NO_ROOM and self._groups):
                    return started
                self._waiting.popleft()
                self._withdrawn.discard(task)
                if answer is Allocation.DONE:
                    self._start(_ProcessGroup(task))
                    started = True
                elif answer is Allocation.NO_ROOM:
                    error = RuntimeError("no node has room for it")
                    self._report(self, TaskRefused(task, error))
        return started

    def _start(self, group: _ProcessGroup) -> None:
        group.task.handle = group
        try:
            self._start_processes(group)
        except Exception as error:  # what Dragon finds wrong with a task has any class
            for puid in group.puids:  # of the ranks before
                end_processes([puid])
            self._release(group)
            self._report(self, TaskRefused(group.task, error))
        else:
            self._groups.append(group)
            self._report(self, ProcessesStarted(group.task))

    def _start_processes(self, group: _ProcessGroup) -> None:
        native = importlib.import_module("dragon.native.process")
        task = group.task
        if task.pmi and task.ranks > 1:
            templates = [self._rank(native.ProcessTemplate, task, n) for n in range(task.ranks)]
            group.mpi_group = _start_mpi_group(task.pmi, templates)
            # Those that run, then those that have ended: one may be in both. Numbered by rank.
            running, ended = group.mpi_group.puids, group.mpi_group.inactive_puids
            group.puids = sorted({*running, *(puid for puid, _ in ended)})
            return
        for rank in range(task.ranks):
            process = self._rank(native.Process, task, rank)
            process.start()
            group.puids.append(process.puid)

    def _rank(self, kind: Callable[..., Any], task: DragonTask, rank: int) -> Any:
        """Make a process, or a template of one, for a rank."""
        given = task.templates[rank]
        fields = {key: value for key, value in given.items() if key in TEMPLATE_KEYS}
        fields["env"] = {**fields["env"], TASK_VARIABLE: task_mark(self._context, task.number)}
        fields["policy"] = placement_policy(task.placements[rank], fields.get("policy"))
        target, args = rank_target(self._context, task, rank)
        if task.is_function:
            # Its output goes where that of a pool's workers goes, not into files of ours.
            for stream in ("stdout", "stderr"):
                if str(fields[stream]).endswith(f"/{task.uid}.{rank}.{stream}"):
                    del fields[stream]
        return kind(target, args=args, **fields)

    def _find_exited(self) -> bool:
        process = importlib.import_module("dragon.globalservices.process")
        puids = [
            puid for group in self._groups for puid in group.puids if puid not in group.exit_codes
        ]
        if not puids:
            return False
        exited, _ = process.multi_join(puids, timeout=0)
        codes = dict(exited or ())
        for group in self._groups[:]:
            group.exit_codes |= {puid: codes[puid] for puid in group.puids if puid in codes}
            if len(group.exit_codes) == len(group.puids):
                self._groups.remove(group)
                in_order = [group.exit_codes[puid] for puid in group.puids]
                self._report(self, ProcessesExited(group.task, in_order))
                self._release(group)
        return bool(codes)

    def _release(self, group: _ProcessGroup) -> None:
        if group.mpi_group is not None:
            # The exit codes are known; a group over several nodes raises here in 0.15.0.
            with contextlib.suppress(Exception):
                group.mpi_group.close()
        self._allocator.release(group.task)


def _start_mpi_group(pmi: str, templates: list[Any]) -> Any:
    """Start the ranks of an MPI job, of which PMI has to know as a group."""
    native = importlib.import_module("dragon.native.process_group")
    facts = importlib.import_module("dragon.infrastructure.facts")
    # Its own look at exit codes costs a core, and forgets those of the other ranks.
    group = native.ProcessGroup(pmi=facts.PMIBackend.from_str(pmi), ignore_error_on_exit=True)
    for template in templates:
        group.add_process(1, template)
    group.init()
    group.start()
    return group
