"""Runs `rhapsody launch` inside an image, and outside what it needs of the host.

Dragon and the supervisor run in the image, which shares processes, network and /dev/shm with the
host, so that all of the supervisor's promises hold there. This process stays outside. It passes
signals on, and it starts the programs that reach other hosts, ssh, srun or mpiexec, when a stand-in
in the image asks for one (see `outside`), with the command changed so that the other side enters
the same image: an image has no srun that fits the host's Slurm, and need not have an ssh.

The supervisor has a pipe of ours as its stdin: the numbers of signals come by it, and its end is
our end, however that came. Requests come by a socket with a random name and no file, that nobody
needs to remove; who asks is checked, for others on this host could find the name.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shlex
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rhapsody.runtime.errors import ResourceError
from rhapsody.runtime.local import descendants

from . import workflow_runner as head
from .host_shim import PROGRAMS, command_of_dragon
from .supervisor import PASSED_ON

__all__ = ["Image", "find_runner", "run_inside"]

_LEFT_SECONDS = 40.0  # for what runs inside to end, when the runner was killed; see _end_all there

# Signals that mean something to the supervisor; after one more it is not there, or not yet.
_HEARD_INSIDE = 2

# Of this process's own Python, and of a library for it; the image has its own. For the image there
# are the runner's own variables: APPTAINERENV_PYTHONPATH.
_HOSTS_OWN = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "LD_PRELOAD")

# The runner's settings that the other side needs too, behind its name and _. srun hands all on, ssh
# none; and no secret, for they stand on ssh's line.
_SETTINGS = ("BIND", "BINDPATH", "MOUNT", "NV", "NVCCLI", "ROCM", "NO_HOME", "NO_MOUNT", "USERNS")

# $0 is the image.
_INSIDE = """\
command -v rhapsody >/dev/null && exec rhapsody "$@"
echo "Error: $0 has no program rhapsody on its PATH; make one as containers/README.md says" >&2
exit 2
"""


class Image(NamedTuple):
    """An image, what runs it, and the folders that are seen in it under their own names."""

    runner: str
    path: str
    binds: Sequence[str]

    def line(self, words: Sequence[str], *options: str) -> list[str]:
        """The command line that runs words inside, in the current folder.

        Args:
            words: the program and its arguments.
            options: of the runner's, before its command.

        Raises:
            ResourceError: the name of a folder has what the runner takes for an end of it.
        """
        binds = []
        for folder in self.binds:
            if ":" in folder or "," in folder:
                raise ResourceError(f"--image: {folder} can't be bound, for its : or , in the name")
            binds += ["--bind", folder]
        return [self.runner, *options, "exec", *binds, "--pwd", os.getcwd(), self.path, *words]

    def settings(self, environ: Mapping[str, str]) -> list[str]:
        """What the user has set for the runner, as NAME=VALUE."""
        names = (
            f"{prefix}_{name}" for prefix in ("APPTAINER", "SINGULARITY") for name in _SETTINGS
        )
        return [f"{name}={environ[name]}" for name in names if name in environ]

    def inside(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Variables of the runner that set some inside."""
        prefix = f"{os.path.basename(self.runner).upper()}ENV_"
        return {prefix + name: value for name, value in environ.items()}


def find_runner(environ: Mapping[str, str]) -> str:
    """Return the path of the program that runs images.

    Raises:
        ResourceError: there is none.
    """
    for name in ("apptainer", "singularity"):
        path = shutil.which(name, path=environ.get("PATH"))
        if path is not None:
            return os.path.abspath(path)
    raise ResourceError(
        "--image: neither apptainer nor singularity is on the PATH; install Apptainer "
        "(https://apptainer.org), or load its module"
    )


def other_side(
    image: Image, words: Sequence[str], inside: Mapping[str, str], environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The line and variables that start on other hosts what Dragon wants there, in the image.

    Raises:
        ValueError: this is not how Dragon does it.
    """
    place = command_of_dragon(words)
    if words[0] not in PROGRAMS.values() or place is None:
        raise ValueError(f"not a line of Dragon's: {shlex.join(words)}")
    before, command = [*words[:place]], [*words[place:]]
    # Silent but for errors: Dragon takes a warning for the workflow's output, with a word on it.
    if words[0] == "ssh":  # one word for the shell there, which sets the variables too
        line = image.line(["/bin/sh", "-c", *command], "--silent")
        return [*before, shlex.join(["env", *image.settings(environ), *line])], dict(environ)
    return [*before, *image.line(command, "--silent")], {**environ, **image.inside(inside)}


def run_inside(image: Image, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `rhapsody launch` with arguments inside; nothing of it is left when this returns.

    Returns its exit code: the workflow's, or 128 + n where signal n ended it. All children of this
    process are taken for its own.

    Raises:
        ResourceError: a folder that is to be bound has a name that cannot be.
    """
    environ = {name: value for name, value in environ.items() if name not in _HOSTS_OWN}
    name = f"rhapsody-{secrets.token_hex(16)}"
    words = ["sh", "-c", _INSIDE, image.path, "launch", "--outside", name, *arguments]
    slots = environ.get("PBS_NODEFILE")  # on this node only
    here = image if slots is None else image._replace(binds=[*image.binds, slots])
    line = here.line(words)
    descendants.adopt()
    sys.stdout.flush()
    sys.stderr.flush()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        return _Outside(image, environ, listener).run(line)


class _Request:
    """A stand-in that asks for a program, what it has said so far, and the program."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.said = b""
        self.streams: list[int] = []
        self.pid = 0


class _Outside:
    """The loop: signals, requests, and the ends of what was started."""

    def __init__(self, image: Image, environ: Mapping[str, str], listener: socket.socket) -> None:
        self.image = image
        self.environ = environ
        self.listener = listener
        self.runner = 0
        self.status: int | None = None  # the runner's, once it has ended
        self.signals: list[int] = []
        self.requests: dict[int, _Request] = {}  # by the descriptor of the connection
        self.poll = select.poll()
        self.react: dict[int, Callable[[], None]] = {}

    def run(self, line: list[str]) -> int:
        """Run the line; returns its exit code when all below this process has gone."""
        bell, theirs = os.pipe()
        stdin, control = os.pipe()
        for fd in (bell, theirs, control):
            os.set_blocking(fd, False)
        self.listen(bell, lambda: self.on_bell(bell, control))
        self.listen(self.listener.fileno(), self.on_connection)
        with _rung_by_signals(theirs):
            self.runner = os.posix_spawn(
                line[0],
                line,
                self.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)],
                setpgroup=0,  # Ctrl-C is ours to pass on, once
                setsigdef=[*PASSED_ON, signal.SIGQUIT, signal.SIGPIPE],
            )
            os.close(stdin)
            while self.status is None:
                self.turn(None)
            self.await_the_others()
        for fd in (bell, theirs, control):
            os.close(fd)
        if len(self.signals) > _HEARD_INSIDE:
            return 128 + self.signals[0]
        return self.status if self.status >= 0 else 128 - self.status

    def await_the_others(self) -> None:
        """Let what has lost the runner end in its own way, and serve it so long."""
        deadline = time.monotonic() + _LEFT_SECONDS
        while descendants.pids() and (left := deadline - time.monotonic()) > 0:
            self.turn(left)
        for pid in descendants.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def listen(self, fd: int, react: Callable[[], None]) -> None:
        self.react[fd] = react
        self.poll.register(fd, select.POLLIN)

    def turn(self, seconds: float | None) -> None:
        for fd, _ in self.poll.poll(None if seconds is None else seconds * 1000):
            if fd in self.react:  # else it was closed in this same turn
                self.react[fd]()

    def on_bell(self, bell: int, control: int) -> None:
        """Take the numbers of signals that came: pass them on, and reap where a child has ended."""
        for number in os.read(bell, 4096):
            if number in PASSED_ON:
                self.signals.append(number)
                with contextlib.suppress(OSError):  # nobody reads it any more
                    os.write(control, bytes([number]))
                if len(self.signals) > _HEARD_INSIDE and self.status is None:
                    os.kill(self.runner, signal.SIGKILL)
        for pid, status in descendants.reap():
            code = os.waitstatus_to_exitcode(status)
            if pid == self.runner:
                self.status = code
            for request in [one for one in self.requests.values() if one.pid == pid]:
                self.answer(request, code)

    # ------------------------------------------------------------------ requests

    def on_connection(self) -> None:
        connection, _ = self.listener.accept()
        size = struct.calcsize("3i")  # struct ucred: pid, uid, gid
        _, uid, _ = struct.unpack(
            "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        )
        if uid != os.getuid():
            connection.close()
            return
        request = _Request(connection)
        self.requests[connection.fileno()] = request
        self.listen(connection.fileno(), lambda: self.on_request(request))

    def on_request(self, request: _Request) -> None:
        """Take what a stand-in says: its line, then the numbers of signals; its end is a kill."""
        try:
            data, streams, _, _ = socket.recv_fds(request.connection, 1 << 16, 3)
        except ConnectionResetError:
            data, streams = b"", []
        request.streams += streams
        if not data:
            if request.pid:
                os.kill(request.pid, signal.SIGKILL)
            self.forget(request)
        elif request.pid:
            for number in data:
                os.kill(request.pid, number)
        else:
            request.said += data
            if request.said.endswith(b"\n"):
                self.start(request)

    def start(self, request: _Request) -> None:
        asked = json.loads(request.said)
        words, environ = other_side(self.image, asked["words"], asked["environ"], self.environ)
        path = shutil.which(words[0], path=self.environ.get("PATH"))
        if path is None:
            os.write(request.streams[2], f"{words[0]}: not found outside the image\n".encode())
            self.answer(request, 127)
            return
        parent = os.getpid()
        request.pid = os.fork()
        if request.pid == 0:
            try:
                for fd, stream in enumerate(request.streams):
                    os.dup2(stream, fd)
                head.die_with(parent)
                os.setpgid(0, 0)
                for number in (*PASSED_ON, signal.SIGCHLD, signal.SIGPIPE):
                    signal.signal(number, signal.SIG_DFL)
                os.execve(path, words, environ)  # noqa: S606 - a shell is not wanted
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(126)
        for stream in request.streams:
            os.close(stream)
        request.streams = []

    def answer(self, request: _Request, code: int) -> None:
        with contextlib.suppress(OSError):  # the stand-in was killed in this moment
            request.connection.sendall(b"%d\n" % (code if code >= 0 else 128 - code))
        self.forget(request)

    def forget(self, request: _Request) -> None:
        fd = request.connection.fileno()
        self.poll.unregister(fd)
        del self.react[fd], self.requests[fd]
        request.connection.close()
        for stream in request.streams:
            os.close(stream)


@contextlib.contextmanager
def _rung_by_signals(fd: int) -> Iterator[None]:
    """Have the numbers of signals, and of the end of a child, written to a pipe.

    Those that are ignored stay so.
    """
    heard = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in heard}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
    wakeup = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
