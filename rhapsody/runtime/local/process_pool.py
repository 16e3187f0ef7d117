"""Function calls in processes: one thread here drives one worker process there.

A worker takes a bundle of calls in one message, and writes each result before it begins the next
call, so that whatever happens to it, it is known which call it ran: the first without a result.
Only that call is lost with it. A bundle whose calls turn out to be long is broken up, and what has
not begun goes back to the queue for idle workers.

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
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import BackendError, SerializationError, WorkerLostError

from . import pool_worker as worker
from .calls import Call, Event, Report
from .children import Children
from .frames import Frame, FrameSocket, keep_from_forks
from .worker_termination import EscapedDescendants, kill_group, workers

__all__ = ["ProcessLanes", "WorkerSpec"]

_BUNDLE_TIME = 0.005  # seconds of work that a bundle should hold
_BUNDLE_MOST = 512
_STALL = 0.01  # seconds without a result after which a bundle is broken up
_ANSWER = 1.0  # seconds in which a worker gives calls back, unless a call holds its GIL
_LEAVE = 5.0  # seconds for an idle worker to run its exit handlers


@dataclass(frozen=True)
class WorkerSpec:
    """How workers are made: as the arguments of `ProcessPoolExecutor` of these names."""

    mp_context: BaseContext
    initializer: Callable[..., Any] | None = None
    initargs: tuple[Any, ...] = ()
    max_tasks_per_child: int | None = None


class ProcessLanes:
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
        self.waiting: dict[str, Call] = {}  # by uid; who pops it, owns the call
        self.held: dict[str, _Lane] = {}  # by uid: calls that a worker has
        self.canceling: dict[str, Future[bool]] = {}  # by uid: whether it was canceled
        self.changed = threading.Condition()
        self.idle = 0
        self.stopping = False
        self.lanes: list[_Lane] = []

    def submit(self, calls: Iterable[Call]) -> None:
        """Queue calls, and start the lanes that are missing."""
        calls = list(calls)
        with self.changed:
            self.waiting.update((call.uid, call) for call in calls)
            self.queue.extend(calls)
            self.changed.notify(len(calls))
            missing = min(self.width - len(self.lanes), len(self.queue) - self.idle)
            for _ in range(missing):
                lane = _Lane(self)
                self.lanes.append(lane)
                lane.thread.start()

    def take(self, lane: _Lane, most: int) -> list[Call]:
        """Wait for calls, and give a lane its fair share of them; none when it is time to end."""
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
                    self.held[call.uid] = lane
                    taken.append(call)
                    if call.alone:
                        break
                if taken or self.stopping:
                    return taken
                self.idle += 1
                self.changed.wait()
                self.idle -= 1

    def give_back(self, calls: Iterable[Call], *, alone: bool = False) -> None:
        """Put calls that have not begun before the others; those that shall not run are CANCELED.

        Each is served in a bundle of its own from now on, if `alone`: one of them is harmful.
        """
        calls = list(calls)
        with self.changed:
            unwanted = [c for c in calls if self.stopping or c.uid in self.canceling]
            back = [call for call in calls if call not in unwanted]
            for call in reversed(back):
                call.alone = call.alone or alone
                self.waiting[call.uid] = call
                self.held.pop(call.uid, None)
                self.queue.appendleft(call)
            self.changed.notify(len(back))
        for call in unwanted:
            self.settle(call, ((call.task, "CANCELED", None),))

    def settle(self, call: Call, events: Sequence[Event]) -> None:
        """Report the end of a call that a lane holds, first of these events, and what follows."""
        lane = self.held.get(call.uid)
        ending = self.canceling.pop(call.uid, None)
        self.report(events)
        if ending is not None:
            _say(ending, events[0][1] == "CANCELED")
        # Afterwards: who cancels it and no longer finds it held relies on the report.
        with self.changed:
            if self.held.get(call.uid) is lane:  # else it is being tried again elsewhere
                self.held.pop(call.uid, None)

    async def cancel(self, uid: str, grace: float) -> bool:
        """Stop a call, with its worker if it runs; False for one that has ended meanwhile."""
        with self.changed:
            call = self.waiting.pop(uid, None)
            lane = self.held.get(uid)
            ending = self.canceling.get(uid)
            if call is None and lane is not None and ending is None:
                ending = self.canceling[uid] = Future()
                _in_thread(self._cancel_held, lane, uid, grace, ending)
        if call is not None:
            self.report([(call.task, "CANCELED", None)])
            return True
        if ending is None:
            return False
        return await asyncio.shield(asyncio.wrap_future(ending))

    def _cancel_held(self, lane: _Lane, uid: str, grace: float, ending: Future[bool]) -> None:
        lane.cancel(uid, grace)
        with self.changed:
            if self.canceling.get(uid) is ending:
                del self.canceling[uid]
        _say(ending, False)  # unless it is known otherwise by now

    def unguard(self, pid: int) -> None:
        """Forget a worker that has ended."""
        try:
            self.loop.call_soon_threadsafe(self.children.unguard, pid)
        except RuntimeError:  # the loop is closed, and the warden gone with it
            return

    async def stop(self, grace: float) -> None:
        """Cancel every call, and end the workers."""
        with self.changed:
            waiting, self.waiting = self.waiting, {}
            self.queue.clear()
            self.stopping = True
            self.changed.notify_all()
        self.report([(call.task, "CANCELED", None) for call in waiting.values()])
        ends = [asyncio.wrap_future(_in_thread(lane.end, grace)) for lane in self.lanes]
        await asyncio.gather(*ends)


def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run a blocking call on a thread of its own: the loop's default executor may be full."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="rhapsody-cancel").start()
    return future


def _say(ending: Future[bool], canceled: bool) -> None:
    with contextlib.suppress(InvalidStateError):  # it has been said
        ending.set_result(canceled)


class _Lane:
    """A thread, and the worker that it drives."""

    def __init__(self, pool: ProcessLanes) -> None:
        self.pool = pool
        self.thread = threading.Thread(target=self._run, daemon=True, name="rhapsody-lane")
        self.process: BaseProcess | None = None
        self.wire: FrameSocket | None = None
        self.tasks_done = 0
        self.bundle: deque[Call] = deque()  # the first of them runs
        self.asked_back = False
        self.begun = False  # the worker has begun the bundle's first call
        self.deaths = 0  # of workers in a row that had not
        self.send_lock = threading.Lock()
        self.progress = threading.Condition()  # a call has ended or was given back

    def _run(self) -> None:
        size = 1
        while calls := self.pool.take(self, min(size, self._room())):
            began, count = time.monotonic(), len(calls)
            self._serve(calls)
            each = (time.monotonic() - began) / count
            size = min(_BUNDLE_MOST, size * 8, max(1, int(_BUNDLE_TIME / max(each, 1e-9))))
        self._end_worker()

    def _room(self) -> int:
        """How many calls the worker may still run."""
        most = self.pool.spec.max_tasks_per_child
        return _BUNDLE_MOST if most is None else most - self.tasks_done

    def _serve(self, calls: list[Call]) -> None:
        """Have a bundle run; calls that cannot be pickled fail alone."""
        try:
            payload = serialization.dumps([_message(call) for call in calls], "calls")
        except SerializationError as error:
            if len(calls) > 1:
                self._give_back(calls, alone=True)
            else:
                self._finish(calls[0], "FAILED", {"exception": _blame(calls[0], error)})
            return
        try:
            wire = self._worker()
        except BaseException as error:  # of the system, the context's own start, or a Ctrl-C in it
            failure = BackendError(
                f"cannot start a worker process: {error!r}", backend=self.pool.name, transient=True
            )
            for call in calls:
                self._finish(call, "FAILED", {"exception": failure})
            return
        self.asked_back = self.begun = False
        with self.progress:
            self.bundle = deque(calls)
            self.progress.notify_all()
        try:
            with self.send_lock:
                wire.send(worker.BUNDLE, payload)
        except OSError:
            pass  # it has died; the reader finds out and settles
        while self.bundle and self._step(wire):
            pass
        if self._room() <= 0:
            self._end_worker()

    def _step(self, wire: FrameSocket) -> bool:
        """Take what the worker says next; False when it says no more."""
        if (
            len(self.bundle) > 1
            and not self.asked_back
            and not wire.pending()
            and not wire.readable(_STALL)
        ):
            self._ask_back()
        frame = wire.receive()
        if frame is None:
            self._bury_worker()
            return False
        if frame.kind == worker.BEGUN:
            self.begun, self.deaths = True, 0
            self.pool.report([(self.bundle[0].task, "RUNNING", None)])
        elif frame.kind.upper() in (worker.RESULT, worker.ERROR):
            self._take_result(frame)
        elif frame.kind == worker.GIVEN:
            count = int.from_bytes(frame.data, "big")
            self.asked_back = count > 0  # nothing was unpickled yet: ask again
            self._give_back([self.bundle.pop() for _ in range(count)][::-1])
        else:
            self._take_trouble(frame)
        return True

    def _take_result(self, frame: Frame) -> None:
        call = self.bundle.popleft()
        self.tasks_done += 1
        fields: dict[str, Any] = {"started": frame.started, "ended": frame.ended}
        state = "FAILED"
        if frame.kind.upper() == worker.RESULT:
            try:
                fields["return_value"] = serialization.loads(
                    frame.data, f"result of task '{call.uid}'"
                )
                state = "DONE"
            except SerializationError as error:
                fields["exception"] = error
        else:
            fields["exception"] = serialization.unpack_exception(frame.data)
        self._finish(call, state, fields, follows=frame.kind.islower())

    def _take_trouble(self, frame: Frame) -> None:
        """The worker could not unpickle the bundle, or its initializer raised."""
        cause = serialization.unpack_exception(frame.data)
        calls, self.bundle = list(self.bundle), deque()
        if frame.kind == worker.BROKEN:
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
            self._give_back(calls, alone=True)

    def _finish(
        self, call: Call, state: str, fields: dict[str, Any] | None, *, follows: bool = False
    ) -> None:
        """Report the end of a call, and that the next of the bundle has begun if it `follows`."""
        events: list[Event] = [(call.task, state, fields)]
        if follows:
            events.append((self.bundle[0].task, "RUNNING", None))
        self.pool.settle(call, events)
        with self.progress:
            self.progress.notify_all()

    # ------------------------------------------------------------------ the worker

    def _worker(self) -> FrameSocket:
        """Return the connection to the worker, which is started on the loop's thread.

        Not on this one: a process forked while another thread is inside `subprocess` inherits,
        and holds open, the pipe by which that one learns that its child has started.
        """
        if self.wire is None:
            started: Future[None] = Future()
            self.pool.loop.call_soon_threadsafe(self._start_worker, started)
            started.result()
        assert self.wire is not None
        return self.wire

    def _start_worker(self, started: Future[None]) -> None:
        spec = self.pool.spec
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            started.set_exception(error)
            return
        keep_from_forks(ours)
        try:
            process = spec.mp_context.Process(  # type: ignore[attr-defined]
                target=worker.main,
                args=(theirs, spec.initializer, spec.initargs),
                daemon=False,
            )
            with theirs, _reaping:
                process.start()
            self.pool.children.guard(process.pid)
        except BaseException as error:
            ours.close()
            started.set_exception(error)
            return
        workers.add(process)
        self.process, self.wire = process, FrameSocket(ours)
        started.set_result(None)

    def _ask_back(self) -> None:
        self.asked_back = True
        with self.send_lock:
            if self.wire is not None:
                with contextlib.suppress(OSError):  # it has died; the reader finds out
                    self.wire.send(worker.BACK)

    def _runs(self, uid: str) -> bool:
        try:
            return self.bundle[0].uid == uid
        except IndexError:
            return False

    def cancel(self, uid: str, grace: float) -> None:
        """Stop a call that this lane holds. Blocks until it has ended, or will not."""
        held = self.pool.held
        self._stop(lambda: held.get(uid) is not self, lambda: self._runs(uid), grace)

    def end(self, grace: float) -> None:
        """Stop all calls that this lane holds, and the lane itself. Blocks until it has ended."""
        held = self.pool.held
        self._stop(lambda: self not in list(held.values()), lambda: True, grace)
        self.thread.join()

    def _stop(self, over: Callable[[], bool], ours: Callable[[], bool], grace: float) -> None:
        """End the worker once it is `ours` to end, unless it is `over` before."""
        # First what has not begun comes back, so that nobody else is hit when the worker is.
        self._ask_back()
        with self.progress:
            self.progress.wait_for(lambda: over() or len(self.bundle) == 1, _ANSWER)
            # One that does not come back, as another holds the GIL, waits until that has ended.
            self.progress.wait_for(lambda: over() or (bool(self.bundle) and ours()))
        process = self.process
        if over() or not ours() or process is None or process.pid is None:
            self._await(over, None)
            return
        strays = EscapedDescendants(process.pid)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not over() and ours() and process is self.process:
                strays.signal(number)
                kill_group(process.pid, number)
            strays.go_on()
            if self._await(over, max(grace, 0.1)):
                break
        strays.signal(signal.SIGKILL)
        strays.close()

    def _await(self, over: Callable[[], bool], patience: float | None) -> bool:
        with self.progress:
            return self.progress.wait_for(over, patience)

    def _give_back(self, calls: Iterable[Call], *, alone: bool = False) -> None:
        self.pool.give_back(calls, alone=alone)
        with self.progress:
            self.progress.notify_all()

    def _bury_worker(self) -> None:
        """The worker has died: with the call that it ran, and with no other."""
        process, self.process = self.process, None
        self.tasks_done = 0
        with self.send_lock:
            if self.wire is not None:
                self.wire.sock.close()
                self.wire = None
        code = None
        if process is not None and process.pid is not None:
            kill_group(process.pid, signal.SIGKILL)
            with _reaping:  # it was killed above, so that this takes no time
                process.join()
                code = process.exitcode
            self.pool.unguard(process.pid)
        calls, self.bundle = list(self.bundle), deque()
        pool = self.pool
        victim, *others = calls
        if not self.begun:
            stopped = pool.stopping or any(call.uid in pool.canceling for call in calls)
            self.deaths += not stopped
            if stopped or len(calls) > 1 or self.deaths == 1:
                # It was killed while it was idle, or by a cancel, or by one of them that is
                # harmful to unpickle.
                self._give_back(calls, alone=self.deaths > 1)
                return
        self._give_back(others)
        if pool.stopping or victim.uid in pool.canceling:
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
        process, wire = self.process, self.wire
        self.process = self.wire = None
        self.tasks_done = 0
        if process is None or wire is None:
            return
        with self.send_lock:
            try:
                wire.send(worker.QUIT)
            except OSError:
                pass  # it has gone by itself
        process.join(_LEAVE)
        if process.pid is not None:
            kill_group(process.pid, signal.SIGKILL)
            process.join()
            self.pool.unguard(process.pid)
        wire.sock.close()


# Each start of a process polls those before it, and an exit code can be read once only: of two
# threads that read it together one is told 255, or nothing.
_reaping = threading.Lock()


def _message(call: Call) -> tuple[Any, ...]:
    return call.function, call.args, call.kwargs, call.cores, call.env


def _blame(call: Call, error: SerializationError) -> SerializationError:
    """Say which part of a call it is that cannot be pickled."""
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
