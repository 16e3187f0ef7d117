"""The Dragon backends of earlier releases: V1 starts processes per task, V2 has a pool of workers.

They have the life cycle of `base`, as V3 has. What is here is their settings and checks, and how a
task is stopped: an agent on its node does that, and replies when nothing of it is left there.
"""

from __future__ import annotations

import asyncio
import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from rhapsody.backends.base import Task
from rhapsody.runtime.errors import BackendError, ResourceError

from .agents import NodeAgents
from .base import ANSWER_TIMEOUT, BaseDragonBackend
from .executor import Executor, QueuedExecutor
from .node.messages import RevokeReply, StopReply, WorkerLost, WorkerUp
from .options import JOB_OPTIONS, POOL_OPTIONS, check_options
from .process_groups import ProcessGroupExecutor
from .runtime import on_thread
from .task import DragonTask, Outcome, is_job
from .worker_pool import WorkerPool

__all__ = ["DragonExecutionBackendV1", "DragonExecutionBackendV2"]

# Seconds for an agent to stop a task: SIGTERM, its grace, SIGKILL, and messages on the way.
_STOP = 12.0
# Seconds for the report of a task that has ended by itself.
_RESULT = 5.0


class _Stop:
    """A request to the agents of some nodes to stop a task."""

    def __init__(self, hosts: set[str]) -> None:
        self._silent = hosts
        self.signalled = False  # something ran, and got a signal
        self.answered = asyncio.Event()

    def add(self, reply: StopReply) -> None:
        """Take the answer of a node."""
        self.signalled = self.signalled or reply.signalled
        self._silent.discard(reply.host)
        if not self._silent:
            self.answered.set()


class _LegacyBackend(BaseDragonBackend):
    """What V1 and V2 have in common.

    Args:
        resources: the settings of 0.6, by the names in `setting_names`.
        name: by which tasks ask for this backend.
        num_nodes: how many nodes of the runtime to use; None for all.
        node_timeout: seconds without a heartbeat after which a node is taken for lost.
        all_jobs: whether every task runs in processes of its own.
    """

    setting_names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        resources: Mapping[str, Any] | None,
        name: str,
        num_nodes: int | None,
        node_timeout: float,
        *,
        all_jobs: bool = False,
    ) -> None:
        _check_settings(name, resources, self.setting_names)
        self._settings = {**(resources or {})}
        cwd = self._settings.get("working_dir")
        self._cwd = None if cwd is None else os.path.abspath(cwd)
        super().__init__(
            name,
            num_nodes,
            node_timeout,
            cwd=self._cwd,
            all_jobs=all_jobs,
            by_granted_cpus=True,
        )
        self._stops: dict[int, _Stop] = {}

    @abstractmethod
    def _new_executor(self, number: int, agents: NodeAgents) -> QueuedExecutor: ...

    async def _stop_submitted(
        self, task: DragonTask, executor: Executor, ended: asyncio.Future[bool]
    ) -> None:
        assert isinstance(executor, QueuedExecutor)
        # Until the agents have answered, exit codes and lost workers may come from their signals.
        task.stopping_on_nodes = True
        try:
            if await self._stop_on_nodes(task, executor.hosts_of(task)):
                self._settle(task, Outcome("CANCELED", {}))
        finally:
            task.stopping_on_nodes = False
            self._try_job(task)
        await asyncio.wait([ended], timeout=_RESULT)

    async def _stop_on_nodes(self, task: DragonTask, hosts: set[str]) -> bool:
        """Let a task run no more; False where it had ended by itself.

        Raises:
            asyncio.TimeoutError: it cannot be stopped, or a node does not answer.
        """
        assert self._agents is not None
        had_started = task.started
        stop = self._stops[task.number] = _Stop(set(hosts))
        try:
            if hosts:
                await on_thread(self._agents.stop, task.number, hosts, timeout=ANSWER_TIMEOUT)
                await asyncio.wait_for(stop.answered.wait(), _STOP)
        finally:
            del self._stops[task.number]
        return not task.ended and (stop.signalled or not had_started)

    def _on_reply(self, message: RevokeReply | StopReply | WorkerUp) -> None:
        if isinstance(message, StopReply) and message.number in self._stops:
            self._stops[message.number].add(message)


class DragonExecutionBackendV1(_LegacyBackend):
    """Runs each task in native processes of its own: one, or one per rank.

    As many run at once as cores are granted on the nodes; the others wait. For Python functions
    this is the slow way: each starts an interpreter.

    Args:
        resources: `working_dir`, the folder in which tasks run that name none.
        name: by which tasks ask for this backend.
        num_nodes: how many nodes of the runtime to use; None for all.
        node_timeout: seconds without a heartbeat after which a node is taken for lost.

    Keys of `task_backend_specific_kwargs`: `process_template`, `process_templates`, `pmi`,
    `timeout`, `cwd` and `env`, as V3 has them.

    Raises:
        BackendError: an argument is wrong; when started: Dragon is not there or does not come up.
    """

    setting_names = ("working_dir",)
    option_keys: ClassVar[frozenset[str]] = frozenset(JOB_OPTIONS)

    def __init__(
        self,
        resources: Mapping[str, Any] | None = None,
        name: str = "dragon",
        *,
        num_nodes: int | None = None,
        node_timeout: float = 15.0,
    ) -> None:
        super().__init__(resources, name, num_nodes, node_timeout, all_jobs=True)

    def _new_executor(self, number: int, agents: NodeAgents) -> QueuedExecutor:
        return ProcessGroupExecutor(number, agents.context, self._report_executor)

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        nodes = self._agents.nodes if self._agents is not None else None
        check_options(task, options, nodes, JOB_OPTIONS, all_jobs=True)


class DragonExecutionBackendV2(_LegacyBackend):
    """Runs tasks in a pool of worker processes, which lasts as long as the backend.

    The way for many small functions: it has a queue of its own to each node, and no Batch. A
    worker that dies fails the task that it ran, and is replaced. Tasks have one core: no ranks,
    no process templates, no GPUs.

    Args:
        resources: `workers`, how many on all nodes together, by default one for each granted
            core; `working_dir`, the folder in which they, and executables that name none, run.
        name: by which tasks ask for this backend.
        num_nodes: how many nodes of the runtime to use; None for all.
        node_timeout: seconds without a heartbeat after which a node is taken for lost.

    Keys of `task_backend_specific_kwargs`: `timeout`; for an executable also `cwd`, `env`,
    `env_replace`, `shell` and `stdin`, as on the local backend.

    Raises:
        BackendError: an argument is wrong; when started: Dragon is not there or does not come up.
    """

    setting_names = ("workers", "working_dir")
    option_keys: ClassVar[frozenset[str]] = frozenset(POOL_OPTIONS)

    def __init__(
        self,
        resources: Mapping[str, Any] | None = None,
        name: str = "dragon",
        *,
        num_nodes: int | None = None,
        node_timeout: float = 15.0,
    ) -> None:
        super().__init__(resources, name, num_nodes, node_timeout)
        self._pool: WorkerPool | None = None

    def _new_executor(self, number: int, agents: NodeAgents) -> QueuedExecutor:
        self._pool = WorkerPool(
            number,
            agents.context,
            self._report_executor,
            self._settings.get("workers"),
            self._cwd or os.getcwd(),
            lambda: self.work_dir,
        )
        return self._pool

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        if is_job(task, options):
            raise ResourceError(
                f"task '{task['uid']}' asks for several ranks or cores, or for GPUs, and the pool"
                f" of backend '{self.name}' runs each task on one core; use the backend dragon_v3"
                " or dragon_v1"
            )
        check_options(task, options, None, POOL_OPTIONS)

    def _on_reply(self, message: RevokeReply | StopReply | WorkerUp) -> None:
        if isinstance(message, WorkerUp):
            if self._pool is not None:  # it comes up before it is one of the executors
                self._pool.on_worker_up(message)
        else:
            super()._on_reply(message)

    def _on_settled(self, task: DragonTask) -> None:
        if self._pool is not None:
            self._pool.on_task_ended(task)

    def _on_worker_lost(self, lost: WorkerLost) -> None:
        if self._pool is not None and self._pool.number == lost.executor:
            self._pool.on_worker_lost(lost)


def _check_settings(name: str, resources: object, known: tuple[str, ...]) -> None:
    if resources is None:
        return
    accepted = f"accepted: {', '.join(known)}"
    if not isinstance(resources, Mapping):
        raise BackendError(f"resources must be a dict, not {resources!r}; {accepted}", backend=name)
    if unknown := sorted(resources.keys() - set(known)):
        raise BackendError(
            f"resources does not have {', '.join(map(repr, unknown))}; {accepted}", backend=name
        )
    folder = resources.get("working_dir")
    if folder is not None and not (
        isinstance(folder, (str, os.PathLike)) and os.path.isdir(folder)
    ):
        raise BackendError(
            f"resources['working_dir'] must be an existing folder, not {folder!r}", backend=name
        )
    workers = resources.get("workers")
    whole = isinstance(workers, int) and not isinstance(workers, bool)
    if workers is not None and not (whole and workers >= 1):
        raise BackendError(
            f"resources['workers'] must be an int of at least 1, not {workers!r}", backend=name
        )
