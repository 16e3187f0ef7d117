"""What of the Dragon backends runs on the nodes: orders in, news out, and an agent on each.

A worker of Dragon's runs a function on its own thread, as one of Dragon's, so that the function
can use what Dragon offers; an executable runs as a child of that worker. What the worker runs it
notes in a file of the node, where the agent sees it: so the agent tells what has begun, and which
task a worker has taken down with it.

News are bytes on a native queue: a pickled list of tuples, the word first.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import pickle
import queue as queues
import re
import select
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

from rhapsody.launch.dragon.pmix import can_load_pmix
from rhapsody.runtime import serialization
from rhapsody.runtime.local.calls import call_function, strip_frames
from rhapsody.runtime.local.executables import (
    ExecutableRun,
    ExecutableRunner,
    Outcome,
    describe,
    start_error,
)
from rhapsody.runtime.machine.hardware import granted_cores

__all__ = ["GroupJoinPatch", "RunContext", "TaskMessage", "agent", "run_order", "run_rank"]

#: seconds between SIGTERM and SIGKILL
GRACE = 2.0
#: seconds between two beats of a node
BEAT_EVERY = 0.5
# Seconds for which the agent waits for a worker's death before it looks for what has begun.
_LOOK_EVERY = 0.1
# Bytes of a result from which on it goes through a file: a queue's message lies in shared memory.
_SPILL = 16 << 20
# Seconds for the process of a group of ranks to go, when they have ended.
_GROUP_END = 60.0
# Dragon cancels by an exception that it raises in the thread, which hears of it when it wakes.
_LISTEN = 0.1


class RunContext(NamedTuple):
    """What everything on the nodes has to know."""

    token: str  # names the folder of each node, and nobody else knows it
    queue: bytes  # the pickled native queue for news


class TaskMessage(NamedTuple):
    """A task as it travels: a pickled call, or an executable as a plain dict."""

    folder: str  # for output files and large results
    call: bytes | None = None
    program: dict[str, Any] | None = None


class Revoked(Exception):  # noqa: N818 - nobody sees it as an error
    """Raised in place of a task that was cancelled before it began."""


class Stopped(BaseException):
    """Raised in a task that is cancelled while it runs, by a signal to its worker."""


def _folder(site: RunContext) -> str:
    """The folder of this node: of this user alone, and in no way to be guessed.

    Of this node alone, even if all have one file system for what is temporary.
    """
    return os.path.join(tempfile.gettempdir(), f"rhapsody-{site.token}-{socket.gethostname()}")


def _revoked(folder: str, crew: int, number: int | None = None) -> str:
    """The file that tells that a task, or all of a crew, must not begin any more."""
    return os.path.join(folder, f"revoked-{crew}" + (f"-{number}" if number else ""))


# ---------------------------------------------------------------------- a worker of Dragon's


class _WorkerChannel:
    """Of a worker process: where it notes what it runs, and how it sends news."""

    def __init__(self, site: RunContext, crew: int) -> None:
        self.queue = pickle.loads(site.queue)
        self.crew = crew
        self.folder = _folder(site)
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        path = os.path.join(self.folder, f"worker-{crew}-{os.getpid()}")
        self._note = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._local: _Local | None = None

    def begin(self, number: int) -> None:
        """Note a task, then see whether it was revoked: who revokes looks in the other order."""
        os.pwrite(self._note, number.to_bytes(8, "big"), 0)
        if os.path.exists(_revoked(self.folder, self.crew)) or os.path.exists(
            _revoked(self.folder, self.crew, number)
        ):
            self.end()
            raise Revoked(number)

    def end(self) -> None:
        os.pwrite(self._note, bytes(8), 0)

    def send(self, *news: tuple[Any, ...]) -> None:
        self.queue.put(pickle.dumps(news, pickle.HIGHEST_PROTOCOL))

    @property
    def local(self) -> _Local:
        if self._local is None:
            self._local = _Local()
        return self._local


_desks: dict[tuple[RunContext, int], _WorkerChannel] = {}


def run_order(site: RunContext, crew: int, number: int, data: bytes) -> None:
    """Run a task in this worker of Dragon's, one of this crew, and send how it ended."""
    order = TaskMessage(*pickle.loads(data))
    desk = _desks.get((site, crew))
    if desk is None:
        desk = _desks[site, crew] = _WorkerChannel(site, crew)
    began = time.monotonic()
    desk.begin(number)
    try:
        if order.call is not None:
            end: Any = run_call(order.call, os.path.join(order.folder, f".{number}.result"))
        else:
            end = desk.local.run(order)
        seconds = time.monotonic() - began
        desk.send(("ended", number, end, socket.gethostname(), seconds))
    finally:
        desk.end()


def run_call(call: bytes, path: str) -> tuple[bool, bytes | str]:
    """Run a pickled call and return whether it returned, and its pickled result or exception.

    A result that is large goes to a file at `path`, which is returned in its place.
    """
    try:
        size = int.from_bytes(call[:4], "big")
        function = serialization.loads(call[4 : 4 + size], "function")
        args, kwargs = serialization.loads(call[4 + size :], "arguments of the function")
        data = serialization.dumps(call_function(function, args, kwargs), "result")
    except BaseException as error:
        # Dragon's own way to end a thread, and ours to end what a worker of a pool runs.
        if isinstance(error, Stopped) or type(error).__name__ == "_FunctionTaskCancelled":
            raise
        # SystemExit too: it is the function that ends, not the process.
        strip_frames(error)
        return False, serialization.pack_exception(error)
    if len(data) < _SPILL:
        return True, data
    with open(path, "wb") as file:
        file.write(data)
    return True, path


class _Local:
    """Runs executables, one at a time, as children of this process.

    On an event loop of its own, so that this worker's thread hears when Dragon cancels the task.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._runner: ExecutableRunner | None = None
        self._key: int | None = None  # of the run
        threading.Thread(target=self._loop.run_forever, daemon=True, name="rhapsody-local").start()

    def run(self, order: TaskMessage) -> tuple[str, dict[str, Any]]:
        """Run an executable to its end, and return its state and its fields."""
        ended: Future[Outcome] = Future()
        self._loop.call_soon_threadsafe(self._start, order, ended)
        try:
            while not wait([ended], _LISTEN).done:
                pass
        except BaseException:
            # It is cancelled, which is true only when the child has ended.
            self._loop.call_soon_threadsafe(self._kill)
            wait([ended])
            raise
        error = ended.exception()
        if isinstance(error, Exception):
            packed = serialization.pack_exception(start_error(error, "dragon"))
            return "FAILED", {"exception": packed}
        outcome = ended.result()
        fields = outcome.fields()
        if outcome.error is not None:
            fields["exception"] = serialization.pack_exception(outcome.error)
        for name in ("started", "ended"):  # of this machine's clock
            del fields[name]
        return outcome.state, fields

    def _start(self, order: TaskMessage, ended: Future[Outcome]) -> None:
        assert order.program is not None
        self._key = None
        try:
            if self._runner is None:
                self._runner = ExecutableRunner("dragon")
            run = ExecutableRun(describe(order.program), order.folder)
            self._key, outcome = self._runner.start(run)
        except Exception as error:  # the task's own, such as a directory that is not there
            ended.set_exception(error)
            return

        def copy(outcome: asyncio.Future[Outcome]) -> None:
            if (error := outcome.exception()) is not None:
                ended.set_exception(error)
            else:
                ended.set_result(outcome.result())

        outcome.add_done_callback(copy)

    def _kill(self) -> None:
        if self._runner is not None and self._key is not None:
            self._runner.kill(self._key, GRACE)


def run_rank(site: RunContext, number: int, rank: int, call: bytes | str, path: str) -> None:
    """Run a function as a rank, in a process that Dragon started for it, and send its result.

    A call that is large is in a file, of which it is the path.
    """
    queue = pickle.loads(site.queue)
    if isinstance(call, str):
        with open(call, "rb") as file:
            call = file.read()
    queue.put(pickle.dumps([("begun", number, socket.gethostname())]))
    said = run_call(call, f"{path}.{rank}")
    queue.put(pickle.dumps([("rank", number, rank, said)]))


class GroupJoinPatch:
    """Part of a job's template. The worker of Batch that unpickles it waits as it should.

    When the ranks have ended, that worker closes their group, and gives it 5 s. With PMIx over
    several nodes the group's own process takes 2 to 10 s, and then an error takes the place of the
    exit codes, which are lost.

    While they run it asks every 0.1 s whether they have ended, and hears nothing, as a rule. Where
    both are slow it hears that they have not, in which Dragon looks for a traceback that is not
    there ("'NoneType' object is not subscriptable"), and the job fails.

    There is no public way to tell Batch; read in 0.15.0.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _be_patient, ()


def _be_patient() -> GroupJoinPatch:
    groups: Any = importlib.import_module("dragon.native.process_group")
    process: Any = importlib.import_module("dragon.globalservices.process")

    def join(puid: int, timeout: float) -> Any:
        """Wait for the process of this one group, and longer if its ranks ended by themselves."""
        groups.process_join = process.join
        cancelled = sys.exc_info()[0] is not None  # then nobody asks for exit codes, but how soon
        return process.join(puid, timeout=timeout if cancelled else _GROUP_END)

    # The only use of it there is that wait.
    groups.process_join = join
    if groups.ProcessGroup.join.__module__ != __name__:
        groups.ProcessGroup.join = _hears_of_time(groups.ProcessGroup.join)
    return GroupJoinPatch()


def _hears_of_time(join: Callable[..., None]) -> Callable[..., None]:
    def join_in_time(group: Any, timeout: float | None = None) -> None:
        try:
            join(group, timeout)
        except TypeError as error:
            if "subscriptable" not in str(error):
                raise
            raise TimeoutError from None

    return join_in_time


# ---------------------------------------------------------------------- the agent of a node


class _Worker:
    """A worker process of this node, held by a descriptor that tells of its end."""

    def __init__(self, path: str) -> None:
        self.path = path
        _, crew, pid = os.path.basename(path).split("-")
        self.crew = int(crew)
        self.pid = int(pid)
        self.told = 0
        self.pidfd = -1
        with contextlib.suppress(ProcessLookupError):  # it has died before it was ever seen
            self.pidfd = os.pidfd_open(self.pid)

    def runs(self) -> int:
        """The number of the task that it runs, or ran last; 0 for none."""
        with open(self.path, "rb") as file:
            return int.from_bytes(file.read(8), "big")


def agent(site: RunContext, orders: bytes, host: str) -> None:
    """Send beats, what has begun, and which workers died; obey: a process on each node."""
    _Agent(site, pickle.loads(orders), host).run()


def _first_thread(cpu: int) -> tuple[int, int]:
    """Sort hardware threads of one core together."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
            return int(re.split("[,-]", file.read())[0]), cpu
    except (OSError, ValueError):  # no such file in here: each is a core
        return cpu, cpu


class _Agent:
    def __init__(self, site: RunContext, orders: Any, host: str) -> None:
        self.news = pickle.loads(site.queue)
        self.orders = orders
        self.host = host  # as Dragon calls it, which is localhost where it is alone
        self.name = socket.gethostname()
        self.folder = _folder(site)
        self.workers: dict[str, _Worker] = {}
        self.poll = select.poll()

    def run(self) -> None:
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self.news.put(pickle.dumps([("facts", self.host, self._facts())]))
        next_beat = 0.0
        try:
            while True:
                dead = self._wait()
                news = self._look()
                news += [one for worker in dead for one in self._bury(worker)]
                order = self._order()
                if order == "leave":
                    return
                if order is not None:
                    news.append(self._revoke(*order))
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + BEAT_EVERY
                    news.append(("beat", self.host))
                if news:
                    self.news.put(pickle.dumps(news))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _facts(self) -> dict[str, Any]:
        """What the driver has to know of this node."""
        # Dragon itself, whose process here started this one, would load the library as we do.
        return {
            "pid": os.getpid(),
            "cpus": sorted(granted_cores(), key=_first_thread),
            "pmix": can_load_pmix(),
        }

    def _wait(self) -> list[_Worker]:
        """Wait for the end of a worker, not for long, and return those that have ended."""
        ended = {-1, *(fd for fd, _ in self.poll.poll(_LOOK_EVERY * 1000))}
        return [worker for worker in self.workers.values() if worker.pidfd in ended]

    def _look(self) -> list[tuple[Any, ...]]:
        """Find new workers, and tell what has begun."""
        with os.scandir(self.folder) as entries:
            names = [e.path for e in entries if e.name.startswith("worker-")]
        for path in names:
            if path not in self.workers:
                worker = self.workers[path] = _Worker(path)
                if worker.pidfd >= 0:
                    self.poll.register(worker.pidfd, select.POLLIN)
        begun = []
        for worker in self.workers.values():
            number = worker.runs()
            if number and number != worker.told:
                worker.told = number
                begun.append(("begun", number, self.name))
        return begun

    def _bury(self, worker: _Worker) -> list[tuple[Any, ...]]:
        if worker.pidfd >= 0:
            self.poll.unregister(worker.pidfd)
            os.close(worker.pidfd)
        del self.workers[worker.path]
        number = worker.runs()
        os.unlink(worker.path)
        return [("lost", number, self.name, worker.crew, worker.pid)]

    def _order(self) -> Any:
        try:
            return self.orders.get_nowait()
        except queues.Empty:
            return None

    def _revoke(self, crew: int, number: int | None) -> tuple[Any, ...]:
        """Let a task, or all of a crew, not begin here any more, and tell what runs."""
        with open(_revoked(self.folder, crew, number), "wb"):
            pass
        runs = [worker.runs() for worker in self.workers.values() if worker.crew == crew]
        return ("revoked", (crew, number), self.host, runs)
