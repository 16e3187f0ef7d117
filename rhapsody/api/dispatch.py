"""Hands tasks to their backends, in the order of their submits; no backend holds up another."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.backends.constants import CANCELED, FAILED, BackendMainStates
from rhapsody.runtime.errors import BackendError, RhapsodyError
from rhapsody.runtime.text import describe_error

from .task import BaseTask

__all__ = ["Dispatcher", "Groups"]

#: tasks by the backend that runs them
Groups = dict[BaseExecutionBackend, list[BaseTask]]


class Finish(Protocol):
    """Ends those of some tasks that have not ended yet."""

    def __call__(
        self, tasks: Iterable[BaseTask], state: str, error: BaseException | None = None
    ) -> None: ...


class _Queue:
    """Through it tasks go to a backend, in the order in which they came."""

    __slots__ = ("lock", "pending")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.pending = 0  # submissions that wait for the lock, or have it


class Dispatcher:
    """Hands the tasks of a session to its backends.

    Args:
        attach: makes the session the listener of a backend; may raise BackendError.
        finish: ends tasks that could not be handed over.
        spawn: runs a coroutine in the background.
    """

    def __init__(
        self,
        attach: Callable[[BaseExecutionBackend], None],
        finish: Finish,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._attach = attach
        self._finish = finish
        self._spawn = spawn
        self._queues: defaultdict[BaseExecutionBackend, _Queue] = defaultdict(_Queue)

    async def dispatch(
        self,
        groups: Groups,
        submissions: list[asyncio.Task[None]],
        *,
        recheck: bool = False,
    ) -> None:
        """Hand each backend its tasks; what it does not take FAILED with its error.

        Waits for the backends that are running; the others are started in the background. All that
        happens in the background is added to `submissions`: where one of them is canceled, its
        tasks are CANCELED. `recheck`: the tasks were not checked just now.
        """
        work = [(backend, group) for backend, group in groups.items() if group]
        if len(work) == 1:
            ((backend, group),) = work
            queue = self._queues[backend]
            if _runs(backend) and not queue.pending and not queue.lock.locked():
                async with queue.lock:
                    await self._submit(backend, group, recheck)
                return
        later = [(backend, self._submit_later(backend, group, recheck)) for backend, group in work]
        submissions += [submission for _, submission in later]
        if soon := [submission for backend, submission in later if _runs(backend)]:
            await asyncio.wait(soon)

    async def cancel(self, submissions: list[asyncio.Task[None]]) -> None:
        """Stop submissions; the tasks that were not handed over by then are CANCELED."""
        for submission in submissions:
            submission.cancel()
        if submissions:
            await asyncio.wait(submissions)

    def _submit_later(
        self, backend: BaseExecutionBackend, group: list[BaseTask], recheck: bool
    ) -> asyncio.Task[None]:
        """Hand tasks to a backend in the background, after those that came before."""
        queue = self._queues[backend]

        async def submit() -> None:
            async with queue.lock:
                await self._submit(backend, group, recheck, waited=True)

        def done(submission: asyncio.Task[None]) -> None:
            queue.pending -= 1
            if submission.cancelled():  # perhaps before it had the lock
                self._finish(group, CANCELED)

        queue.pending += 1
        submission = self._spawn(submit())
        submission.add_done_callback(done)
        return submission

    async def _submit(
        self,
        backend: BaseExecutionBackend,
        group: list[BaseTask],
        recheck: bool,
        *,
        waited: bool = False,
    ) -> None:
        try:
            if waited:
                if not _runs(backend):
                    await backend
                    recheck = True  # some engines know only now what they have
                group = [task for task in group if not task.done()]  # canceled meanwhile
            if recheck:
                group = [task for task in group if self._accepts(backend, task)]
            if group:
                self._attach(backend)  # another session may have used it in between
                await backend.submit_checked(group)
        except Exception as error:
            self._finish(group, FAILED, _as_backend_error(error, backend))
        except BaseException:  # canceled, or what no engine should raise: nothing else ends them
            self._finish(group, CANCELED)
            raise

    def _accepts(self, backend: BaseExecutionBackend, task: BaseTask) -> bool:
        """Whether a backend can run a task; one that it cannot run FAILED with its error."""
        try:
            backend.check(task)
        except Exception as error:  # a third party's check may raise anything
            self._finish((task,), FAILED, _as_backend_error(error, backend))
            return False
        return True


def _runs(backend: BaseExecutionBackend) -> bool:
    return backend.state() == BackendMainStates.RUNNING


def _as_backend_error(error: Exception, backend: BaseExecutionBackend) -> RhapsodyError:
    if isinstance(error, RhapsodyError):
        return error
    wrapper = BackendError(
        f"backend '{backend.name}' failed: {describe_error(error)}", backend=backend.name
    )
    wrapper.__cause__ = error
    return wrapper
