"""The warden's loop: requests from the driver, output from pipes, ends of children from SIGCHLD."""

from __future__ import annotations

import errno
import heapq
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from . import messages
from .child import Child, suspend_children
from .output import OutputEnd, Stream
from .process_tree import ProcessTable, descendants, kill, kill_group, processes, suspend
from .spawn import Spawner

__all__ = ["Server"]

_IS_LINUX = hasattr(select, "epoll")  # and we are the parent of orphans
_READ = 1 << 20
_ORPHAN_GRACE = 0.5  # seconds between SIGTERM and SIGKILL when the driver has died
# Seconds for which the event of a start may wait for that of an end, and that of an end while there
# is enough to start next: one message for several short children.
_EVENT_DELAY = 0.005


class Server:
    """Starts children as the driver says, and tells it of their ends.

    Args:
        sock: to the driver; it does not block.
        mark: descriptor of the file that says, when we are dead, which child we began last.
    """

    def __init__(self, sock: socket.socket, mark: int) -> None:
        self._sock = sock
        self._mark = mark
        self._last_begun = 0
        self._connected = True
        self._inbox = messages.MessageBuffer()
        self._outbox = bytearray()
        self._events: list[messages.Event] = []
        self._send_at: float | None = None  # when they must go out; None while there are none
        self._spawner = Spawner()
        self._children: dict[int, Child] = {}  # by pid
        self._by_key: dict[int, Child] = {}
        self._dying: list[Child] = []  # killed ones that have ended, unlike others of their groups
        self._queue: dict[int, messages.Run] = {}  # by key: what to start when a child ends
        self._guarded: set[int] = set()
        self._to_kill: list[tuple[Child, float]] = []  # in this turn, with their grace
        self._kill_timers: list[tuple[float, int]] = []  # a heap of times, and keys
        self._outputs: dict[int, Stream] = {}  # by descriptor
        self._poll = select.epoll() if _IS_LINUX else select.poll()
        self._poll.register(sock, select.POLLIN)
        self._wake_up, wake_up = os.pipe()  # written at each SIGCHLD
        os.set_blocking(self._wake_up, False)
        os.set_blocking(wake_up, False)
        self._poll.register(self._wake_up, select.POLLIN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False)
        self._handlers: dict[type[messages.Message], Callable[[Any], object]] = {
            messages.Environment: lambda it: self._spawner.set_environment(it.variables),
            messages.Directory: lambda it: self._spawner.set_directory(it.path),
            messages.Guard: lambda it: self._guarded.add(it.pid),
            messages.Unguard: lambda it: self._guarded.discard(it.pid),
            messages.Run: self._on_run,
            messages.StartNow: self._on_start_now,
            messages.Kill: self._on_kill,
        }

    def run(self) -> None:
        """Serve until the driver has gone."""
        while self._connected:
            self._turn(self._timeout())
            self._kill_pending()
            if self._outbox or (self._send_at is not None and self._send_at <= time.monotonic()):
                self._send()

    def _turn(self, timeout: float | None) -> None:
        """Wait for something to happen, and handle it."""
        if timeout is not None and not _IS_LINUX:
            timeout *= 1000
        ready = [fd for fd, _ in self._poll.poll(timeout)]
        # First the ends: each frees a slot, and output can wait.
        if self._wake_up in ready:
            os.read(self._wake_up, 4096)
            self._reap()
        for fd in ready:
            if fd in self._outputs:
                self._on_output(fd)
            elif fd == self._sock.fileno():
                self._on_socket()

    def _timeout(self) -> float | None:
        due = self._send_at
        if self._kill_timers and (due is None or self._kill_timers[0][0] < due):
            due = self._kill_timers[0][0]
        return None if due is None else max(0.0, due - time.monotonic())

    # ------------------------------------------------------------------ the driver

    def _on_socket(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._connected = False
            return
        for request in self._inbox.feed(data):
            self._handlers[type(request)](request)

    def _tell(self, event: messages.Event, delay: float = 0.0) -> None:
        """Tell the driver, at once or within `delay` seconds."""
        self._events.append(event)
        due = time.monotonic() + delay if delay else 0.0
        self._send_at = due if self._send_at is None else min(self._send_at, due)

    def _send(self) -> None:
        blocked = bool(self._outbox)
        if self._events:
            self._outbox += messages.encode(self._events)
            self._events = []
            self._send_at = None
        try:
            del self._outbox[: self._sock.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self._connected = False
            return
        if blocked != bool(self._outbox):
            more = select.POLLOUT if self._outbox else 0
            self._poll.modify(self._sock.fileno(), select.POLLIN | more)

    def _on_start_now(self, request: messages.StartNow) -> None:
        run = self._queue.pop(request.key, None)
        if run is not None:
            self._start(run)

    def _on_kill(self, request: messages.Kill) -> None:
        if self._queue.pop(request.key, None) is not None:
            self._tell(messages.Dropped(request.key))
            return
        child = self._by_key.get(request.key)
        if child is None or child.has_ended():
            return
        child.killed = True
        self._to_kill.append((child, request.grace))

    def _on_run(self, run: messages.Run) -> None:
        if run.queued:
            self._queue[run.key] = run
        else:
            self._start(run)

    # ------------------------------------------------------------------ starts

    def _start(self, run: messages.Run) -> bool:
        if run.key > self._last_begun:
            self._last_begun = run.key
            os.pwrite(self._mark, run.key.to_bytes(8, "big"), 0)
        started = time.monotonic()  # before the child is there: afterwards it may have run a while
        try:
            pid, streams = self._spawner.spawn(run)
        except OSError as error:
            reason = error.strerror or str(error)
            self._tell(messages.Refused(run.key, error.errno or 0, reason, error.filename))
            return False
        except ValueError as error:
            self._tell(messages.Refused(run.key, errno.EINVAL, str(error), None))
            return False
        child = Child(run.key, pid, streams, bool(run.cores), started)
        self._children[pid] = self._by_key[run.key] = child
        for stream in streams:
            self._poll.register(stream.fd, select.POLLIN)
            self._outputs[stream.fd] = stream
        self._tell(messages.Started(run.key, pid, started), _EVENT_DELAY)
        return True

    def _start_queued(self) -> int:
        """Start the first in the queue that can be started; returns its key, or 0."""
        while self._queue:
            key = next(iter(self._queue))
            if self._start(self._queue.pop(key)):
                return key
        return 0

    # ------------------------------------------------------------------ output and ends

    def _on_output(self, fd: int) -> None:
        if not self._outputs[fd].read():
            # Closed by the child, which may run on; its end is another matter.
            del self._outputs[fd]
            self._poll.unregister(fd)

    def _reap(self) -> None:
        """Reap the children that have ended, and orphans."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if found is None:
                break
            # Not reaped yet, so that its number still stands for its group and for nothing else.
            child = self._children.pop(found.si_pid, None)
            if child is not None:
                if len(child.groups) > 1:  # some may have ended, their numbers be others' by now
                    child.find_groups(processes())
                child.signal(signal.SIGKILL)
            _, status = os.waitpid(found.si_pid, 0)
            if child is not None:
                child.exit_code, child.ended = os.waitstatus_to_exitcode(status), time.monotonic()
                if child.killed and _IS_LINUX:
                    self._dying.append(child)
                else:
                    self._end(child)
        if self._dying:
            # Each member comes to us when its parent dies, so that its end is an event for us too.
            dying, self._dying = self._dying, []
            for child in dying:
                if child.is_gone():
                    self._end(child)
                else:
                    self._dying.append(child)

    def _end(self, child: Child) -> None:
        """Start the next in a child's place, then tell of its end.

        With the output so far: a descendant that left the group may hold the pipes for ever.
        """
        successor = 0 if child.pinned else self._start_queued()
        del self._by_key[child.key]
        ends = [OutputEnd(), OutputEnd()]
        for number, stream in enumerate(child.streams):
            stream.read_rest()
            if self._outputs.pop(stream.fd, None) is not None:
                # A close is not enough: a child on its way to its program still has it open.
                self._poll.unregister(stream.fd)
            ends[number] = stream.close()
        errors = [stream.error for stream in child.streams if stream.error]
        ended = messages.Ended(
            child.key,
            child.exit_code,
            child.killed,
            child.started,
            child.ended,
            *ends[0],
            *ends[1],
            "; ".join(errors),
            successor,
        )
        enough = len(self._queue) > len(self._children)
        self._tell(ended, _EVENT_DELAY if enough else 0.0)

    # ------------------------------------------------------------------ kills

    def _kill_pending(self) -> None:
        """SIGTERM for those that the driver wants killed, SIGKILL where the grace is over."""
        if not self._to_kill and not self._kill_timers:
            return
        now = time.monotonic()
        asked = [child for child, grace in self._to_kill if grace > 0]
        over = [child for child, grace in self._to_kill if not grace > 0]
        for child, grace in self._to_kill:
            if grace > 0:
                heapq.heappush(self._kill_timers, (now + grace, child.key))
        self._to_kill = []
        while self._kill_timers and self._kill_timers[0][0] <= now:
            late = self._by_key.get(heapq.heappop(self._kill_timers)[1])
            over += [late] if late is not None else []
        if not asked and not over:
            return
        suspend_children([*asked, *over])
        for number, children in ((signal.SIGTERM, asked), (signal.SIGKILL, over)):
            for child in children:
                child.signal(number)
                child.signal(signal.SIGCONT)

    def end_all(self) -> None:
        """End all that was started through the driver, which has gone."""
        self._queue.clear()
        self._poll.unregister(self._sock.fileno())
        # While their parents live: those that left a guarded group come to nobody we know of.
        below = suspend(self._below_the_guarded) if self._guarded else set()
        for pid in self._guarded:
            kill_group(pid, signal.SIGKILL)
        for pid in below:
            kill(pid)
        for child in self._children.values():
            child.signal(signal.SIGTERM)
            child.signal(signal.SIGCONT)
        deadline = time.monotonic() + _ORPHAN_GRACE
        while self._children and (left := deadline - time.monotonic()) > 0:
            self._turn(left)
        # Those that left their group come to us when their parents die, however often they fork.
        while pids := descendants([os.getpid()], processes()):
            for pid in pids:
                kill(pid)
            os.waitpid(-1, 0)

    def _below_the_guarded(self, table: ProcessTable) -> set[int]:
        there = self._guarded & table.keys()
        return {*there, *descendants(there, table)}
