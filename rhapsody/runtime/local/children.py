"""A driver's end of the warden: child processes in groups of their own, which never outlive it.

`Children` starts one warden (see `warden`) with the first child, and tells of starts and ends in
bursts, on the thread of the event loop that it was made for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import marshal
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rhapsody.runtime.errors import BackendError
from rhapsody.runtime.text import plain_str

from .frames import keep_from_forks
from .warden import __main__ as warden

__all__ = ["RESOURCE_ERRNOS", "Children", "Ended", "Launch", "Started"]

logger = logging.getLogger(__name__)

#: bytes of each output that are kept in memory; what is more goes to a file
OUTPUT_LIMIT = 1 << 20
#: what is wrong with the machine, not with the task: no descriptors, memory, processes or space
RESOURCE_ERRNOS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EIO}
)
# Seconds for the warden to end what is left and go, after its socket is closed; it takes 0.5 s
# where a child ignores SIGTERM.
_LEAVE = 10.0


@dataclass(frozen=True)
class Launch:
    """A child process to start.

    `stdin` is what the child reads, or as a text the path of a file; `stdout_path` and
    `stderr_path` are where the outputs go: from the first byte with `to_files`, else what is more
    than `OUTPUT_LIMIT` bytes.
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


class Started(NamedTuple):
    """A child runs."""

    key: int
    pid: int
    started: float


class Ended(NamedTuple):
    """A child and its whole group are gone, or it could not be started (`refused`, an errno).

    Texts are decoded with replacement. Of an output that went to a file the text is the end of
    it, after a line that says so. `error` says what of the infrastructure failed, if anything did.
    `successor` is the key of the queued child that was started in its place.
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
        self._begun: int | None = None  # descriptor; see `_last_begun`
        self._inbox = bytearray()
        self._outbox = bytearray()
        self._sending = False
        self._keys = 0
        # By key, what the warden was asked for, to be asked of the next where this one is lost
        # before it began: None once the child has started, () once it shall not any more.
        self._live: dict[int, tuple[Any, ...] | None] = {}
        self._guarded: set[int] = set()
        self._environ: dict[str, str] = {}
        self._home = ""

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
        key = self._keys + 1
        stdin = launch.stdin
        to_files = bool(launch.to_files)
        request = (
            "wait" if queued else "run",
            key,
            [plain_str(word) for word in launch.argv],
            None if launch.cwd is None else plain_str(launch.cwd),
            {plain_str(k): plain_str(v) for k, v in launch.env.items()} if launch.env else None,
            bool(launch.env_replace),
            b"".join([stdin]) if isinstance(stdin, bytes) else stdin and plain_str(stdin),
            [(to_files, plain_str(launch.stdout_path)), (to_files, plain_str(launch.stderr_path))],
            OUTPUT_LIMIT,
            list(launch.cores),
        )
        self._request(*request)
        self._keys, self._live[key] = key, request
        return key

    def sync_environment(self) -> None:
        """Let the children that are started from now on have this process's environment of now.

        And its working directory. A comparison takes about 0.1 ms, so it is made for each burst
        and not for each child.
        """
        if self._sock is None:
            return  # a new warden is told anyway
        environ = dict(os.environ)
        if environ != self._environ:
            self._environ = environ
            self._request("environ", environ)
        try:
            home = os.getcwd()
        except OSError:  # it was removed; the warden is still there
            return
        if home != self._home:
            self._home = home
            self._request("home", home)

    def start_now(self, key: int) -> None:
        """Start a queued child, unless it has been started meanwhile."""
        request = self._live.get(key)
        if request:
            self._live[key] = ("run", *request[1:])
        self._request("go", key)

    def kill(self, key: int, grace: float) -> None:
        """End a child's group: SIGTERM, and SIGKILL after `grace` seconds. `Ended` follows."""
        if key in self._live:
            if self._live[key] is not None:
                self._live[key] = ()
            self._request("kill", key, grace)

    def guard(self, pid: int) -> None:
        """Take the process group of a child that we started ourselves down with us."""
        self._ensure_warden()
        self._guarded.add(pid)
        self._request("guard", pid)

    def unguard(self, pid: int) -> None:
        """Forget a guarded group, which has ended."""
        self._guarded.discard(pid)
        if self._sock is not None:
            self._request("unguard", pid)

    async def close(self) -> None:
        """End what is left, then the warden."""
        popen, self._popen = self._popen, None
        if popen is None:
            return
        self._hang_up()
        try:
            await asyncio.to_thread(popen.wait, _LEAVE)
        except subprocess.TimeoutExpired:
            logger.error("the warden (pid %d) did not leave within %g s", popen.pid, _LEAVE)
            popen.kill()
            popen.wait()

    # ------------------------------------------------------------------ the warden

    def _ensure_warden(self) -> None:
        if self._sock is not None:
            return
        with contextlib.ExitStack() as undo:
            try:
                begun = _shared_number()
                undo.callback(os.close, begun)
                ours, theirs = map(undo.enter_context, socket.socketpair())
                fds = [theirs.fileno(), begun]
                self._popen = subprocess.Popen(
                    [sys.executable, "-I", "-S", warden.__file__, *map(str, fds)],
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
        self._sock, self._begun = ours, begun
        keep_from_forks(ours)
        self._environ, self._home = {}, ""
        self._inbox.clear()
        self._outbox.clear()
        self._loop.add_reader(ours.fileno(), self._on_readable)
        self.sync_environment()
        for pid in self._guarded:
            self._request("guard", pid)

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._sock = None
        if self._begun is not None:
            os.close(self._begun)
            self._begun = None

    def _request(self, *request: Any) -> None:
        # A frame for each, made here: one that cannot be made is the trouble of who asks for it.
        data = marshal.dumps(request)
        self._outbox += struct.pack("!I", len(data)) + data
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
            return  # it has gone; the reader hears of it
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
        self._inbox += data
        events: list[Started | Ended] = []
        while len(self._inbox) >= 4:
            (size,) = struct.unpack_from("!I", self._inbox)
            if len(self._inbox) < 4 + size:
                break
            with memoryview(self._inbox) as view:
                message = marshal.loads(view[4 : 4 + size])
            del self._inbox[: 4 + size]
            events += [self._read(reply) for reply in message]
        if events:
            self._on_events(events)

    def _read(self, reply: tuple[Any, ...]) -> Started | Ended:
        kind, key = reply[:2]
        if kind == "started":
            self._live[key] = None
            return Started(*reply[1:])
        self._live.pop(key, None)
        if kind == "dropped":
            return Ended(key, -signal.SIGTERM, killed=True)
        if kind == "refused":
            _, _, number, words, what = reply
            text = f"{words}: {what!r}" if what else words
            if number in RESOURCE_ERRNOS:
                short = BackendError(
                    f"cannot start a process: {text}", host=socket.gethostname(), transient=True
                )
                return Ended(key, 1, stderr=text, refused=number, error=short)
            code = {errno.ENOENT: 127, errno.EACCES: 126, errno.ENOEXEC: 126}.get(number, 1)
            return Ended(key, code, stderr=text, refused=number)
        _, _, code, killed, outputs, started, ended, error, successor = reply
        (out, out_file), (err, err_file) = map(_text, outputs)
        failure = BackendError(f"output was lost: {error}", transient=False) if error else None
        return Ended(
            key, code, killed, out, err, out_file, err_file, started, ended, None, failure, successor
        )

    def _last_begun(self) -> int:
        """The highest key that the warden has begun to start, 0 where it is none.

        It writes the number before each start, because its news of a start may be lost with it.
        """
        assert self._begun is not None
        return int.from_bytes(os.pread(self._begun, 8, 0), "big")

    def _lose_warden(self) -> None:
        """The warden was killed: so that nothing runs unwatched, what it started goes too.

        What it had not begun is started by another one. Keys are begun in their order, more or
        less: one that was passed by a later one counts as begun, and nothing runs twice.
        """
        begun = self._last_begun()
        self._hang_up()
        popen, self._popen = self._popen, None
        code = None
        if popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = popen.wait(1.0)
        if popen is not None:
            _end_session(popen.pid)
        error = BackendError(
            f"the process that starts our children was lost (exit code {code})",
            host=socket.gethostname(),
            transient=True,
        )
        ends: list[Started | Ended] = []
        again: dict[int, tuple[Any, ...]] = {}
        for key, request in self._live.items():
            if request is None or key <= begun or (request and not begun):
                # Also where it never began anything: another one might not either, for ever.
                ends.append(Ended(key, -signal.SIGKILL, error=error))
            elif not request:
                ends.append(Ended(key, -signal.SIGTERM, killed=True))
            else:
                again[key] = request
        self._live = {**again}
        self._outbox.clear()
        ends += self._ask_again(again)
        if ends:
            self._on_events(ends)

    def _ask_again(self, requests: dict[int, tuple[Any, ...]]) -> list[Ended]:
        """Have another warden guard what we guard, and start what the last had not begun."""
        if not requests and not self._guarded:
            return []
        try:
            self._ensure_warden()
        except BackendError as error:  # guarded is then what is left with the next child
            self._live.clear()
            return [Ended(key, 1, error=error) for key in requests]
        for request in requests.values():
            self._request(*request)
        return []


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

    def left(table: warden.Table) -> set[int]:
        members = [pid for pid, (_, _, session, _) in table.items() if session == leader]
        return {*members, *warden.descendants(members, table)} - {leader}

    for _ in range(3):  # again for what a busy machine had not stopped in time
        for pid in (found := warden.hold(left)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return


def _text(output: tuple[bytes, int, str | None] | None) -> tuple[str, str | None]:
    if output is None:
        return "", None
    data, size, path = output
    text = data.decode(errors="replace")
    if path is not None:
        return f"[the last {len(data)} of {size} bytes; all of them are in {path}]\n{text}", path
    if size > len(data):
        return f"[the last {len(data)} of {size} bytes; the others were lost]\n{text}", None
    return text, None
