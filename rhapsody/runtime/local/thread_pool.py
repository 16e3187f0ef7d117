"""Function calls on threads: a few runners share one queue of calls.

A runner is one job of the executor, which takes calls until there are none. So a call needs no
future, no lock and no wake-up of its own, and as many run at once as the executor has threads.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from concurrent.futures import Executor
from typing import Any, NamedTuple

from rhapsody.runtime.task import EventTuple

from .calls import Call, Report, call_function, strip_frames

__all__ = ["ThreadPool"]

# Seconds after which a runner queues behind others' jobs on the same executor.
_TURN = 0.05


class _RunningCoroutine(NamedTuple):
    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[Any]


class _Watcher:
    """Registers the coroutines of one runner; made once, not for each call."""

    __slots__ = ("_coroutines", "uid")

    def __init__(self, coroutines: dict[str, _RunningCoroutine]) -> None:
        self._coroutines = coroutines
        self.uid = ""  # of the call that runs

    async def watch(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._coroutines[self.uid] = _RunningCoroutine(asyncio.get_running_loop(), task)
        try:
            return await coroutine
        finally:
            del self._coroutines[self.uid]


class ThreadPool:
    """Runs calls on the threads of an executor.

    Args:
        executor: any whose jobs run in this process.
        width: how many jobs it runs at once.
        report: takes the events, from any thread.
    """

    def __init__(self, executor: Executor, width: int, report: Report) -> None:
        self._executor = executor
        self._width = width
        self._report = report
        self._queue: deque[Call] = deque()
        self._waiting: dict[str, Call] = {}  # by uid; whoever pops a call owns it
        self._coroutines: dict[str, _RunningCoroutine] = {}
        self._canceled: set[str] = set()  # uids of running coroutines that were told to stop
        # By uid: whether the coroutine was canceled; set once its end has been reported.
        self._cancels: dict[str, asyncio.Future[bool]] = {}
        self._runners = 0
        self._lock = threading.Lock()

    def submit(self, calls: Iterable[Call]) -> None:
        """Queue calls, and start the runners that are missing.

        Raises:
            RuntimeError: the executor was shut down; none of the calls will run.
        """
        calls = list(calls)
        for call in calls:
            self._waiting[call.uid] = call
            self._queue.append(call)
        with self._lock:
            missing = max(0, min(self._width - self._runners, len(self._queue)))
            self._runners += missing
        for started in range(missing):
            try:
                self._executor.submit(self._run_queue)
            except RuntimeError:  # it was shut down
                with self._lock:
                    self._runners -= missing - started
                    if self._runners:  # those that run take these calls too
                        return
                for call in calls:
                    self._waiting.pop(call.uid, None)
                raise

    async def cancel(self, uid: str, grace: float) -> bool:
        """Stop a call: one that waits, or a coroutine, which has `grace` seconds to end.

        Returns False for one that runs on: a function, or a coroutine that suppresses it.
        """
        call = self._waiting.pop(uid, None)
        if call is not None:
            self._report([(call.task, "CANCELED", None)])
            return True
        running = self._coroutines.get(uid)  # its thread may remove it at any time
        if running is None:
            return False
        canceled = self._cancels.get(uid)
        if canceled is None:
            canceled = self._cancels[uid] = asyncio.get_running_loop().create_future()

        def stop() -> None:
            self._canceled.add(uid)
            running.task.cancel()

        try:
            running.loop.call_soon_threadsafe(stop)
        except RuntimeError:  # it has ended meanwhile, and its end may have been reported
            self._cancels.pop(uid, None)
            return False
        try:
            return await asyncio.wait_for(asyncio.shield(canceled), max(grace, 0.1))
        except asyncio.TimeoutError:
            return False

    def cancel_waiting(self) -> None:
        """Cancel every call that has not begun."""
        while True:
            try:
                _, call = self._waiting.popitem()
            except KeyError:
                return
            self._report([(call.task, "CANCELED", None)])

    @property
    def coroutines(self) -> list[str]:
        """Uids of the running async functions, which can be canceled."""
        return list(self._coroutines)

    def _run_queue(self) -> None:
        until = time.monotonic() + _TURN
        report = self._report
        watcher = _Watcher(self._coroutines)
        last: EventTuple | None = None
        while True:
            try:
                call = self._queue.popleft()
            except IndexError:
                with self._lock:
                    if not self._queue:
                        self._runners -= 1
                        break
                continue
            if self._waiting.pop(call.uid, None) is None:
                continue  # canceled
            started = (call.task, "RUNNING", None)
            # One report for an end and the next beginning.
            report((last, started) if last is not None else (started,))
            if self._cancels and last is not None:
                self._answer_cancel(last)
            last = self._run(call, watcher)
            if last[2] is not None and last[2]["ended"] > until and self._queue:
                report((last,))
                self._answer_cancel(last)
                last = None
                try:
                    self._executor.submit(self._run_queue)
                except RuntimeError:  # shut down: it still runs what was queued, here, all of it
                    until = float("inf")
                else:
                    return
        if last is not None:
            report((last,))
            self._answer_cancel(last)

    def _answer_cancel(self, event: EventTuple) -> None:
        """Tell whoever canceled a coroutine that its end has been reported, and which it is."""
        uid = event[0]["uid"]
        self._canceled.discard(uid)
        canceled = self._cancels.pop(uid, None)
        if canceled is None:
            return

        def answer() -> None:
            if not canceled.done():
                canceled.set_result(event[1] == "CANCELED")

        try:
            canceled.get_loop().call_soon_threadsafe(answer)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            return

    def _run(self, call: Call, watcher: _Watcher) -> EventTuple:
        uid = watcher.uid = call.uid
        began = time.monotonic()
        try:
            value = call_function(
                call.function, call.args, call.kwargs, call.cores, None, watcher.watch
            )
        except BaseException as error:
            # SystemExit too: it is the function that ends, not the thread of the executor.
            times = {"started": began, "ended": time.monotonic()}
            if isinstance(error, asyncio.CancelledError) and uid in self._canceled:
                return call.task, "CANCELED", times
            strip_frames(error)
            return call.task, "FAILED", {"exception": error, **times}
        ended = time.monotonic()
        return call.task, "DONE", {"return_value": value, "started": began, "ended": ended}
