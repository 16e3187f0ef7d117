"""The warden: a small process that starts a driver's child processes and outlives the driver.

Run as a script, with the numbers of two descriptors for its arguments: a socket's, and that of a
file to which it writes the key of the last child that it began to start. It is one file, longer
than others for that, and imports nothing but the standard library, so that it is up in about 20 ms.
It exists because only another process can clean up after a driver that was killed with SIGKILL:
when the socket closes, for whatever reason, every process group that it started or guards is ended,
and every descendant of its own.

Single-threaded, it can set its working directory and CPU affinity before each spawn and let the
child inherit them, in place of code between fork and exec. Frames on the socket are a 4-byte
length and a `marshal` of plain values; both ends are the same interpreter. `processes` is the
driver's end, and describes the messages.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import marshal
import os
import selectors
import signal
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

TAIL = 65536  # bytes kept in memory of an output that went to a file: the last words
_CHUNK = 65536  # a pipe's capacity
_RESTORED = [
    getattr(signal, name)
    for name in ("SIGPIPE", "SIGXFSZ", "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    if hasattr(signal, name)
]
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_ADOPTS = sys.platform.startswith("linux")  # whether we can hear of descendants' ends
FREEZE = 0.2  # seconds until we no longer wait for a process that does not stop on SIGSTOP
LOOK_MOST = 5.0  # seconds until we no longer run after those who fork faster than we look
_ORPHAN_GRACE = 0.5  # seconds between SIGTERM and SIGKILL when the driver has died
# Seconds that the news of a start may wait for that of an end, and that of an end while there is
# enough to start next: one message for several short children.
_NEWS_WAIT = 0.005


class Stream:
    """One output of a child: held in memory up to a limit, in a file from there on."""

    def __init__(self, fd: int, limit: int, path: str) -> None:
        self.fd = fd
        self.limit = limit
        self.path = path
        self.data = bytearray()
        self.size = 0
        self.file: int | None = None
        self.error: str | None = None

    def drain(self) -> bool:
        """Read what is there; False at the end of the stream."""
        while True:
            try:
                data = os.read(self.fd, _CHUNK)
            except BlockingIOError:
                return True
            except InterruptedError:
                continue
            if not data:
                return False
            self.take(data)
            if len(data) < _CHUNK:
                return True

    def take(self, data: bytes) -> None:
        self.size += len(data)
        self.data += data
        if self.file is None and self.size > self.limit and self.error is None:
            self.spill(bytes(self.data))
        elif self.file is not None:
            self.write(data)
        if self.size > self.limit and len(self.data) > 2 * TAIL:
            del self.data[:-TAIL]

    def spill(self, data: bytes) -> None:
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            self.error = f"cannot write {self.path}: {error.strerror}"
        else:
            self.write(data)

    def write(self, data: bytes) -> None:
        # The child must not block for our trouble: on an error we go on reading, and report it.
        view = memoryview(data)
        while view and self.error is None and self.file is not None:
            try:
                view = view[os.write(self.file, view) :]
            except OSError as error:
                self.error = f"cannot write {self.path}: {error.strerror}"

    def close(self) -> tuple[bytes, int, str | None]:
        """Return (the last bytes, the size, the file's path if there is one)."""
        os.close(self.fd)
        if self.file is not None:
            os.close(self.file)
            del self.data[:-TAIL]
        return bytes(self.data), self.size, self.path if self.file is not None else None


class Child:
    """A process group that the warden started."""

    def __init__(
        self, key: int, pid: int, streams: list[Stream | None], pinned: bool, started: float
    ) -> None:
        self.key = key
        self.pinned = pinned
        self.pid = pid
        self.streams = streams
        self.started = started
        self.code = 0
        self.ended = 0.0
        self.killed = False
        self.groups: set[int] = set()  # others of its descendants, once it is to be stopped


class Warden:
    """The loop: requests from the socket, output from the pipes, ends from SIGCHLD."""

    def __init__(self, sock: socket.socket, mark: int) -> None:
        self.sock = sock
        self.mark = mark  # descriptor of the file that says, when we are dead, how far we came
        self.begun = 0  # the highest key in it
        self.inbox = bytearray()
        self.replies: list[tuple[Any, ...]] = []
        self.send_at: float | None = None  # when the replies must go out; None while there are none
        self.outbox = bytearray()
        self.children: dict[int, Child] = {}  # by pid
        self.dying: list[Child] = []  # they have ended, and others of their groups have not
        self.line: dict[int, tuple[Any, ...]] = {}  # by key: what to start when a child ends
        self.by_key: dict[int, Child] = {}
        self.outputs: dict[int, Stream] = {}  # by descriptor
        self.guarded: set[int] = set()
        self.timers: list[tuple[float, int]] = []
        self.condemned: list[tuple[Child, float]] = []  # to stop in this turn, with their grace
        self.environ = dict(os.environ)
        self.home = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        self.affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self.selector = selectors.DefaultSelector()
        self.selector.register(sock, selectors.EVENT_READ, self.on_socket)
        bell, self.alarm = socket.socketpair()
        bell.setblocking(False)
        self.alarm.setblocking(False)
        self.bell = bell
        self.selector.register(bell, selectors.EVENT_READ, self.on_child)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.alarm.fileno(), warn_on_full_buffer=False)
        self.open = True

    def run(self) -> None:
        while self.open:
            ready = self.selector.select(self.patience())
            # Ends first: each frees a place, and the output that is left waits.
            for key, _ in sorted(ready, key=lambda item: item[0].fileobj is not self.bell):
                key.data(key.fileobj)
            self.stop_condemned()
            if self.outbox or (self.send_at is not None and self.send_at <= time.monotonic()):
                self.send()
        self.end_all()

    def patience(self) -> float | None:
        """Seconds to wait for something to happen."""
        due = [self.timers[0][0]] if self.timers else []
        if self.send_at is not None:
            due.append(self.send_at)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def reply(self, *reply: Any, wait: float = 0.0) -> None:
        """Tell the driver, at once or within `wait` seconds."""
        self.replies.append(reply)
        due = time.monotonic() + wait if wait else 0.0
        self.send_at = due if self.send_at is None else min(self.send_at, due)

    # ------------------------------------------------------------------ the socket

    def on_socket(self, _: Any) -> None:
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            data = None
        except OSError:
            data = b""
        if data == b"":
            self.open = False
            return
        self.inbox += data or b""
        while len(self.inbox) >= 4:
            (size,) = struct.unpack_from("!I", self.inbox)
            if len(self.inbox) < 4 + size:
                break
            request = marshal.loads(bytes(self.inbox[4 : 4 + size]))
            del self.inbox[: 4 + size]
            getattr(self, "do_" + request[0])(*request[1:])

    def send(self) -> None:
        if self.replies:
            data = marshal.dumps(self.replies)
            self.outbox += struct.pack("!I", len(data)) + data
            self.replies = []
            self.send_at = None
        events = selectors.EVENT_READ
        if self.outbox and self.open:
            try:
                del self.outbox[: self.sock.send(self.outbox)]
            except BlockingIOError:
                pass
            except OSError:
                self.open = False
        if self.outbox:
            events |= selectors.EVENT_WRITE
        if self.selector.get_key(self.sock).events != events:
            self.selector.modify(self.sock, events, self.on_socket)

    # ------------------------------------------------------------------ requests

    def do_environ(self, environ: dict[str, str]) -> None:
        self.environ = environ

    def do_home(self, path: str) -> None:
        try:
            os.chdir(path)
            home = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # removed or closed to us: where we are is as good as any other place
            os.fchdir(self.home)
            return
        os.close(self.home)
        self.home = home

    def do_guard(self, pid: int) -> None:
        self.guarded.add(pid)

    def do_unguard(self, pid: int) -> None:
        self.guarded.discard(pid)

    def do_wait(self, key: int, *launch: Any) -> None:
        """Start a child in the place of the next unpinned one that ends."""
        self.line[key] = launch

    def do_go(self, key: int) -> None:
        """Start one that waits, now: the driver has another place for it."""
        launch = self.line.pop(key, None)
        if launch is not None:
            self.do_run(key, *launch)

    def do_kill(self, key: int, grace: float) -> None:
        if self.line.pop(key, None) is not None:
            self.reply("dropped", key)
            return
        child = self.by_key.get(key)
        if child is None or _has_ended(child.pid):
            return
        child.killed = True
        self.condemned.append((child, grace))

    def do_run(
        self,
        key: int,
        argv: list[str],
        cwd: str | None,
        env: dict[str, str] | None,
        replace: bool,
        stdin: bytes | str | None,
        outputs: list[tuple[bool, str]],
        limit: int,
        cores: list[int] | None,
    ) -> bool:
        if key > self.begun:
            self.begun = key
            os.pwrite(self.mark, key.to_bytes(8, "big"), 0)
        opened: list[int] = []
        streams: list[Stream | None] = []
        started = time.monotonic()  # before the child is there: afterwards it may have run a while
        try:
            pid = self.spawn(argv, cwd, env, replace, stdin, outputs, limit, cores, opened, streams)
        except (OSError, ValueError) as error:
            for stream in streams:
                if stream is not None:
                    os.close(stream.fd)
            number = error.errno if isinstance(error, OSError) else errno.EINVAL
            what = getattr(error, "filename", None)
            words = getattr(error, "strerror", None) or str(error)
            self.reply("refused", key, number, words, what)
            return False
        finally:
            for fd in opened:
                os.close(fd)
        child = Child(key, pid, streams, bool(cores), started)
        self.children[pid] = self.by_key[key] = child
        for stream in streams:
            if stream is not None:
                self.selector.register(stream.fd, selectors.EVENT_READ, self.on_output)
        self.outputs.update({s.fd: s for s in streams if s is not None})
        self.reply("started", key, pid, child.started, wait=_NEWS_WAIT)
        return True

    def spawn(
        self,
        argv: list[str],
        cwd: str | None,
        env: dict[str, str] | None,
        replace: bool,
        stdin: bytes | str | None,
        outputs: list[tuple[bool, str]],
        limit: int,
        cores: list[int] | None,
        opened: list[int],
        streams: list[Stream | None],
    ) -> int:
        environ = (env or {}) if replace else {**self.environ, **(env or {})}
        actions: list[tuple[int, int, int]] = []
        opened.append(_open_input(stdin, cwd))
        actions.append((os.POSIX_SPAWN_DUP2, opened[0], 0))
        for number, (to_file, path) in enumerate(outputs, start=1):
            if to_file:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                opened.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
                streams.append(None)
            else:
                reader, writer = os.pipe()
                opened.append(writer)
                os.set_blocking(reader, False)
                streams.append(Stream(reader, limit, path))
            actions.append((os.POSIX_SPAWN_DUP2, opened[-1], number))
        try:
            if cwd is not None:
                os.chdir(cwd)
            program = _which(argv[0], environ)
            if cores and self.affinity is not None:
                os.sched_setaffinity(0, cores)
            return os.posix_spawn(
                program,
                argv,
                environ,
                file_actions=actions,
                setpgroup=0,
                setsigmask=[],
                setsigdef=_RESTORED,
            )
        finally:
            if cores and self.affinity is not None:
                os.sched_setaffinity(0, self.affinity)
            if cwd is not None:
                os.fchdir(self.home)

    # ------------------------------------------------------------------ children

    def on_output(self, fd: int) -> None:
        stream = self.outputs.get(fd)  # None: its child was buried in this same turn
        if stream is not None and not stream.drain():
            # Closed by the child, which may run on; its end is another matter.
            self.selector.unregister(fd)

    def on_child(self, _: Any) -> None:
        try:
            while self.bell.recv(4096):
                pass
        except BlockingIOError:
            pass
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                found = None
            if found is None:
                self.bury_dying()
                return
            # Not reaped yet, so that its number still stands for its group and for nothing else.
            child = self.children.pop(found.si_pid, None)
            if child is not None:
                if child.groups:  # some may have ended, and their numbers may be others' by now
                    self.look(child, processes())
                self.signal(child, signal.SIGKILL)
            _, status = os.waitpid(found.si_pid, 0)
            if child is not None:
                child.code, child.ended = os.waitstatus_to_exitcode(status), time.monotonic()
                if child.killed and _ADOPTS:
                    self.dying.append(child)
                else:
                    self.pass_on(child)

    def pass_on(self, child: Child) -> None:
        """Give a child's place to the next in line, and report its end."""
        self.bury(child, None if child.pinned else self.start_next())

    def bury_dying(self) -> None:
        """Report the ends of stopped children of whose groups nothing is left.

        Each member comes to us when its parent dies, so that its end is an event for us too.
        """
        dying, self.dying = self.dying, []
        for child in dying:
            if any(_killpg(group, 0) for group in (child.pid, *child.groups)):
                self.dying.append(child)
            else:
                self.pass_on(child)

    def start_next(self) -> int | None:
        """Start the first in line that can be started; returns its key."""
        while self.line:
            key: int = next(iter(self.line))
            if self.do_run(key, *self.line.pop(key)):
                return key
        return None

    def bury(self, child: Child, heir: int | None) -> None:
        """Report an end, with the output so far: a descendant may hold the pipes open for ever."""
        del self.by_key[child.key]
        reports: list[tuple[bytes, int, str | None] | None] = []
        errors = []
        for stream in child.streams:
            if stream is None:
                reports.append(None)
                continue
            _drain(stream)
            if stream.fd in self.selector.get_map():
                self.selector.unregister(stream.fd)
            del self.outputs[stream.fd]
            reports.append(stream.close())
            if stream.error:
                errors.append(stream.error)
        self.reply(
            "ended",
            child.key,
            child.code,
            child.killed,
            reports,
            child.started,
            child.ended,
            "; ".join(errors),
            heir,
            wait=_NEWS_WAIT if len(self.line) > len(self.children) else 0.0,
        )

    def signal(self, child: Child, number: int) -> None:
        for group in {child.pid, *child.groups}:
            _killpg(group, number)

    def stop_condemned(self) -> None:
        """SIGTERM for those that the driver wants stopped, SIGKILL where the grace is over."""
        now = time.monotonic()
        over = [child for child, grace in self.condemned if not grace > 0]
        asked = [child for child, grace in self.condemned if grace > 0]
        for child, grace in self.condemned:
            if grace > 0:
                heapq.heappush(self.timers, (now + grace, child.key))
        self.condemned = []
        while self.timers and self.timers[0][0] <= now:
            late = self.by_key.get(heapq.heappop(self.timers)[1])
            over += [late] if late is not None else []
        if not asked and not over:
            return
        self.freeze([*asked, *over])
        for number, children in ((signal.SIGTERM, asked), (signal.SIGKILL, over)):
            for child in children:
                self.signal(child, number)
                self.signal(child, signal.SIGCONT)

    def freeze(self, children: list[Child]) -> None:
        """Stop processes where they are: so none is born, or leaves its group, while we look."""
        still = False
        deadline = time.monotonic() + FREEZE
        while True:
            for child in children:
                self.signal(child, signal.SIGSTOP)
            table = processes()
            new = sum(self.look(child, table) for child in children)
            groups = {group for child in children for group in (child.pid, *child.groups)}
            members = {pid for pid, (_, group, _, _) in table.items() if group in groups}
            before, still = still, not new and stand_still(members, table)
            # Twice: what is born while we read the first table is only in the second.
            if (before and still) or time.monotonic() > deadline:
                return
            os.sched_yield()

    def look(self, child: Child, table: Table) -> bool:
        """Find the groups of a child's descendants; whether there are some that were not known.

        Those that are known stay, though their parents may have died, while they have members.
        """
        ours = {table[pid][1] for pid in descendants([os.getpid()], table)}
        groups = {table[pid][1] for pid in descendants([child.pid], table)}
        groups -= {child.pid, os.getpgrp()}
        new = groups - child.groups
        child.groups = groups | (child.groups & ours)
        return bool(new)

    def end_all(self) -> None:
        """The driver has gone: nothing that was started through it stays."""
        self.line.clear()
        self.selector.unregister(self.sock)
        # While their parents live: those that left a guarded group come to nobody we know of.
        apart = hold(self.below_the_guarded) if self.guarded else set()
        for pid in self.guarded:
            _killpg(pid, signal.SIGKILL)
        for pid in apart:
            _kill(pid)
        if self.children:
            for child in self.children.values():
                self.signal(child, signal.SIGTERM)
                self.signal(child, signal.SIGCONT)
            deadline = time.monotonic() + _ORPHAN_GRACE
            while self.children and time.monotonic() < deadline:
                for key, _ in self.selector.select(max(0.0, deadline - time.monotonic())):
                    key.data(key.fileobj)
        # Those that left their group come to us when their parents die, however often they fork.
        while left := descendants([os.getpid()], processes()):
            for pid in left:
                _kill(pid)
            os.waitpid(-1, 0)

    def below_the_guarded(self, table: Table) -> set[int]:
        there = self.guarded & table.keys()
        return {*there, *descendants(list(there), table)}


def _drain(stream: Stream) -> None:
    """Read all that is in the pipe now; a writer that never stops does not keep us."""
    for _ in range(64):
        before = stream.size
        if not stream.drain() or stream.size == before:
            return


def _which(name: str, environ: dict[str, str]) -> str:
    if "/" in name:
        return name
    for folder in environ.get("PATH", os.defpath).split(":"):
        path = os.path.join(folder or ".", name)
        try:
            if stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.X_OK):
                return path
        except OSError:
            continue
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def _open_input(stdin: bytes | str | None, cwd: str | None) -> int:
    """Text goes through an unlinked file, so that a child that never reads it blocks nobody."""
    if stdin is None:
        return os.open(os.devnull, os.O_RDONLY)
    if isinstance(stdin, str):
        # Without waiting: a named pipe that nobody writes to would keep all others waiting.
        fd = os.open(os.path.join(cwd or ".", stdin), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(fd, True)
        return fd
    with tempfile.TemporaryFile() as file:
        file.write(stdin)
        file.flush()
        fd = os.dup(file.fileno())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


Table = dict[int, tuple[int, int, int, bytes]]


def processes() -> Table:
    """Parent, group, session and state of every process that has not ended, from /proc."""
    table: Table = {}
    try:
        names = os.listdir("/proc")
    except OSError:  # not Linux: what leaves its group there cannot be found
        return table
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # "pid (comm) state ppid ...": comm may hold anything, and ends at the last ')'
                    fields = file.read().rpartition(b")")[2].split()
                if fields[0] != b"Z":
                    parent, group, session = map(int, fields[1:4])
                    table[int(name)] = (parent, group, session, fields[0])
            except (OSError, ValueError, IndexError):
                continue
    return table


def stand_still(pids: set[int], table: Table) -> bool:
    """Whether all of them have stopped; a fork that they were in goes through before."""
    return not any(table[pid][3] in b"RS" for pid in pids if pid in table)


def descendants(roots: list[int], table: Table) -> list[int]:
    """Pids of all processes below some."""
    children: dict[int, list[int]] = {}
    for pid, (parent, *_) in table.items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    queue = list(roots)
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def hold(whom: Callable[[Table], Iterable[int]]) -> set[int]:
    """Stop processes where they are, until there are no new ones among them; returns their pids.

    So none is born while we look: once its parent is dead, whose it was cannot be told.
    """
    held: set[int] = set()
    still = False
    began = changed = time.monotonic()
    while True:
        table = processes()
        wanted = set(whom(table))
        now = time.monotonic()
        if new := wanted - held:
            changed = now
        for pid in new:
            _kill(pid, signal.SIGSTOP)
        before, still = still, not new and stand_still(wanted, table)
        # Twice: what is born while we read the first table is only in the second.
        if (before and still) or now > min(changed + FREEZE, began + LOOK_MOST):
            return held | wanted
        held |= wanted
        os.sched_yield()


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):  # the latter of a program that is another user's
        pass


def _killpg(pid: int, number: int) -> bool:
    """Signal a group; whether it is there."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's program; macOS says so of a group of zombies
        pass
    return True


def main() -> None:
    """Serve the socket whose descriptor is the first argument; the second is the mark's."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the driver decides, and its end ends us
    if sys.platform == "linux":
        # Descendants that leave their group come to us when their parents die.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(False)
    sock.set_inheritable(False)
    mark = int(sys.argv[2])
    os.set_inheritable(mark, False)
    Warden(sock, mark).run()


if __name__ == "__main__":
    main()
