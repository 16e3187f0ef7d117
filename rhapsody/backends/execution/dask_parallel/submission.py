"""Submits tasks to Dask, a burst of them as few graphs, and notices which the scheduler refuses.

A graph that the scheduler cannot take (a worker's address that does not resolve, a parent whose
result is lost) it reports to the client's futures alone: its keys make no transition of which
`CompletionNotifier` could tell. So one future of each graph is awaited; Dask takes all keys of a
graph, or none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from rhapsody.runtime.errors import BackendError, DependencyError

from .connection import DaskConnection
from .scheduler_plugin import unknown_keys
from .task import DaskTask, GraphKey, PendingTasks, TaskResult, with_descendants
from .worker_plugin import CallFailed, ProgramFailed, Refused

__all__ = ["GraphSubmitter"]


class GraphSubmitter:
    """Gives tasks to Dask. On the client's loop.

    Args:
        connection: to the cluster.
        plugin: the name of the backend's plugins on the cluster.
        pending: the tasks that have not been settled.
    """

    def __init__(self, connection: DaskConnection, plugin: str, pending: PendingTasks) -> None:
        self._connection = connection
        self._plugin = plugin
        self._pending = pending
        self._watches: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Await no more futures."""
        for watch in self._watches:
            watch.cancel()

    def submit(self, tasks: Iterable[DaskTask]) -> None:
        """Submit one graph for all tasks of the same depth and options, parents first."""
        groups: dict[GraphKey, list[DaskTask]] = {}
        for task in tasks:
            self._pending.add(task)
            groups.setdefault(task.graph_key(), []).append(task)
        for _, group in sorted(groups.items()):
            refused = {t for t in group if t.parents and any(p.future is None for p in t.parents)}
            if refused:
                self._fail(refused, None)
                group = [task for task in group if task not in refused]
            try:
                if group:
                    self._submit_graph(group)
            except Exception as error:  # the client is closed, or refuses these options
                self._fail(group, error)

    def _submit_graph(self, tasks: list[DaskTask]) -> None:
        import dask

        first = tasks[0]
        assert first.function is not None
        iterables: list[list[object]] = [[task.payload for task in tasks]]
        if any(task.parents for task in tasks):
            iterables.append([[parent.future for parent in task.parents] for task in tasks])
        keys = [task.key for task in tasks]
        # Dask warns about large graphs, as most people put data there by mistake; here they are
        # the arguments of the author's tasks.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            futures = self._connection.client.map(
                first.function,
                *iterables,
                key=keys,
                pure=False,
                resources=first.resources or None,
                **first.map_options(),
            )
        for task, future in zip(tasks, futures, strict=True):
            task.future = future
            task.payload = None
        watch = asyncio.get_running_loop().create_task(self._watch(keys))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    # ------------------------------------------------------------------ what the scheduler refuses

    async def _watch(self, keys: list[str]) -> None:
        """Wait for the first report on a graph, and fail its tasks if Dask has not taken them."""
        # Keys, not tasks: each keeps its result on the cluster for as long as it exists.
        for key in keys:
            task = self._pending.get(key)
            if task is None or task.future is None:
                continue
            error, status = await task.future.exception(), task.future.status
            if status == "finished" or isinstance(error, (CallFailed, ProgramFailed, Refused)):
                return  # it has run, so Dask has taken the graph
            if key in self._pending:
                break
            # It was cancelled, which tells nothing about the others.
        else:
            return
        await self._fail_unknown(keys, error)

    async def _fail_unknown(self, keys: list[str], error: BaseException | None) -> None:
        """Fail those of these tasks that the scheduler does not know."""
        client = self._connection.client
        try:
            unknown = await client.run_on_scheduler(unknown_keys, self._plugin, keys)
        except OSError:
            unknown = None
        if unknown is None:  # the connection is broken, which fails all tasks elsewhere
            return
        tasks = [task for key in unknown if (task := self._pending.get(key)) is not None]
        self._fail(with_descendants(tasks), error)

    def _fail(self, tasks: Iterable[DaskTask], error: BaseException | None) -> None:
        """Settle tasks, parents first, that Dask has not taken.

        Their futures are dropped, so that Dask releases what it may have taken of them or their
        children. (To cancel a key that it has half taken breaks the client's connection:
        distributed 2026.8.)
        """
        results: list[TaskResult] = []
        for task in tasks:
            if not self._pending.discard(task):
                continue
            parent = next((p for p in task.parents if p.failure is not None), None)
            if parent is not None:
                task.failure = DependencyError(task.uid, parent.uid, parent.failure)
            else:
                task.failure = self._refusal(task, error)
            task.future = task.payload = None
            results.append(TaskResult(task, "FAILED", {"exception": task.failure}))
        self._pending.report(results)

    def _refusal(self, task: DaskTask, error: BaseException | None) -> BackendError:
        if error is None:
            return BackendError(
                f"Dask let go of task '{task.uid}': a result that it needs was lost, or its key"
                " was cancelled",
                backend=self._connection.name,
                transient=True,
            )
        options = ", ".join(f"{name}={value!r}" for name, value in task.map_options().items())
        refusal = BackendError(
            f"Dask refused task '{task.uid}'{options and f' with {options}'}:"
            f" {type(error).__name__}: {error}",
            backend=self._connection.name,
            transient=self._connection.client.status != "running",
        )
        refusal.__cause__ = error
        return refusal
