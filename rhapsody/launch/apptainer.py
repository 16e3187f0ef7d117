"""Runs `rhapsody launch` inside an Apptainer image, and the programs that it needs on the host.

Dragon and the supervisor run in the image, which shares processes, network and /dev/shm with the
host, so that all of the supervisor's promises hold there. This process stays on the host. It
forwards signals, and when a shim in the image asks for ssh, srun or mpiexec (see `host_shim`), it
starts the host's, with the command changed so that Dragon's part on the other host runs in the same
image: an image has no srun that fits the host's Slurm, and need not have an ssh.

The supervisor's stdin is a pipe from this process: it carries the numbers of signals, and it closes
when this process ends, whatever ends it. Shims connect to a socket with a random abstract name,
which leaves no file; the user id of the peer is checked, since other users can find the name.
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

from .host_shim import PROGRAMS, find_dragon_command
from .supervisor import FORWARDED_SIGNALS
from .workflow_runner import die_with_parent

__all__ = ["Image", "find_apptainer", "run_inside"]

# For what runs inside to end when apptainer was killed: the supervisor's _end_all takes as long.
_CLEANUP_SECONDS = 40.0

# Signals that the supervisor acts on. One more means that it does not respond, or is not up yet.
_SUPERVISOR_SIGNALS = 2

# Variables for the Python of the host, which the image's must not see. APPTAINERENV_PYTHONPATH and
# the like set them in the image.
_HOST_VARIABLES = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "LD_PRELOAD")

# Settings of apptainer that other hosts need too: the part of the variable behind APPTAINER_. srun
# passes all variables, ssh none. None is a secret: they are shown in the command line of ssh.
_SETTINGS = ("BIND", "BINDPATH", "MOUNT", "NV", "NVCCLI", "ROCM", "NO_HOME", "NO_MOUNT", "USERNS")

# $0 is the image.
_INSIDE = """\
command -v rhapsody >/dev/null && exec rhapsody "$@"
echo "Error: $0 has no program rhapsody on its PATH; make one as containers/README.md says" >&2
exit 2
"""


class Image(NamedTuple):
    """An image, the program that runs it, and the folders of the host that are bound in it."""

    apptainer: str  # the path of apptainer or singularity
    path: str
    binds: Sequence[str]  # each is seen inside under its own path

    def command(self, argv: Sequence[str], *options: str) -> list[str]:
        """The command line that runs `argv` inside, in the current folder.

        Args:
            argv: the program and its arguments.
            options: of apptainer itself, before its command.

        Raises:
            ResourceError: a folder has a comma or a colon in its name, which apptainer would take
                for the end of it.
        """
        binds = []
        for folder in self.binds:
            if ":" in folder or "," in folder:
                raise ResourceError(
                    f"--image: {folder} can't be bound: its name has a : or , in it"
                )
            binds += ["--bind", folder]
        return [self.apptainer, *options, "exec", *binds, "--pwd", os.getcwd(), self.path, *argv]

    def settings(self, environ: Mapping[str, str]) -> list[str]:
        """What the user has set for apptainer, as NAME=VALUE."""
        names = (
            f"{prefix}_{name}" for prefix in ("APPTAINER", "SINGULARITY") for name in _SETTINGS
        )
        return [f"{name}={environ[name]}" for name in names if name in environ]

    def variables_inside(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables by which apptainer sets those of `environ` inside."""
        prefix = f"{os.path.basename(self.apptainer).upper()}ENV_"
        return {prefix + name: value for name, value in environ.items()}


def find_apptainer(environ: Mapping[str, str]) -> str:
    """Return the path of apptainer or singularity.

    Raises:
        ResourceError: neither is on the PATH.
    """
    for name in ("apptainer", "singularity"):
        path = shutil.which(name, path=environ.get("PATH"))
        if path is not None:
            return os.path.abspath(path)
    raise ResourceError(
        "--image: neither apptainer nor singularity is on the PATH; install Apptainer "
        "(https://apptainer.org), or load its module"
    )


class HostCommand(NamedTuple):
    """A command line to run on the host, and its environment."""

    argv: list[str]
    environ: dict[str, str]


def enter_image(
    image: Image, argv: Sequence[str], inside: Mapping[str, str], environ: Mapping[str, str]
) -> HostCommand:
    """Change a command that starts Dragon on other hosts, so that it starts Dragon in the image.

    Args:
        image: is under the same path on the other hosts.
        argv: Dragon's command: ssh, srun or mpiexec with their arguments.
        inside: variables that Dragon's part there needs.
        environ: of the host, for ssh, srun or mpiexec.

    Raises:
        ValueError: this is not a command of Dragon's.
    """
    start = find_dragon_command(argv)
    if argv[0] not in PROGRAMS.values() or start is None:
        raise ValueError(f"not a command of Dragon's: {shlex.join(argv)}")
    before, command = [*argv[:start]], [*argv[start:]]
    # --silent: Dragon would take a warning for the workflow's output, in a line of its own.
    if argv[0] == "ssh":  # its command is one shell command, which sets the variables too
        line = image.command(["/bin/sh", "-c", *command], "--silent")
        return HostCommand(
            [*before, shlex.join(["env", *image.settings(environ), *line])], dict(environ)
        )
    return HostCommand(
        [*before, *image.command(command, "--silent")],
        {**environ, **image.variables_inside(inside)},
    )


def run_inside(image: Image, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `rhapsody launch` with arguments inside; nothing of it is left when this returns.

    Returns its exit code: the workflow's, or 128 + n where signal n ended it. All children of this
    process are taken for the run's.

    Raises:
        ResourceError: a folder that is to be bound has a name that cannot be.
    """
    environ = {name: value for name, value in environ.items() if name not in _HOST_VARIABLES}
    name = f"rhapsody-{secrets.token_hex(16)}"
    argv = ["sh", "-c", _INSIDE, image.path, "launch", "--outside", name, *arguments]
    node_file = environ.get("PBS_NODEFILE")  # is on this node only
    here = image if node_file is None else image._replace(binds=[*image.binds, node_file])
    command = here.command(argv)
    descendants.become_subreaper()
    sys.stdout.flush()
    sys.stderr.flush()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        return _HostProcess(image, environ, listener).run(command)


class _Request:
    """A shim that asks for a program of the host: what it has sent so far, and the program."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = b""
        self.streams: list[int] = []
        self.pid = 0  # of the program, once it has started


class _HostProcess:
    """An event loop over signals, requests of shims, and the ends of what was started."""

    def __init__(self, image: Image, environ: Mapping[str, str], listener: socket.socket) -> None:
        self.image = image
        self.environ = environ
        self.listener = listener
        self.apptainer = 0  # its pid
        self.apptainer_code: int | None = None  # once it has ended
        self.signals: list[int] = []
        self.requests: dict[int, _Request] = {}  # by the descriptor of the connection
        self.poll = select.poll()
        self.callbacks: dict[int, Callable[[], None]] = {}

    def run(self, command: list[str]) -> int:
        """Run the command; returns its exit code when all below this process has gone."""
        wakeup, wakeup_writer = os.pipe()
        stdin, signal_writer = os.pipe()
        for fd in (wakeup, wakeup_writer, signal_writer):
            os.set_blocking(fd, False)
        self.add_reader(wakeup, lambda: self.on_signals(wakeup, signal_writer))
        self.add_reader(self.listener.fileno(), self.on_connection)
        with _signals_written_to(wakeup_writer):
            self.apptainer = os.posix_spawn(
                command[0],
                command,
                self.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)],
                setpgroup=0,  # Ctrl-C is forwarded, and must not arrive twice
                setsigdef=[*FORWARDED_SIGNALS, signal.SIGQUIT, signal.SIGPIPE],
            )
            os.close(stdin)
            while self.apptainer_code is None:
                self.run_once(None)
            self.wait_for_descendants()
        for fd in (wakeup, wakeup_writer, signal_writer):
            os.close(fd)
        if len(self.signals) > _SUPERVISOR_SIGNALS:
            return 128 + self.signals[0]
        return self.apptainer_code if self.apptainer_code >= 0 else 128 - self.apptainer_code

    def wait_for_descendants(self) -> None:
        """Let what outlives a killed apptainer end in order, and serve its requests meanwhile."""
        deadline = time.monotonic() + _CLEANUP_SECONDS
        while descendants.pids() and (left := deadline - time.monotonic()) > 0:
            self.run_once(left)
        for pid in descendants.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self.callbacks[fd] = callback
        self.poll.register(fd, select.POLLIN)

    def run_once(self, timeout: float | None) -> None:
        """Wait for events, at most `timeout` seconds, and call what they are for."""
        for fd, _ in self.poll.poll(None if timeout is None else timeout * 1000):
            if fd in self.callbacks:  # else an event before this one has closed it
                self.callbacks[fd]()

    def on_signals(self, wakeup: int, signal_writer: int) -> None:
        """Take the numbers of signals that arrived: forward them, and reap children."""
        for number in os.read(wakeup, 4096):
            if number in FORWARDED_SIGNALS:
                self.signals.append(number)
                with contextlib.suppress(OSError):  # nobody reads it any more
                    os.write(signal_writer, bytes([number]))
                if len(self.signals) > _SUPERVISOR_SIGNALS and self.apptainer_code is None:
                    os.kill(self.apptainer, signal.SIGKILL)
        for pid, status in descendants.reap():
            code = os.waitstatus_to_exitcode(status)
            if pid == self.apptainer:
                self.apptainer_code = code
            for request in [one for one in self.requests.values() if one.pid == pid]:
                self.reply(request, code)

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
        self.add_reader(connection.fileno(), lambda: self.on_request(request))

    def on_request(self, request: _Request) -> None:
        """Take what a shim sends: its command, then the numbers of signals; its end kills."""
        try:
            data, streams, _, _ = socket.recv_fds(request.connection, 1 << 16, 3)
        except ConnectionResetError:
            data, streams = b"", []
        request.streams += streams
        if not data:
            if request.pid:
                os.kill(request.pid, signal.SIGKILL)
            self.close(request)
        elif request.pid:
            for number in data:
                os.kill(request.pid, number)
        else:
            request.received += data
            if request.received.endswith(b"\n"):
                self.start(request)

    def start(self, request: _Request) -> None:
        wanted = json.loads(request.received)
        argv, environ = enter_image(self.image, wanted["argv"], wanted["environ"], self.environ)
        path = shutil.which(argv[0], path=self.environ.get("PATH"))
        if path is None:
            os.write(request.streams[2], f"{argv[0]}: not found outside the image\n".encode())
            self.reply(request, 127)
            return
        parent = os.getpid()
        request.pid = os.fork()
        if request.pid == 0:
            try:
                for fd, stream in enumerate(request.streams):
                    os.dup2(stream, fd)
                die_with_parent(parent)
                os.setpgid(0, 0)
                for number in (*FORWARDED_SIGNALS, signal.SIGCHLD, signal.SIGPIPE):
                    signal.signal(number, signal.SIG_DFL)
                os.execve(path, argv, environ)  # noqa: S606 - a shell is not wanted
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(126)
        for stream in request.streams:
            os.close(stream)
        request.streams = []

    def reply(self, request: _Request, code: int) -> None:
        """Send a shim the exit code of its program."""
        with contextlib.suppress(OSError):  # the shim was killed meanwhile
            request.connection.sendall(b"%d\n" % (code if code >= 0 else 128 - code))
        self.close(request)

    def close(self, request: _Request) -> None:
        fd = request.connection.fileno()
        self.poll.unregister(fd)
        del self.callbacks[fd], self.requests[fd]
        request.connection.close()
        for stream in request.streams:
            os.close(stream)


@contextlib.contextmanager
def _signals_written_to(fd: int) -> Iterator[None]:
    """Have the numbers of signals, SIGCHLD too, written to a pipe; ignored ones stay ignored."""
    handled = [n for n in FORWARDED_SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
    wakeup = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
