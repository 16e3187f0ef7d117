"""Stops tasks on workers, which may themselves be dying, and removes them from Dask."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from rhapsody.runtime.errors import DependencyError

from .connection import DaskConnection
from .messages import StopResult
from .results import ResultGatherer
from .scheduler_plugin import assigned_keys
from .task import DaskTask, PendingTasks, TaskResult, with_descendants
from .worker_plugin import GRACE, stop_calls

__all__ = ["STOP_TIMEOUT", "TaskCanceller"]

logger = logging.getLogger(__name__)

# Seconds for workers to stop calls and answer; `TaskTracker.stop` takes up to 7.
_ANSWER_TIMEOUT = 10.0
#: Seconds that `TaskCanceller.stop` takes at the most: it asks up to three times.
STOP_TIMEOUT = 3 * _ANSWER_TIMEOUT


class TaskCanceller:
    """Stops tasks, all that are cancelled in one turn of the backend's loop together.

    Args:
        connection: to the cluster.
        plugin: the name of the backend's plugins on the cluster.
        pending: the tasks that have not been settled.
        gatherer: takes the results of those that were not stopped after all.
    """

    def __init__(
        self,
        connection: DaskConnection,
        plugin: str,
        pending: PendingTasks,
        gatherer: ResultGatherer,
    ) -> None:
        self._connection = connection
        self._plugin = plugin
        self._pending = pending
        self._gatherer = gatherer
        self._requests: dict[DaskTask, asyncio.Future[bool]] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ on the backend's loop

    async def cancel(self, task: DaskTask) -> bool:
        """Stop a task; returns whether it is known not to run any more."""
        loop = asyncio.get_running_loop()
        if not self._requests:
            loop.call_soon(self._start_stopping)
        if task not in self._requests:
            self._requests[task] = loop.create_future()
        return await asyncio.shield(self._requests[task])

    def _start_stopping(self) -> None:
        requests, self._requests = self._requests, {}
        stopping = asyncio.get_running_loop().create_task(self._stop_requested(requests))
        self._stopping.add(stopping)
        stopping.add_done_callback(self._stopping.discard)

    async def _stop_requested(self, requests: dict[DaskTask, asyncio.Future[bool]]) -> None:
        stopped: set[DaskTask] = set()
        try:
            stopped = await self.stop(list(requests))
        except (OSError, asyncio.TimeoutError) as error:
            logger.warning("backend '%s' could not cancel: %r", self._connection.name, error)
        finally:
            for task, future in requests.items():
                if not future.done():
                    future.set_result(task in stopped)

    async def stop(self, tasks: list[DaskTask]) -> set[DaskTask]:
        """Stop tasks wherever they are; returns those that are known not to run any more.

        Every worker is asked: one that has not started a task will refuse it, so that none can
        escape by being moved from worker to worker.

        Raises:
            asyncio.TimeoutError: the scheduler does not answer.
            OSError: the connection to it is broken.
        """
        for task in tasks:
            task.stopping = True
        try:
            answers = await self._ask([task.key for task in tasks])
        except BaseException:
            await self._connection.call(self._resume, tasks)
            raise
        told: dict[str, set[StopResult]] = {task.key: set() for task in tasks}
        for answer in answers.values():
            for key, result in answer.items():
                told[key].add(result)
        ended = {StopResult.STOPPED, StopResult.ABSENT}
        stopped = [task for task in tasks if told[task.key] <= ended]
        removed = await self._connection.call(self._remove, stopped)
        await self._connection.call(self._resume, [t for t in tasks if t not in removed])
        return removed

    # ------------------------------------------------------------------ the workers

    async def _ask(self, keys: list[str]) -> dict[str, dict[str, StopResult]]:
        """Ask every worker to stop keys; returns its `StopResult` of each, by its address."""
        answers: dict[str, Any] = {}
        with contextlib.suppress(asyncio.TimeoutError):
            answers = await self._ask_workers(keys, None)
        if answers and all(isinstance(answer, dict) for answer in answers.values()):
            return answers
        # One that has just died, or hangs, keeps the scheduler from answering for all of them.
        client, call = self._connection.client, self._connection.call
        asked = call(client.run_on_scheduler, assigned_keys, keys)
        assigned: dict[str, list[str]] = await asyncio.wait_for(asked, _ANSWER_TIMEOUT)
        each = await asyncio.gather(
            *(self._ask_workers(keys, [address]) for address in assigned), return_exceptions=True
        )
        for (address, theirs), found in zip(assigned.items(), each, strict=True):
            answer = found.get(address) if isinstance(found, dict) else None
            unknown = dict.fromkeys(theirs, StopResult.UNKNOWN)
            answers[address] = answer if isinstance(answer, dict) else unknown
        return {address: answers[address] for address in assigned}

    async def _ask_workers(self, keys: list[str], workers: list[str] | None) -> dict[str, Any]:
        asked = self._connection.call(
            self._connection.client.run,
            stop_calls,
            self._plugin,
            keys,
            GRACE,
            workers=workers,
            on_error="return",
        )
        return await asyncio.wait_for(asked, _ANSWER_TIMEOUT)

    # ------------------------------------------------------------------ on the client's loop

    async def _resume(self, tasks: Iterable[DaskTask]) -> None:
        """Take tasks as not cancelled after all: what they came to in the meantime counts."""
        for task in tasks:
            task.stopping = False
        deferred = []
        for task in with_descendants(tasks):
            if task.deferred is not None:
                deferred.append(task.deferred)
                task.deferred = None
        self._gatherer.add(deferred)

    async def _remove(self, stopped: Iterable[DaskTask]) -> set[DaskTask]:
        """Release stopped tasks and their descendants; returns those that had not been settled."""
        canceled = [task for task in stopped if self._pending.discard(task)]
        if not canceled:
            return set()
        results = [TaskResult(task, "CANCELED") for task in canceled]
        removed = set(canceled)
        for child in with_descendants(canceled):
            if self._pending.discard(child):
                parent = next((p for p in child.parents if p in removed), child.parents[0])
                removed.add(child)
                child.failure = DependencyError(child.uid, parent.uid, parent.failure)
                results.append(TaskResult(child, "FAILED", {"exception": child.failure}))
        await self._connection.client.cancel([r.task.future for r in results if r.task.future])
        self._pending.report(results)
        return set(canceled)
