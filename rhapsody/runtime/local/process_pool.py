"""Function calls in processes: one thread here drives one worker process there.

A worker takes a bundle of calls in one message, and writes each result before it begins the next
call, so that whatever happens to it, it is known which call it ran: the first without a result.
Only that call is lost with it. A bundle whose calls turn out to be long is broken up: what has not
begun returns to the queue for idle workers.

A `ProcessPoolExecutor` cannot be used for this: one dead worker breaks it as a whole, with the
calls of all the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import BackendError, SerializationError, WorkerLostError
from rhapsody.runtime.task import EventTuple

from . import pool_worker as remote
from .calls import Call, Report
from .children import Children
from .frames import Frame
from .worker_process import WorkerProcess, WorkerSpec, start_worker
from .worker_termination import EscapedDescendants, kill_group

__all__ = ["ProcessPool"]

_BUNDLE_SECONDS = 0.005  # of work that a bundle should hold
_BUNDLE_MOST = 512  # calls
_STALL = 0.01  # seconds without a result after which a bundle is broken up
_RETURN_WAIT = 1.0  # seconds in which a worker returns calls, unless a call holds its GIL


class ProcessPool:
    """Runs calls in worker processes, which are started as they are needed.

    Args:
        width: how many workers there may be.
        spec: how they are made.
        report: takes the events, from any thread.
        children: guards the workers' process groups.
        name: the backend's, for errors.
    """

    def __init__(
        self,
        width: int,
        spec: WorkerSpec,
        report: Report,
        children: Children,
        name: str,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.width = width
        self.spec = spec
        self.report = report
        self.children = children
        self.name = name
        self.queue: deque[Call] = deque()
        self.waiting: dict[str, Call] = {}  # by uid; whoever pops a call owns it
        self.held: dict[str, _WorkerThread] = {}  # by uid: calls that a worker has
        self.cancels: dict[str, Future[bool]] = {}  # by uid: whether it was canceled
        self.changed = threading.Condition()
        self.idle = 0
        self.stopping = False
        self.threads: list[_WorkerThread] = []

    def submit(self, calls: Iterable[Call]) -> None:
        """Queue calls, and start the threads that are missing."""
        calls = list(calls)
        with self.changed:
            self.waiting.update((call.uid, call) for call in calls)
            self.queue.extend(calls)
            self.changed.notify(len(calls))
            missing = min(self.width - len(self.threads), len(self.queue) - self.idle)
            for _ in range(missing):
                thread = _WorkerThread(self)
                self.threads.append(thread)
                thread.thread.start()

    def take(self, thread: _WorkerThread, most: int) -> list[Call]:
        """Wait for calls, and return a thread's fair share; none when it is time to end."""
        with self.changed:
            while True:
                share = min(most, -(-len(self.queue) // self.width))
                taken: list[Call] = []
                while self.queue and len(taken) < share:
                    call = self.waiting.get(self.queue[0].uid)
                    if call is not None and call.alone and taken:
                        break
                    self.queue.popleft()
                    if call is None:  # it was canceled
                        continue
                    del self.waiting[call.uid]
                    self.held[call.uid] = thread
                    taken.append(call)
                    if call.alone:
                        break
                if taken or self.stopping:
                    return taken
                self.idle += 1
                self.changed.wait()
                self.idle -= 1

    def requeue(self, calls: Iterable[Call], *, alone: bool = False) -> None:
        """Put calls that have not begun before the others; those to be canceled are CANCELED.

        If `alone`, each is sent in a bundle of its own from now on: one of them is harmful.
        """
        calls = list(calls)
        with self.changed:
            unwanted = [c for c in calls if self.stopping or c.uid in self.cancels]
            back = [call for call in calls if call not in unwanted]
            for call in reversed(back):
                call.alone = call.alone or alone
                self.waiting[call.uid] = call
                self.held.pop(call.uid, None)
                self.queue.appendleft(call)
            self.changed.notify(len(back))
        for call in unwanted:
            self.settle(call, ((call.task, "CANCELED", None),))

    def settle(self, call: Call, events: Sequence[EventTuple]) -> None:
        """Report the end of a call that a thread holds, first of these events, and the others."""
        thread = self.held.get(call.uid)
        canceled = self.cancels.pop(call.uid, None)
        self.report(events)
        if canceled is not None:
            _set_once(canceled, events[0][1] == "CANCELED")
        # Afterwards: who cancels it and no longer finds it held relies on the report.
        with self.changed:
            if self.held.get(call.uid) is thread:  # else it is being tried again elsewhere
                self.held.pop(call.uid, None)

    async def cancel(self, uid: str, grace: float) -> bool:
        """Stop a call, with its worker if it runs; False for one that has ended meanwhile."""
        with self.changed:
            call = self.waiting.pop(uid, None)
            thread = self.held.get(uid)
            canceled = self.cancels.get(uid)
            if call is None and thread is not None and canceled is None:
                canceled = self.cancels[uid] = Future()
                _in_thread(self._cancel_held, thread, uid, grace, canceled)
        if call is not None:
            self.report([(call.task, "CANCELED", None)])
            return True
        if canceled is None:
            return False
        return await asyncio.shield(asyncio.wrap_future(canceled))

    def _cancel_held(
        self, thread: _WorkerThread, uid: str, grace: float, canceled: Future[bool]
    ) -> None:
        thread.cancel(uid, grace)
        with self.changed:
            if self.cancels.get(uid) is canceled:
                del self.cancels[uid]
        _set_once(canceled, False)  # unless its end has been reported by now

    async def stop(self, grace: float) -> None:
        """Cancel every call, and end the workers."""
        with self.changed:
            waiting, self.waiting = self.waiting, {}
            self.queue.clear()
            self.stopping = True
            self.changed.notify_all()
        self.report([(call.task, "CANCELED", None) for call in waiting.values()])
        ends = [asyncio.wrap_future(_in_thread(thread.end, grace)) for thread in self.threads]
        await asyncio.gather(*ends)


def _in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run a blocking call on a thread of its own: the loop's default executor may be full."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="rhapsody-cancel").start()
    return future


def _set_once(future: Future[bool], value: bool) -> None:
    with contextlib.suppress(InvalidStateError):  # another thread has set it
        future.set_result(value)


class _WorkerThread:
    """A thread, and the worker process that it drives."""

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool
        self.thread = threading.Thread(target=self._run, daemon=True, name="rhapsody-worker")
        self.worker: WorkerProcess | None = None
        self.bundle: deque[Call] = deque()  # the first of them runs
        self.asked_to_return = False
        self.begun = False  # the worker has begun the bundle's first call
        self.deaths = 0  # of workers in a row that had not
        self.progress = threading.Condition()  # a call has ended or was returned

    def _run(self) -> None:
        size = 1
        while calls := self.pool.take(self, min(size, self._capacity())):
            began, count = time.monotonic(), len(calls)
            self._run_bundle(calls)
            each = (time.monotonic() - began) / count
            size = min(_BUNDLE_MOST, size * 8, max(1, int(_BUNDLE_SECONDS / max(each, 1e-9))))
        self._end_worker()

    def _capacity(self) -> int:
        """Return how many calls the worker may still run."""
        most = self.pool.spec.max_tasks_per_child
        if most is None:
            return _BUNDLE_MOST
        return most if self.worker is None else most - self.worker.calls_done

    def _run_bundle(self, calls: list[Call]) -> None:
        """Have the worker run a bundle; calls that cannot be pickled fail alone."""
        try:
            payload = serialization.dumps([_message(call) for call in calls], "calls")
        except SerializationError as error:
            if len(calls) > 1:
                self._requeue(calls, alone=True)
            else:
                self._finish(calls[0], "FAILED", {"exception": _blame(calls[0], error)})
            return
        try:
            worker = self._ensure_worker()
        except BaseException as error:
            failure = BackendError(
                f"cannot start a worker process: {error!r}", backend=self.pool.name, transient=True
            )
            for call in calls:
                self._finish(call, "FAILED", {"exception": failure})
            return
        self.asked_to_return = self.begun = False
        with self.progress:
            self.bundle = deque(calls)
            self.progress.notify_all()
        worker.send(remote.BUNDLE, payload)
        while self.bundle and self._receive(worker):
            pass
        if self._capacity() <= 0:
            self._end_worker()

    def _receive(self, worker: WorkerProcess) -> bool:
        """Take the worker's next frame; False when it has died."""
        connection = worker.connection
        if (
            len(self.bundle) > 1
            and not self.asked_to_return
            and not connection.pending()
            and not connection.readable(_STALL)
        ):
            self._ask_to_return()
        frame = connection.receive()
        if frame is None:
            self._lose_worker(worker)
            return False
        if frame.kind == remote.BEGUN:
            self.begun, self.deaths = True, 0
            self.pool.report([(self.bundle[0].task, "RUNNING", None)])
        elif frame.kind.upper() in (remote.RESULT, remote.ERROR):
            worker.calls_done += 1
            self._take_result(frame)
        elif frame.kind == remote.RETURNED:
            count = int.from_bytes(frame.data, "big")
            self.asked_to_return = count > 0  # nothing was unpickled yet: ask again
            self._requeue([self.bundle.pop() for _ in range(count)][::-1])
        else:
            self._take_failure(frame)
        return True

    def _take_result(self, frame: Frame) -> None:
        call = self.bundle.popleft()
        fields: dict[str, Any] = {"started": frame.started, "ended": frame.ended}
        state = "FAILED"
        if frame.kind.upper() == remote.RESULT:
            try:
                fields["return_value"] = serialization.loads(
                    frame.data, f"result of task '{call.uid}'"
                )
                state = "DONE"
            except SerializationError as error:
                fields["exception"] = error
        else:
            fields["exception"] = serialization.unpack_exception(frame.data)
        self._finish(call, state, fields, next_begun=frame.kind.islower())

    def _take_failure(self, frame: Frame) -> None:
        """The worker could not unpickle the bundle, or its initializer raised."""
        cause = serialization.unpack_exception(frame.data)
        calls, self.bundle = list(self.bundle), deque()
        if frame.kind == remote.BROKEN:
            self._end_worker()
            error = BackendError(
                f"the initializer of the worker processes raised {cause!r}", backend=self.pool.name
            )
            error.__cause__ = cause
            for call in calls:
                self._finish(call, "FAILED", {"exception": error})
        elif len(calls) == 1:
            self._finish(calls[0], "FAILED", {"exception": cause})
        else:
            self._requeue(calls, alone=True)

    def _finish(
        self, call: Call, state: str, fields: dict[str, Any] | None, *, next_begun: bool = False
    ) -> None:
        """Report the end of a call, and where the bundle's next one has begun, that too."""
        events: list[EventTuple] = [(call.task, state, fields)]
        if next_begun:
            events.append((self.bundle[0].task, "RUNNING", None))
        self.pool.settle(call, events)
        with self.progress:
            self.progress.notify_all()

    # ------------------------------------------------------------------ the worker

    def _ensure_worker(self) -> WorkerProcess:
        if self.worker is None:
            pool = self.pool
            self.worker = start_worker(pool.spec, pool.loop, pool.children)
        return self.worker

    def _ask_to_return(self) -> None:
        """Ask the worker to return the calls of the bundle that have not begun."""
        self.asked_to_return = True
        worker = self.worker
        if worker is not None:
            worker.send(remote.RETURN)

    def _is_running(self, uid: str) -> bool:
        try:
            return self.bundle[0].uid == uid
        except IndexError:
            return False

    def cancel(self, uid: str, grace: float) -> None:
        """Stop a call that this thread holds. Blocks until it has ended, or will not."""
        held = self.pool.held
        self._stop(lambda: held.get(uid) is not self, lambda: self._is_running(uid), grace)

    def end(self, grace: float) -> None:
        """Stop all calls that this thread holds, and the thread. Blocks until it has ended."""
        held = self.pool.held
        self._stop(lambda: self not in list(held.values()), lambda: True, grace)
        self.thread.join()

    def _stop(self, over: Callable[[], bool], may_kill: Callable[[], bool], grace: float) -> None:
        """End the worker once we `may_kill` it, unless what is to be stopped is `over` before."""
        # First what has not begun is returned, so that nothing else is hit when the worker is.
        self._ask_to_return()
        with self.progress:
            self.progress.wait_for(lambda: over() or len(self.bundle) == 1, _RETURN_WAIT)
            # What is not returned, as another call holds the GIL, waits until that has ended.
            self.progress.wait_for(lambda: over() or (bool(self.bundle) and may_kill()))
        worker = self.worker
        if over() or not may_kill() or worker is None:
            self._wait_for(over, None)
            return
        escaped = EscapedDescendants(worker.pid)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not over() and may_kill() and worker is self.worker:
                escaped.signal(number)
                kill_group(worker.pid, number)
            escaped.go_on()
            if self._wait_for(over, max(grace, 0.1)):
                break
        escaped.signal(signal.SIGKILL)
        escaped.close()

    def _wait_for(self, over: Callable[[], bool], timeout: float | None) -> bool:
        with self.progress:
            return self.progress.wait_for(over, timeout)

    def _requeue(self, calls: Iterable[Call], *, alone: bool = False) -> None:
        self.pool.requeue(calls, alone=alone)
        with self.progress:
            self.progress.notify_all()

    def _lose_worker(self, worker: WorkerProcess) -> None:
        """The worker has died: with the call that it ran, and with no other."""
        self.worker = None
        code = worker.reap()
        calls, self.bundle = list(self.bundle), deque()
        pool = self.pool
        victim, *others = calls
        if not self.begun:
            stopped = pool.stopping or any(call.uid in pool.cancels for call in calls)
            self.deaths += not stopped
            if stopped or len(calls) > 1 or self.deaths == 1:
                # It was killed while it was idle, or by a cancel, or by one of them that is
                # harmful to unpickle.
                self._requeue(calls, alone=self.deaths > 1)
                return
        self._requeue(others)
        if pool.stopping or victim.uid in pool.cancels:
            self._finish(victim, "CANCELED", None)
            return
        when = "ran" if self.begun else "was to run"
        how = f"killed by {_signal_name(-code)}" if code and code < 0 else f"exit code {code}"
        error = WorkerLostError(
            f"the worker process that {when} task '{victim.uid}' died ({how})",
            backend=pool.name,
            host=socket.gethostname(),
            transient=True,
        )
        self._finish(victim, "FAILED", {"exception": error})

    def _end_worker(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.end()


def _message(call: Call) -> remote.CallMessage:
    return call.function, call.args, call.kwargs, call.cores, call.env


def _blame(call: Call, error: SerializationError) -> SerializationError:
    """Return the error of the part of a call that cannot be pickled."""
    parts = [("function", call.function)]
    parts += [(f"argument {number}", value) for number, value in enumerate(call.args)]
    parts += [(f"argument {name}=", value) for name, value in call.kwargs.items()]
    for what, value in parts:
        try:
            serialization.dumps(value, f"{what} of task '{call.uid}'")
        except SerializationError as blamed:
            return blamed
    return error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
