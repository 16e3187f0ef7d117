"""The Dragon backends of earlier releases: V1 starts processes per task, V2 has a pool of workers.

Both are V3 with another crew in the place of Batch: see `worker_pool` for how tasks get to the
nodes, and `node.pool_worker` for what is there. What is here is their settings and checks, and how
a task is stopped: an agent on its node does that, and says when nothing of it is left there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from rhapsody.backends.base import Event, Task
from rhapsody.runtime.errors import BackendError, ResourceError, WorkerLostError

from .backend import _ANSWER, DragonExecutionBackendV3
from .batch import BatchExecutor, NodeAgents
from .node.worker import RunContext
from .options import JOB_OPTIONS, POOL_OPTIONS, check_options
from .runtime import on_thread
from .task import DragonTask, Planner, is_job
from .worker_pool import LegacyNodeAgents, ProcessGroupExecutor, WorkerPool

__all__ = ["DragonExecutionBackendV1", "DragonExecutionBackendV2"]

logger = logging.getLogger(__name__)

# Seconds for an agent to stop a task: SIGTERM, its grace, SIGKILL, and news on the way.
_HALT = 12.0
# Seconds for the result of a process that has ended with exit code 0.
_RESULT = 5.0


class _Halt:
    """A request to the agents of some nodes that a task shall run there no more."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self.silent = set(hosts)
        self.stopped = False  # something ran, and was stopped
        self.over = asyncio.Event()
        self.held = False  # its exit codes have come meanwhile


class _Legacy(DragonExecutionBackendV3):
    """What V1 and V2 have in common."""

    known: ClassVar[tuple[str, ...]]  # keys of `resources`

    def __init__(
        self,
        resources: Mapping[str, Any] | None,
        name: str,
        num_nodes: int | None,
        node_timeout: float,
    ) -> None:
        super().__init__(name, num_nodes, node_timeout=node_timeout)
        _check_resources(name, resources, self.known)
        self._resources = {**(resources or {})}
        folder = self._resources.get("working_dir")
        self._folder_of_tasks = None if folder is None else os.path.abspath(folder)
        self._halts: dict[int, _Halt] = {}

    def _new_post(self) -> NodeAgents:
        return LegacyNodeAgents(self._from_post)

    async def _stop(self) -> None:
        if isinstance(self._crew, (ProcessGroupExecutor, WorkerPool)) and self._broken is None:
            try:  # else one begins for each that is stopped
                for flight in await on_thread(self._crew.drain, timeout=_ANSWER):
                    self._finish(flight, "CANCELED", {})
            except asyncio.TimeoutError:
                logger.warning("backend '%s' is stuck in the start of a process", self.name)
        await super()._stop()

    def _hosts_of(self, flight: DragonTask) -> Iterable[str]:
        """The nodes that a task is on."""
        raise NotImplementedError

    def _on_news(self, news: list[tuple[Any, ...]]) -> None:
        for word, number, *rest in news:
            if word == "halted" and (halt := self._halts.get(number)) is not None:
                host, ran = rest
                halt.stopped = halt.stopped or ran
                halt.silent.discard(host)
                if not halt.silent:
                    halt.over.set()
        super()._on_news(news)

    async def _stop_it(self, flight: DragonTask, stopped: asyncio.Future[bool]) -> None:
        """Stop a task wherever it is, and wait until it is known to be stopped."""
        try:
            withdrawn = await on_thread(flight.crew.withdraw, flight, timeout=_ANSWER)
            if withdrawn or (not flight.ended and await self._halt(flight)):
                self._finish(flight, "CANCELED", {})
            elif not stopped.done():
                # It has ended by itself; the news of that are on their way.
                await asyncio.wait([stopped], timeout=_RESULT)
        except asyncio.TimeoutError:
            logger.warning("no answer to the request to stop task '%s'", flight.uid)
        finally:
            halt = self._halts.pop(flight.number, None)
            if halt is not None and halt.held:
                self._try_job(flight)
            if flight.stopping is stopped:
                flight.stopping = None  # another attempt may be made
            if not stopped.done():
                stopped.set_result(False)

    async def _halt(self, flight: DragonTask) -> bool:
        """Let a task run no more; False where it had ended by itself.

        Raises:
            asyncio.TimeoutError: it cannot be stopped, or a node does not answer.
        """
        assert isinstance(self._post, LegacyNodeAgents)
        hosts = list(self._hosts_of(flight))
        began = flight.begun
        halt = self._halts[flight.number] = _Halt(hosts)
        if hosts:
            await on_thread(self._post.halt, flight.number, hosts, timeout=_ANSWER)
            await asyncio.wait_for(halt.over.wait(), _HALT)
        return not flight.ended and (halt.stopped or not began)

    def _on_broken(self, crew: BatchExecutor, error: BaseException) -> None:
        if self._stopping is None:
            self._break(
                BackendError(
                    f"backend '{self.name}' cannot start or watch its processes any more:"
                    f" {error!r}",
                    backend=self.name,
                    transient=True,
                )
            )

    def _try_job(self, flight: DragonTask) -> None:
        if (halt := self._halts.get(flight.number)) is None:
            super()._try_job(flight)
        elif flight.codes is not None:  # they may be those of our signals
            halt.held = True

    def _give_up(self, flight: DragonTask) -> None:
        if flight.number not in self._halts:
            super()._give_up(flight)


class DragonExecutionBackendV1(_Legacy):
    """Runs each task in native processes of its own: one, or one per rank.

    As many run at once as cores are granted on the nodes; the others wait. For Python functions
    this is the slow way: each starts an interpreter.

    Args:
        resources: `working_dir`, the folder in which tasks run that name none.
        name: by which tasks ask for this backend.
        num_nodes: how many nodes of the runtime to use; None for all.
        node_timeout: seconds without a sign of life after which a node is taken for lost.

    Keys of `task_backend_specific_kwargs`: `process_template`, `process_templates`, `pmi`,
    `timeout`, `cwd` and `env`, as V3 has them.

    Raises:
        BackendError: an argument is wrong; when started: Dragon is not there or does not come up.
    """

    known = ("working_dir",)
    option_keys: ClassVar[frozenset[str]] = frozenset(JOB_OPTIONS)

    def __init__(
        self,
        resources: Mapping[str, Any] | None = None,
        name: str = "dragon",
        *,
        num_nodes: int | None = None,
        node_timeout: float = 15.0,
    ) -> None:
        super().__init__(resources, name, num_nodes, node_timeout)
        self._planner = Planner(lambda: self.work_dir, self._folder_of_tasks, all_jobs=True)

    def _new_crew(self, number: int, site: RunContext) -> BatchExecutor:
        return ProcessGroupExecutor(number, site, self._from_crew)

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        nodes = self._post.nodes if self._post is not None else None
        check_options(task, options, nodes, JOB_OPTIONS, all_jobs=True)

    def _hosts_of(self, flight: DragonTask) -> Iterable[str]:
        return {place.host for place in flight.places}


class DragonExecutionBackendV2(_Legacy):
    """Runs tasks in a pool of worker processes, which lasts as long as the backend.

    The way for many small functions: it has a queue of its own to each node, and no Batch. A
    worker that dies fails the task that it ran, and is replaced. Tasks have one core: no ranks,
    no process templates, no GPUs.

    Args:
        resources: `workers`, how many on all nodes together, by default one for each granted
            core; `working_dir`, the folder in which they, and executables that name none, run.
        name: by which tasks ask for this backend.
        num_nodes: how many nodes of the runtime to use; None for all.
        node_timeout: seconds without a sign of life after which a node is taken for lost.

    Keys of `task_backend_specific_kwargs`: `timeout`; for an executable also `cwd`, `env`,
    `env_replace`, `shell` and `stdin`, as on the local backend.

    Raises:
        BackendError: an argument is wrong; when started: Dragon is not there or does not come up.
    """

    known = ("workers", "working_dir")
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
        self._planner = Planner(lambda: self.work_dir, self._folder_of_tasks)
        self._pool: WorkerPool | None = None

    def _new_crew(self, number: int, site: RunContext) -> BatchExecutor:
        self._pool = WorkerPool(
            number,
            site,
            self._from_crew,
            self._resources.get("workers"),
            self._folder_of_tasks or os.getcwd(),
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

    def _hosts_of(self, flight: DragonTask) -> Iterable[str]:
        assert self._pool is not None
        return self._pool.hosts_of(flight)

    def _on_news(self, news: list[tuple[Any, ...]]) -> None:
        if self._pool is not None:
            for word, *rest in news:
                if word == "up":
                    self._pool.on_up(*rest)
        super()._on_news(news)

    def _end(self, flight: DragonTask, state: str, fields: dict[str, Any]) -> Event | None:
        if self._pool is not None:
            self._pool.over(flight)
        return super()._end(flight, state, fields)

    def _on_lost(self, flight: DragonTask | None, host: str, number: int, pid: int) -> None:
        """A worker has died: its task is lost with it, and another takes its place."""
        if self._stopping is not None:  # it is we who end them
            return
        if flight is not None and flight.number not in self._halts:  # else we have killed it
            error = WorkerLostError(
                f"the worker process that ran task '{flight.uid}' died (pid {pid} on {host}):"
                " os._exit, a crash, or killed, for example for its memory",
                backend=self.name,
                host=host,
                transient=True,
            )
            self._finish(flight, "FAILED", {"exception": error})
        if self._pool is not None and self._pool.number == number:
            self._pool.replace(host, pid)


def _check_resources(name: str, resources: Any, known: tuple[str, ...]) -> None:
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
            f"resources['working_dir'] must be a folder that is there, not {folder!r}", backend=name
        )
    workers = resources.get("workers")
    whole = isinstance(workers, int) and not isinstance(workers, bool)
    if workers is not None and not (whole and workers >= 1):
        raise BackendError(
            f"resources['workers'] must be a number of at least 1, not {workers!r}", backend=name
        )
