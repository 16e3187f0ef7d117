"""Child processes of this process, in groups of their own, which never outlive it.

They are started and ended by the warden, a process of its own: see `warden`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rhapsody.runtime.errors import BackendError
from rhapsody.runtime.text import plain_str

from .frames import keep_from_forks
from .warden import messages
from .warden.messages import Started
from .warden.process_tree import ProcessTable, descendants, kill, suspend

__all__ = ["RESOURCE_ERRNOS", "Children", "Ended", "Launch", "Started"]

logger = logging.getLogger(__name__)

#: errors for which the machine is to blame, not the task: no descriptors, memory, processes, space
RESOURCE_ERRNOS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EIO}
)
#: bytes of each output that are kept in memory; what is more goes to a file
OUTPUT_LIMIT = 1 << 20
# Seconds for the warden to end what is left and exit, after its socket is closed; it takes 0.5 s
# where a child ignores SIGTERM.
_EXIT_TIMEOUT = 10.0
_WARDEN = str(Path(__file__).with_name("warden"))
# As a shell has it: not found, found and not executable.
_EXIT_CODES = {errno.ENOENT: 127, errno.EACCES: 126, errno.ENOEXEC: 126}


@dataclass(frozen=True)
class Launch:
    """A child process to start.

    Attributes:
        argv: the program, looked for on the child's PATH unless it has a slash, and its arguments.
        stdout_path: the file for stdout, for all of it where there are more than `OUTPUT_LIMIT`
            bytes.
        stderr_path: the same for stderr.
        to_files: let the child write to these files itself, however little that is.
        cwd: its working directory, by default this process's.
        env: variables that are added to this process's.
        env_replace: give it no others than `env`.
        stdin: what the child reads, or as a `str` the path of a file that it reads.
        cores: what to pin the child to.
    """

    argv: Sequence[str]
    stdout_path: str
    stderr_path: str
    to_files: bool = False
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    env_replace: bool = False
    stdin: bytes | str | None = None
    cores: Sequence[int] = ()


class Ended(NamedTuple):
    """A child and its whole process group are gone, or it could not be started.

    Attributes:
        key: as `Children.run` returned it.
        exit_code: minus the signal's number where a signal ended it.
        killed: whether `Children.kill` was asked for it while it ran.
        stdout: decoded with replacement. Of an output that went to a file, its end, after a line
            that says so.
        stderr: the same.
        stdout_file: the path, where it went to a file because it was large.
        stderr_file: the same.
        started: seconds of `time.monotonic`, as `ended`.
        ended: when the child itself had ended.
        refused: the error number of the failed start; `stderr` says more.
        error: what failed of the infrastructure.
        successor: the key of the queued child that was started in its place.
    """

    key: int
    exit_code: int
    killed: bool = False
    stdout: str = ""
    stderr: str = ""
    stdout_file: str | None = None
    stderr_file: str | None = None
    started: float | None = None
    ended: float | None = None
    refused: int | None = None
    error: BackendError | None = None
    successor: int | None = None


class Children:
    """Child processes of this process, through a warden that is started when it is needed.

    Where the warden is killed, what ran has `Ended`; another one starts what had not begun.

    Args:
        on_events: called with lists of `Started` and `Ended`, on the loop's thread.
        loop: the event loop; the running one where none is given.
    """

    def __init__(
        self,
        on_events: Callable[[list[Started | Ended]], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._on_events = on_events
        self._loop = loop or asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._mark: int | None = None  # descriptor; see `_last_begun`
        self._inbox = messages.MessageBuffer()
        self._outbox = bytearray()
        self._sending = False
        self._last_key = 0
        # By key, what the next warden starts where this one is lost before it began: None once the
        # child has started, or is to be killed.
        self._live: dict[int, messages.Run | None] = {}
        self._to_kill: set[int] = set()  # keys of those that had not started when it was asked for
        self._guarded: set[int] = set()
        self._environment: dict[str, str] = {}  # as the warden has it
        self._directory = ""

    # ------------------------------------------------------------------ requests

    def run(self, launch: Launch, *, queued: bool = False) -> int:
        """Start a child; returns the key that its events carry.

        With `queued` the warden starts it when a child without cores of its own ends, in its
        place, which saves a round trip. `start_now` starts it earlier.

        Raises:
            BackendError: the warden cannot be started.
            ValueError, TypeError: `launch` holds what no process can be given.
        """
        self._ensure_warden()
        stdin = launch.stdin
        request = messages.Run(
            key=self._last_key + 1,
            argv=[plain_str(word) for word in launch.argv],
            stdout_path=plain_str(launch.stdout_path),
            stderr_path=plain_str(launch.stderr_path),
            to_files=bool(launch.to_files),
            limit=OUTPUT_LIMIT,
            cwd=None if launch.cwd is None else plain_str(launch.cwd),
            env={plain_str(k): plain_str(v) for k, v in launch.env.items()} if launch.env else {},
            env_replace=bool(launch.env_replace),
            stdin=b"".join([stdin]) if isinstance(stdin, bytes) else stdin and plain_str(stdin),
            cores=list(launch.cores),
            queued=queued,
        )
        self._request(request)
        self._last_key, self._live[request.key] = request.key, request
        return request.key

    def sync_environment(self) -> None:
        """Let the children that are started from now on have this process's environment of now.

        And its working directory. A comparison takes about 0.1 ms, so it is made for each burst
        and not for each child.
        """
        if self._sock is None:
            return  # a new warden is told anyway
        environment = dict(os.environ)
        if environment != self._environment:
            self._environment = environment
            self._request(messages.Environment(environment))
        try:
            directory = os.getcwd()
        except OSError:  # it was removed; the warden is still there
            return
        if directory != self._directory:
            self._directory = directory
            self._request(messages.Directory(directory))

    def start_now(self, key: int) -> None:
        """Start a queued child, unless it has been started meanwhile."""
        run = self._live.get(key)
        if run is not None:
            self._live[key] = run._replace(queued=False)
        self._request(messages.StartNow(key))

    def kill(self, key: int, grace: float) -> None:
        """End a child's group: SIGTERM, and SIGKILL after `grace` seconds. `Ended` follows."""
        if key in self._live:
            if self._live[key] is not None:
                self._live[key] = None
                self._to_kill.add(key)
            self._request(messages.Kill(key, grace))

    def guard(self, pid: int) -> None:
        """Have the process group of a child that we started ourselves killed when we are gone."""
        self._ensure_warden()
        self._guarded.add(pid)
        self._request(messages.Guard(pid))

    def unguard(self, pid: int) -> None:
        """Forget a guarded group, which has ended."""
        self._guarded.discard(pid)
        if self._sock is not None:
            self._request(messages.Unguard(pid))

    async def close(self) -> None:
        """End what is left, then the warden."""
        popen, self._popen = self._popen, None
        if popen is None:
            return
        self._disconnect()
        try:
            await asyncio.to_thread(popen.wait, _EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            logger.error("the warden (pid %d) did not exit within %g s", popen.pid, _EXIT_TIMEOUT)
            popen.kill()
            popen.wait()

    # ------------------------------------------------------------------ the warden

    def _ensure_warden(self) -> None:
        if self._sock is not None:
            return
        with contextlib.ExitStack() as undo:
            try:
                mark = _shared_number()
                undo.callback(os.close, mark)
                ours, theirs = map(undo.enter_context, socket.socketpair())
                fds = [theirs.fileno(), mark]
                self._popen = subprocess.Popen(
                    [sys.executable, "-I", "-S", _WARDEN, *map(str, fds)],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                raise BackendError(
                    f"cannot start processes: {error.strerror}", transient=True
                ) from error
            undo.pop_all()
        theirs.close()
        ours.setblocking(False)
        self._sock, self._mark = ours, mark
        keep_from_forks(ours)
        self._environment, self._directory = {}, ""
        self._inbox = messages.MessageBuffer()
        self._outbox.clear()
        self._loop.add_reader(ours.fileno(), self._on_readable)
        self.sync_environment()
        for pid in self._guarded:
            self._request(messages.Guard(pid))

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._sock = None
        if self._mark is not None:
            os.close(self._mark)
            self._mark = None

    def _request(self, request: messages.Request) -> None:
        # A frame for each, made here: what cannot be sent is then an error for who asks for it.
        self._outbox += messages.encode([request])
        if not self._sending:  # all of one turn of the loop travel at once
            self._sending = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._sending = False
        if self._sock is None or not self._outbox:
            return
        try:
            del self._outbox[: self._sock.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            return  # it has gone; `_on_readable` finds that out
        if self._outbox:
            self._loop.add_writer(self._sock.fileno(), self._send)
        else:
            self._loop.remove_writer(self._sock.fileno())

    def _on_readable(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose_warden()
            return
        events = [self._read(event) for event in self._inbox.feed(data)]
        if events:
            self._on_events(events)

    def _read(self, event: messages.Message) -> Started | Ended:
        if isinstance(event, Started):
            self._live[event.key] = None
            return event
        assert isinstance(event, messages.Ended | messages.Refused | messages.Dropped)
        self._live.pop(event.key, None)
        self._to_kill.discard(event.key)
        if isinstance(event, messages.Ended):
            return _ended(event)
        if isinstance(event, messages.Dropped):
            return Ended(event.key, -signal.SIGTERM, killed=True)
        return _refused(event)

    def _last_begun(self) -> int:
        """The highest key that the warden has begun to start, 0 where it is none.

        It writes the number before each start, because the event may be lost with it.
        """
        assert self._mark is not None
        return int.from_bytes(os.pread(self._mark, 8, 0), "big")

    def _lose_warden(self) -> None:
        """The warden was killed: so that nothing runs unwatched, what it started is killed too.

        What it had not begun is started by another one. Keys are begun in their order, more or
        less: one that was passed by a later one counts as begun, and nothing runs twice.
        """
        begun = self._last_begun()
        self._disconnect()
        popen, self._popen = self._popen, None
        code = None
        if popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = popen.wait(1.0)
            _end_session(popen.pid)
        error = BackendError(
            f"the process that starts our children was lost (exit code {code})",
            host=socket.gethostname(),
            transient=True,
        )
        ends: list[Started | Ended] = []
        again: list[messages.Run] = []
        for key, run in self._live.items():
            if key in self._to_kill and key > begun:
                ends.append(Ended(key, -signal.SIGTERM, killed=True))
            elif run is None or key <= begun or not begun:
                # Also where it never began anything: another one might not either, for ever.
                ends.append(Ended(key, -signal.SIGKILL, error=error))
            else:
                again.append(run)
        self._to_kill.clear()
        self._live = {run.key: run for run in again}
        self._outbox.clear()
        ends += self._start_again(again)
        if ends:
            self._on_events(ends)

    def _start_again(self, runs: Iterable[messages.Run]) -> list[Ended]:
        """Have another warden guard what we guard, and start what the last had not begun."""
        if not self._live and not self._guarded:
            return []
        try:
            self._ensure_warden()
        except BackendError as error:  # guarded is then what is left with the next child
            self._live.clear()
            return [Ended(run.key, 1, error=error) for run in runs]
        for run in runs:
            self._request(run)
        return []


def _refused(event: messages.Refused) -> Ended:
    text = f"{event.reason}: {event.filename!r}" if event.filename else event.reason
    if event.errno not in RESOURCE_ERRNOS:
        code = _EXIT_CODES.get(event.errno, 1)
        return Ended(event.key, code, stderr=text, refused=event.errno)
    error = BackendError(
        f"cannot start a process: {text}", host=socket.gethostname(), transient=True
    )
    return Ended(event.key, 1, stderr=text, refused=event.errno, error=error)


def _ended(event: messages.Ended) -> Ended:
    return Ended(
        event.key,
        event.exit_code,
        event.killed,
        _text(event.stdout, event.stdout_size, event.stdout_file),
        _text(event.stderr, event.stderr_size, event.stderr_file),
        event.stdout_file,
        event.stderr_file,
        event.started,
        event.ended,
        None,
        BackendError(f"output was lost: {event.error}", transient=False) if event.error else None,
        event.successor or None,
    )


def _shared_number() -> int:
    """A descriptor of eight bytes that another process can write, and we read when it is dead."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("rhapsody-begun")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.pwrite(fd, bytes(8), 0)  # now: the writer finds its place, however full the disk
    except OSError:
        os.close(fd)
        raise
    return fd


def _end_session(leader: int) -> None:
    """Kill what is in a warden's session or comes from there, until nothing of it is left.

    A process that left the session, and whose parent has ended too, cannot be told from others.
    """

    def left(table: ProcessTable) -> set[int]:
        members = [pid for pid, process in table.items() if process.session == leader]
        return {*members, *descendants(members, table)} - {leader}

    for _ in range(3):  # again for what a busy machine had not stopped in time
        for pid in (found := suspend(left)):
            kill(pid)
        if not found:
            return


def _text(data: bytes, size: int, path: str | None) -> str:
    text = data.decode(errors="replace")
    if path is not None:
        return f"[the last {len(data)} of {size} bytes; all of them are in {path}]\n{text}"
    if size > len(data):
        return f"[the last {len(data)} of {size} bytes; the others were lost]\n{text}"
    return text
