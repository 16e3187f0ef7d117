"""One node, or several and a front end, out of namespaces of this machine.

A `Sandbox` has its own ``/dev/shm``, ``/var/tmp``, mounts, IPC and processes. `Nodes` has that and
a network, hostname and boot id for each of ``node1`` ... ``nodeN``, and a front end where commands
run that reaches them by an ``ssh`` of its own. All of it ends with the object, or with this
process, however that ends; nothing is kept on the disk.

By hand, as root: ``python -m tests.on_dragon.nodes 2 COMMAND...`` (0: a sandbox).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from . import machine, small
from .command import KILLED, Result, Running

if TYPE_CHECKING:
    from typing_extensions import Self

_HERE = Path(__file__).parent
_NEEDED = [str(Path(__file__).resolve().parents[2]), sys.prefix]  # the clone, and its interpreter

# Becomes the leader of a group that its own namespace knows (the group that we make has the number
# 0 in there), goes where it shall run, and turns into the command.
_ENTER = (
    "import os, sys; os.setpgid(0, 0); os.chdir(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
)


def _heed_signals() -> None:
    """A background job of a shell ignores these, and so would all that it starts."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


class _Box:
    """Namespaces that a first process holds, by whose end everything in them ends."""

    def __init__(
        self,
        shm: str,
        *,
        hostname: str = "",
        hosts: str = "",
        network: bool = False,
        inside: _Box | None = None,
    ) -> None:
        names = "-mipf" + ("n" if network else "") + ("u" if hostname else "")
        init = ["/bin/sh", str(_HERE / "init.sh"), shm, hostname, hosts, *_NEEDED]
        words = ["unshare", names, "--mount-proc", "--kill-child=KILL", *init]
        self.namespaces = ["-m", "-i", "-p", *(["-n"] * network), *(["-u"] * bool(hostname))]
        self._starter = subprocess.Popen(
            inside.entered(words) if inside else words,
            stdin=subprocess.PIPE,  # its end is the first process's sign to end
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
            start_new_session=True,  # Ctrl-C is the test run's, which then takes this down
            preexec_fn=_heed_signals,
        )
        assert self._starter.stdout is not None
        if self._first_line() != b"ready\n":
            self._starter.kill()
            said = self._starter.communicate(timeout=KILLED)[1].decode(errors="replace").strip()
            raise RuntimeError(f"no box came of {' '.join(words)}: {said}")
        self._keepers = _line_of_descent(self._starter.pid)
        self.pid = self._keepers[-1]
        self._namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        if network:
            self.ip("link set lo up")

    def _first_line(self) -> bytes:
        """What the first process says, or nothing where it says nothing in time."""
        assert self._starter.stdout is not None
        said, _, _ = select.select([self._starter.stdout], [], [], KILLED)
        return self._starter.stdout.readline() if said else b""

    def ip(self, *lines: str) -> None:
        """Run commands of ip(8) in its network."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-n", machine.which("ip") or "ip", "-batch", "-"],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=KILLED,
        )
        if done.returncode:
            raise RuntimeError(f"ip: {done.stderr.strip()}")

    def entered(self, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` in here."""
        return ["nsenter", "-t", str(self.pid), *self.namespaces, "--", *words]

    def processes(self, keepers: Sequence[int] = ()) -> dict[int, str]:
        """Command lines of what runs in here, by pid; not those that hold it or `keepers`."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in (*self._keepers, *keepers):
                # A zombie, or one that ends just now, has no command line any more.
                # One that we may not look at is none of ours.
                with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                    if os.readlink(entry / "ns/pid") == self._namespace:
                        line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        found |= {int(entry.name): line.strip()} if line else {}
        return found

    def alive(self) -> bool:
        """Whether it is there."""
        return self._starter.poll() is None

    def left(self, grace: float, keepers: Sequence[int] = ()) -> list[str]:
        """What is there after the processes had `grace` seconds to end by themselves."""
        if not self.alive():
            return []
        deadline = time.monotonic() + grace
        while (there := self.processes(keepers)) and _ended_one(there, deadline):
            pass
        files = sorted(os.listdir(f"/proc/{self.pid}/root/dev/shm"))
        return sorted(there.values()) + [f"/dev/shm/{name}" for name in files]

    def kill_all(self, keepers: Sequence[int] = ()) -> None:
        """Kill all that runs in here; the box stays, and what is in its /dev/shm.

        Raises:
            TimeoutError: something survives it; says what.
        """
        deadline = time.monotonic() + KILLED
        while there := self.processes(keepers):  # again, for what they started meanwhile
            if time.monotonic() > deadline:
                raise TimeoutError(f"cannot be killed: {there}")
            for pid in there:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _ended_one(there, deadline)

    def kill(self) -> None:
        """End it with all that is in it, without warning."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """End it with all that is in it."""
        for pipe in (self._starter.stdin, self._starter.stdout, self._starter.stderr):
            assert pipe is not None
            pipe.close()
        try:
            # The kernel lets the first process end when all others have.
            self._starter.wait(KILLED)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGKILL)
            self._starter.wait(KILLED)

    @property
    def keepers(self) -> list[int]:
        """The processes that hold it."""
        return self._keepers


class _Place:
    """Where commands run: a box, and what surrounds it."""

    #: how Dragon is started here
    launcher: list[str]

    def __init__(self) -> None:
        machine.require()
        self._front: _Box

    def start(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> Running:
        """Start a command; the interpreter's folder is first on its PATH.

        Args:
            command: the program and its arguments; through no shell.
            env: variables beside this process's own.
            cwd: its folder, by default the current one.
        """
        entry, variables = self.entry(command, env or {}, cwd or os.getcwd())
        process = subprocess.Popen(
            entry,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=variables,
            preexec_fn=_heed_signals,
        )
        return Running(process, self.kill_all)

    def entry(
        self,
        command: Sequence[str | os.PathLike[str]],
        env: Mapping[str, str],
        cwd: str | os.PathLike[str],
    ) -> tuple[list[str], dict[str, str]]:
        """The command line that enters and runs `command`, and its environment."""
        words = [sys.executable, "-I", "-S", "-c", _ENTER, os.fspath(cwd)]
        words += [os.fspath(word) for word in command]
        return self._front.entered(words), self._environment(env)

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> Result:
        """Run a command to its end.

        Raises:
            TimeoutError: it still ran after `timeout` seconds; then all in here is killed, and
                the error says what was written.
        """
        return self.start(command, env=env, cwd=cwd).wait(timeout)

    def left(self, grace: float = 5.0) -> list[str]:
        """What commands left behind, a line each: processes (which get `grace` seconds to end),
        and files in /dev/shm.
        """
        return self._front.left(grace)

    def processes(self) -> dict[int, str]:
        """Command lines of what runs here, by pid as this process numbers them."""
        return self._front.processes()

    def kill_all(self) -> None:
        """Kill all that commands have started, and let /dev/shm be as it is."""
        self._front.kill_all()

    def close(self) -> None:
        """End it with all that is in it."""
        self._front.close()

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        first = f"{small.BIN}:{Path(sys.executable).parent}"
        path = f"{first}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        own = {"PATH": path, "PYTHONUNBUFFERED": "1", "TMPDIR": "/var/tmp"}
        return {**os.environ, **own, **more}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Sandbox(_Place):
    """One node: the machine's own name and network, its own processes and shared memory.

    Args:
        shm: the size of /dev/shm, as mount(8) has it; used as it is written. Dragon needs 4.2 GiB.
        network: give it a network of its own, which has loopback only.
    """

    def __init__(self, shm: str = "8g", *, network: bool = False) -> None:
        super().__init__()
        self.launcher = ["dragon", "-s"]
        self._front = _Box(shm, network=network)


class Nodes(_Place):
    """A front end, where commands run, and nodes ``node1`` ... ``nodeN`` that ssh reaches.

    Args:
        count: how many nodes.
        shm: the size of each one's /dev/shm, as mount(8) has it; used as it is written.
    """

    def __init__(self, count: int, shm: str = "8g") -> None:
        super().__init__()
        #: names of the nodes, those that were killed too
        self.hosts = [f"node{number}" for number in range(1, count + 1)]
        self.launcher = ["dragon", "--wlm", "ssh", "--hostlist", ",".join(self.hosts), "-t", "tcp"]
        addresses = {"frontend": "10.77.0.254"}
        addresses |= {host: f"10.77.0.{number}" for number, host in enumerate(self.hosts, 1)}
        hosts = "127.0.0.1 localhost\n" + "\n".join(f"{ip} {h}" for h, ip in addresses.items())
        self._boxes: dict[str, _Box] = {}
        self._reached: list[str] = []  # "HOST=PID", for our ssh
        self._front = _Box(shm, hostname="frontend", hosts=hosts, network=True)
        try:
            # The launcher looks for the address that a default route would use.
            self._front.ip(
                "link add eth0 type bridge",
                f"addr add {addresses['frontend']}/24 dev eth0",
                "link set eth0 up",
                "route add default via 10.77.0.253",
            )
            for host in self.hosts:
                box = _Box(shm, hostname=host, network=True, inside=self._front)
                self._boxes[host] = box
                self._reached.append(f"{host}={_numbers_of(box.pid)[-2]}")
                port = f"to-{host}"
                self._front.ip(
                    f"link add {port} type veth peer name eth0 netns {box.pid}",
                    f"link set {port} master eth0 up",
                )
                box.ip(
                    f"addr add {addresses[host]}/24 dev eth0",
                    "link set eth0 up",
                    f"route add default via {addresses['frontend']}",
                )
        except BaseException:
            self.close()
            raise

    def kill(self, host: str) -> None:
        """Let a node die: all that runs on it is killed, and its network is gone."""
        self._boxes[host].kill()

    def alive(self, host: str) -> bool:
        """Whether a node is there."""
        return self._boxes[host].alive()

    def processes(self) -> dict[int, str]:
        """Command lines of what runs here, by pid as this process numbers them."""
        found = self._front.processes(self._node_keepers())
        for box in self._boxes.values():
            found |= box.processes()
        return found

    def kill_all(self) -> None:
        """Kill all that commands have started, on the front end and on every node."""
        keepers = self._node_keepers()
        self._front.kill_all(keepers)
        for box in self._boxes.values():
            if box.alive():
                box.kill_all()

    def left(self, grace: float = 5.0) -> list[str]:
        """What commands left behind on the front end and on the nodes that live, a line each."""
        found = [f"frontend: {line}" for line in self._front.left(grace, self._node_keepers())]
        for host, box in self._boxes.items():
            found += [f"{host}: {line}" for line in box.left(grace)]
        return found

    def close(self) -> None:
        """End the nodes and the front end, with all that is in them."""
        for box in self._boxes.values():
            box.close()
        super().close()

    def _node_keepers(self) -> list[int]:
        return [pid for box in self._boxes.values() for pid in box.keepers]

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        env = super()._environment(more)
        return {
            **env,
            "PATH": f"{_HERE / 'bin'}:{env['PATH']}",
            "RHAPSODY_NODES": " ".join(self._reached),
            "RHAPSODY_SENDS": " ".join(["PYTHONUNBUFFERED", "TMPDIR", "VIRTUAL_ENV", *more]),
        }


def _line_of_descent(pid: int) -> list[int]:
    """A process, its only child, the only child of that, and so on."""
    line = [pid]
    while True:
        children = Path(f"/proc/{line[-1]}/task/{line[-1]}/children").read_text().split()
        if not children:
            return line
        line.append(int(children[0]))


def _numbers_of(pid: int) -> list[int]:
    """The numbers of a process, from our PID namespace down to its own."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    raise RuntimeError("the kernel does not say NSpid")


def _ended_one(pids: Mapping[int, str], deadline: float) -> bool:
    """Wait until one of these processes has ended; False if none has by `deadline`."""
    poll = select.poll()
    with contextlib.ExitStack() as stack:
        for pid in pids:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                return True
            stack.callback(os.close, fd)
            poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _main(arguments: Sequence[str]) -> int:
    count, *command = arguments
    place = Nodes(int(count)) if int(count) else Sandbox()
    names = [name for name in os.environ if name.startswith(("PYTHON", "LD_", "RHAPSODY_TEST"))]
    env = {name: os.environ[name] for name in names}
    env["HOSTS"] = ",".join(place.hosts) if isinstance(place, Nodes) else ""
    with place:
        entry, variables = place.entry(command, env, os.getcwd())
        code = subprocess.call(entry, env=variables)
        sys.stderr.write(f"left behind: {place.left() or 'nothing'}\n")
    return code


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
