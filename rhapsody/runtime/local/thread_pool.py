"""Function calls on threads: a few pumps that share one queue.

A pump is one job of the executor that takes calls until there are none. So a call costs no future,
no lock and no wake of its own, and as many calls run at once as the executor has threads.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Any

from .calls import Call, Report, is_coroutine

__all__ = ["ThreadLanes"]

# Seconds after which a pump queues behind others' jobs on the same executor.
_TURN = 0.05


class ThreadLanes:
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
        self._waiting: dict[str, Call] = {}  # by uid; who pops it, owns the call
        self._coroutines: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = {}
        self._canceled: set[str] = set()  # running coroutines that were told to stop
        self._heard: dict[str, asyncio.Future[bool]] = {}  # set when their end has been reported
        self._pumps = 0
        self._lock = threading.Lock()

    def submit(self, calls: Iterable[Call]) -> None:
        """Queue calls, and start the pumps that are missing."""
        calls = list(calls)
        for call in calls:
            self._waiting[call.uid] = call
            self._queue.append(call)
        with self._lock:
            missing = max(0, min(self._width - self._pumps, len(self._queue)))
            self._pumps += missing
        for started in range(missing):
            try:
                self._executor.submit(self._pump)
            except RuntimeError:  # it was shut down
                with self._lock:
                    self._pumps -= missing - started
                    if self._pumps:  # those that run take these calls too
                        return
                for call in calls:
                    self._waiting.pop(call.uid, None)
                raise

    async def cancel(self, uid: str, grace: float) -> bool:
        """Stop a call: one that waits, or a coroutine, which has `grace` seconds to end.

        False for one that runs on: a function, or a coroutine that will not be canceled.
        """
        call = self._waiting.pop(uid, None)
        if call is not None:
            self._report([(call.task, "CANCELED", None)])
            return True
        found = self._coroutines.get(uid)  # its thread may take it away at any time
        if found is None:
            return False
        loop, task = found
        heard = self._heard.get(uid)
        if heard is None:
            heard = self._heard[uid] = asyncio.get_running_loop().create_future()

        def stop() -> None:
            self._canceled.add(uid)
            task.cancel()

        try:
            loop.call_soon_threadsafe(stop)
        except RuntimeError:  # it has ended meanwhile, and its end may have been reported
            self._heard.pop(uid, None)
            return False
        try:
            return await asyncio.wait_for(asyncio.shield(heard), max(grace, 0.1))
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

    def _pump(self) -> None:
        until = time.monotonic() + _TURN
        report = self._report
        last: tuple[Any, str, dict[str, Any] | None] | None = None
        while True:
            try:
                call = self._queue.popleft()
            except IndexError:
                with self._lock:
                    if not self._queue:
                        self._pumps -= 1
                        break
                continue
            if self._waiting.pop(call.uid, None) is None:
                continue  # canceled
            started = (call.task, "RUNNING", None)
            # One report for an end and the next beginning.
            report((last, started) if last is not None else (started,))
            if self._heard and last is not None:
                self._tell(last)
            last = self._run(call)
            if last[2] is not None and last[2]["ended"] > until and self._queue:
                report((last,))
                self._tell(last)
                last = None
                try:
                    self._executor.submit(self._pump)
                except RuntimeError:  # its owner lets it end with what it was given: with all that
                    until = float("inf")
                else:
                    return
        if last is not None:
            report((last,))
            self._tell(last)

    def _tell(self, event: tuple[Any, str, Any]) -> None:
        """Tell those who canceled a coroutine that its end has been reported, and which it is."""
        uid = event[0]["uid"]
        self._canceled.discard(uid)
        heard = self._heard.pop(uid, None)
        if heard is None:
            return

        def tell() -> None:
            if not heard.done():
                heard.set_result(event[1] == "CANCELED")

        try:
            heard.get_loop().call_soon_threadsafe(tell)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            return

    def _run(self, call: Call) -> tuple[Any, str, dict[str, Any] | None]:
        began = time.monotonic()
        before = (
            os.sched_getaffinity(0) if call.cores and hasattr(os, "sched_setaffinity") else None
        )
        try:
            if before is not None:
                os.sched_setaffinity(0, call.cores)  # of this thread
            value = call.function(*call.args, **call.kwargs)
            if is_coroutine(value):
                value = asyncio.run(self._watched(call.uid, value))
        except BaseException as error:
            # SystemExit too: it is the function that ends, not the thread of the executor.
            if isinstance(error, asyncio.CancelledError) and call.uid in self._canceled:
                return call.task, "CANCELED", {"started": began, "ended": time.monotonic()}
            trace = error.__traceback__
            error.__traceback__ = trace.tb_next if trace is not None else None
            ended = time.monotonic()
            return call.task, "FAILED", {"exception": error, "started": began, "ended": ended}
        finally:
            if before is not None:
                os.sched_setaffinity(0, before)
        ended = time.monotonic()
        return call.task, "DONE", {"return_value": value, "started": began, "ended": ended}

    async def _watched(self, uid: str, value: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._coroutines[uid] = asyncio.get_running_loop(), task
        try:
            return await value
        finally:
            del self._coroutines[uid]
