"""Supervises Dragon's launcher, so that a workflow under it ends as one under Python does.

Left alone, the launcher of dragonhpc 0.15.0 does not end when a node or the workflow dies hard;
SIGTERM to it leaves the workflow behind, which then uses a core; Ctrl-C takes the runtime away
under the workflow; and where something goes wrong on several nodes it runs `dragon-cleanup`, which
kills and removes all that the user has of Dragon, and of Python.

Two processes watch it. The one that called `supervise` has the terminal, and forwards signals. Its
child, the supervisor, starts the launcher and takes its output. Both are subreapers: what either of
them started becomes its child when its parent dies, so that whichever is killed, the other finds
all of it. The workflow's start and end are reported by files in the run's directory (see
`workflow_runner`).
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rhapsody.runtime.local import descendants
from rhapsody.runtime.local.warden.process_tree import processes

from . import workflow_runner
from .dragon.command import LauncherCommand
from .dragon.node_supervisor import HEARTBEAT, HEARTBEAT_SECONDS, MISSED_HEARTBEATS
from .dragon.output import LauncherOutput
from .dragon.pmix import with_pmix
from .dragon.shared_memory import SegmentTracker
from .run_directory import (
    Report,
    is_shim,
    make_library_folder,
    make_run_directory,
    path_with_shims,
    read_report,
)

__all__ = ["FORWARDED_SIGNALS", "LaunchSpec", "supervise"]

# The first two together are less than the 30 s that Slurm waits between SIGTERM and SIGKILL
# (KillWait).
WORKFLOW_GRACE_SECONDS = 15.0  # for the workflow to end after SIGINT
LAUNCHER_GRACE_SECONDS = 10.0  # for the launcher to end after SIGINT; Dragon itself allows 5 s
LAUNCHER_EXIT_SECONDS = 15.0  # for the launcher to end after the workflow has
NODE_EXIT_SECONDS = 4 * HEARTBEAT_SECONDS  # for the nodes to end by themselves after the run
_EOF_SECONDS = 5.0  # for the end of the launcher's output, after all processes have ended
_WRITE_BYTES = 4096  # that a pipe which is ready takes without blocking (PIPE_BUF)
_BUFFER_BYTES = 1 << 16  # of the launcher's output that wait for the reader of ours
#: signals that end the whole run
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """What is to run, and where."""

    command: LauncherCommand
    workflow: Sequence[str]  # the script and its arguments
    environ: Mapping[str, str]
    shared_dir: str | None = None  # that all nodes see; where the workflow may run on another host
    host_socket: str | None = None  # in an image: where the process on the host listens


def supervise(spec: LaunchSpec) -> int:
    """Run a workflow under Dragon, and return the exit code; nothing of it is left then.

    The workflow's own code, 128 + n where signal n ended it, and 130, 143 or 129 where SIGINT,
    SIGTERM or SIGHUP to this process did. All children of this process are taken for the run's.
    In an image (see `apptainer`) the process on the host gets the signals and sends their numbers
    by stdin; a signal to this process is a second copy and is ignored.
    """
    descendants.become_subreaper()
    segments = SegmentTracker()
    directory = make_run_directory(spec.environ, spec.shared_dir, spec.host_socket)
    if spec.host_socket is not None:
        for number in FORWARDED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        descendants.become_subreaper()  # a fork does not inherit it
        code = 1
        try:
            code = _Supervisor(spec, directory, reader, segments).run()
        except BaseException:
            traceback.print_exc()
            _end_all(spec, directory, segments)
        finally:
            os._exit(code)
    os.close(reader)
    with _signals_forwarded_to(writer):
        _, status = os.waitpid(pid, 0)
    os.close(writer)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _print_error(
            f"the supervisor was killed by {_signal_name(-code)}; what it ran is ended too"
        )
        code = 128 - code
    _end_all(spec, directory, segments)
    shutil.rmtree(directory, ignore_errors=True)
    return code


@contextlib.contextmanager
def _signals_forwarded_to(fd: int) -> Iterator[None]:
    """Write the numbers of signals that arrive to a pipe; those that are ignored stay ignored."""

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(OSError):  # the supervisor is about to end
            os.write(fd, bytes([number]))

    handled = [n for n in FORWARDED_SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in handled}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Timer:
    """A callback at a time; setting it again replaces the one before."""

    def __init__(self) -> None:
        self.when: float | None = None
        self._callback: Callable[[], None] = lambda: None

    def set(self, seconds: float, callback: Callable[[], None]) -> None:
        self.when = time.monotonic() + seconds
        self._callback = callback

    def fire_if_due(self) -> None:
        if self.when is not None and self.when <= time.monotonic():
            self.when = None
            self._callback()


class _Supervisor:
    """An event loop over the launcher's output, the workflow's report, signals and deadlines."""

    def __init__(
        self, spec: LaunchSpec, directory: str, signal_pipe: int, segments: SegmentTracker
    ) -> None:
        self.spec = spec
        self.directory = directory
        self.signal_pipe = signal_pipe
        self.segments = segments
        self.report = Report()
        self.heartbeats = 0
        self.missed = 0  # heartbeats of the workflow's runner, in a row
        self.forced_code: int | None = None  # the exit code, where it is not the workflow's
        self.workflow_ended = False
        self.launcher = 0  # its pid
        self.launcher_code: int | None = None  # once it has ended
        self.signals = 0  # from the caller
        self.killed = False
        self.deadline = _Timer()
        self.heartbeat = _Timer()
        self.output = LauncherOutput(self.is_workflow_over)
        self.buffer = bytearray()  # for our stdout
        self.discards = False  # nobody reads our stdout any more
        self.launcher_stdout: int | None = None  # until its end
        self.sigchld_pipe = _make_sigchld_pipe()
        self.poll = select.poll()
        self.callbacks: dict[int, Callable[[], None]] = {}

    def run(self) -> int:
        """Start the launcher, and return the exit code when all of it has gone."""
        self.add_reader(self.signal_pipe, lambda: self.on_signals(self.signal_pipe))
        if self.spec.host_socket is not None:
            self.add_reader(0, lambda: self.on_signals(0))
        self.add_reader(self.sigchld_pipe, self.on_child_exit)
        if self.spec.command.remote:
            self.heartbeat.set(HEARTBEAT_SECONDS, self.on_heartbeat)
        else:
            # Open for writing too, or the pipe would end with the runner.
            path = os.path.join(self.directory, workflow_runner.WAKEUP)
            self.wakeup = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            self.add_reader(self.wakeup, self.on_wakeup)
        self.start_launcher()
        while self.launcher_code is None or self.launcher_stdout is not None or self.buffer:
            self.run_once()
        return self.exit_code()

    def start_launcher(self) -> None:
        """Start the launcher in a process group of its own; in a session of its own it hangs."""
        self.launcher_stdout, writer = os.pipe()
        os.set_blocking(self.launcher_stdout, False)
        self.add_reader(self.launcher_stdout, self.on_output)
        command, environ = self.spec.command, self.spec.environ
        interval = HEARTBEAT_SECONDS if command.remote else 0
        runner = [workflow_runner.__file__, self.directory, str(interval)]
        path = path_with_shims(self.directory, environ.get("PATH", ""))
        self.launcher = os.posix_spawn(
            command.argv[0],
            [*command.argv, *runner, *self.spec.workflow],
            with_pmix({**environ, "PATH": path}, lambda: make_library_folder(self.directory)),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, writer, 1),
            ],
            setpgroup=0,
            setsigmask=[],
            setsigdef=[*FORWARDED_SIGNALS, signal.SIGQUIT, signal.SIGPIPE],
        )
        os.close(writer)

    # ------------------------------------------------------------------ the event loop

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self.callbacks[fd] = callback
        self.poll.register(fd, select.POLLIN)

    def run_once(self) -> None:
        """Wait for events or a timer, and call what they are for."""
        if self.buffer:
            self.callbacks[1] = self.write
            self.poll.register(1, select.POLLOUT)
        if self.launcher_stdout is not None:
            more = len(self.buffer) < _BUFFER_BYTES
            self.poll.register(self.launcher_stdout, select.POLLIN if more else 0)
        timers = (self.deadline, self.heartbeat)
        due = [timer.when for timer in timers if timer.when is not None]
        timeout = max(0.0, min(due) - time.monotonic()) * 1000 if due else None
        for fd, _ in self.poll.poll(timeout):
            self.callbacks[fd]()
        for timer in timers:
            timer.fire_if_due()

    def on_signals(self, fd: int) -> None:
        """Take the numbers of signals from the caller; the pipe ends when the caller does."""
        numbers = os.read(fd, 64)
        if not numbers:
            self.kill()
            shutil.rmtree(self.directory, ignore_errors=True)
            os._exit(1)  # nobody takes the exit code
        for number in numbers:
            self.on_signal(number)

    def on_child_exit(self) -> None:
        """Reap the launcher, and orphans of it that were reparented to this process."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.sigchld_pipe, 4096)
        for pid, status in descendants.reap():
            if pid == self.launcher:
                self.launcher_code = os.waitstatus_to_exitcode(status)
                self.on_launcher_exit(self.launcher_code)

    def on_launcher_exit(self, code: int) -> None:
        self.read_report()
        if code < 0 and not self.killed:
            name = _signal_name(-code)
            _print_error(f"Dragon's launcher was killed by {name}: ending what it ran")
        _end_all(self.spec, self.directory, self.segments)
        # What still holds the pipe open is not below this process, and is not waited for. Who reads
        # our output may take longer, unless the user has asked twice to end.
        impatient = self.signals > 1
        self.deadline.set(_EOF_SECONDS, self.discard_output if impatient else self.close_output)

    # ------------------------------------------------------------------ the workflow's output

    def on_output(self) -> None:
        if self.launcher_stdout is None:  # closed by an event before this one
            return
        data = os.read(self.launcher_stdout, _BUFFER_BYTES)
        if not data:
            self.close_output()
            return
        workflow, dragon = self.output.split(data)
        if not self.discards:
            self.buffer += workflow
        if dragon:
            _write_stderr(dragon)
        if self.output.code is not None:
            self.on_workflow_end()

    def close_output(self) -> None:
        if self.launcher_stdout is not None:
            if not self.discards:
                self.buffer += self.output.flush()
            self.poll.unregister(self.launcher_stdout)
            os.close(self.launcher_stdout)
            self.launcher_stdout = None

    def discard_output(self) -> None:
        self.discards = True
        self.buffer.clear()
        self.close_output()

    def write(self) -> None:
        """Write what our stdout takes now."""
        try:
            del self.buffer[: os.write(1, self.buffer[:_WRITE_BYTES])]
        except OSError:  # nobody reads it any more, and the workflow need not end for that
            self.discards = True
            self.buffer.clear()
        if not self.buffer:
            self.poll.unregister(1)

    # ------------------------------------------------------------------ the workflow's end

    def read_report(self) -> None:
        """Read the report of the workflow's runner, and notice the workflow's start and end."""
        before, self.report = self.report, read_report(self.directory) or self.report
        if self.report.host and not before.host:
            self.segments.record(descendants.pids())
        self.missed = 0 if self.report != before or not self.report.host else self.missed + 1
        if self.report.exit_code is not None:
            self.on_workflow_end()

    def on_wakeup(self) -> None:
        os.read(self.wakeup, 4096)
        self.read_report()

    def on_heartbeat(self) -> None:
        """Write a heartbeat for the nodes, and look for that of a workflow on another host."""
        self.heartbeats += 1
        with (
            contextlib.suppress(OSError),  # a full disk; the next may succeed
            open(os.path.join(self.directory, HEARTBEAT), "r+b") as file,
        ):
            file.write(b"%d" % self.heartbeats)
        self.read_report()
        if self.missed >= MISSED_HEARTBEATS and not self.workflow_ended:
            host, seconds = self.report.host, MISSED_HEARTBEATS * HEARTBEAT_SECONDS
            _print_error(f"no heartbeat of the workflow on {host} for {seconds:g} s: ending Dragon")
            self.forced_code = self.forced_code or 1
            self.workflow_ended = True
            self.interrupt_launcher()
        self.heartbeat.set(HEARTBEAT_SECONDS, self.on_heartbeat)

    def is_workflow_over(self) -> bool:
        """Whether the workflow has ended, so that a line of Dragon's that says so is Dragon's."""
        self.report = read_report(self.directory) or self.report
        if self.report.exit_code is not None or self.spec.command.remote:
            return self.report.exit_code is not None
        return self.report.runner_pid not in descendants.pids()  # it was killed

    def on_workflow_end(self) -> None:
        if not self.workflow_ended:
            self.workflow_ended = True
            self.segments.record(descendants.pids())
            if self.launcher_code is None:
                self.deadline.set(LAUNCHER_EXIT_SECONDS, self.on_launcher_hang)

    def on_launcher_hang(self) -> None:
        seconds = LAUNCHER_EXIT_SECONDS
        _print_error(f"Dragon's launcher still runs {seconds:g} s after the workflow: ending it")
        self.interrupt_launcher() if self.spec.command.remote else self.kill()

    # ------------------------------------------------------------------ stopping

    def on_signal(self, number: int) -> None:
        """Do what a signal to the caller asks for: the first to end in order, the next to kill."""
        self.signals += 1
        if self.launcher_code is not None:
            self.discard_output()
            return
        if self.signals > 1:
            self.kill()
            return
        self.read_report()
        if self.workflow_ended:  # its own exit code stands
            self.interrupt_launcher()
            return
        self.forced_code = 128 + number
        name = _signal_name(number)
        if self.interrupt_workflow():
            seconds = WORKFLOW_GRACE_SECONDS
            _print_error(f"{name}: the workflow has {seconds:g} s to end; again ends it now")
            self.deadline.set(seconds, self.interrupt_launcher)
        else:
            _print_error(f"{name}: ending Dragon; again ends it now")
            self.interrupt_launcher()

    def interrupt_workflow(self) -> bool:
        """Send the workflow SIGINT, so that it closes its sessions; returns whether it was sent.

        Not yet to the launcher, which would take the runtime away under the workflow.
        """
        if not self.report.host:
            return False
        if self.spec.command.remote:
            with open(os.path.join(self.directory, workflow_runner.STOP), "wb") as file:
                file.write(b"!")
            return True
        if self.report.workflow_pid not in descendants.pids():
            return False
        os.kill(self.report.workflow_pid, signal.SIGINT)
        return True

    def interrupt_launcher(self) -> None:
        """Make the launcher end the runtime: SIGINT to its group, which Dragon handles in order."""
        self.segments.record(descendants.pids())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launcher, signal.SIGINT)
        self.deadline.set(LAUNCHER_GRACE_SECONDS, self.kill)

    def kill(self) -> None:
        """End all of it now."""
        if self.launcher_code is None:
            self.killed = True
            _print_error("killing Dragon and the workflow")
            _end_all(self.spec, self.directory, self.segments)
            self.on_child_exit()

    def exit_code(self) -> int:
        """The exit code for the caller."""
        if self.forced_code is not None:
            return self.forced_code
        for code in (self.report.exit_code, self.output.code):
            if code is not None and code < 0:
                _print_error(f"the workflow was ended by {_signal_name(-code)}")
                return 128 - code
            if code is not None:
                return code
        assert self.launcher_code is not None
        if self.launcher_code == 0 and self.spec.command.remote:
            where = os.path.dirname(self.directory)
            _print_error(
                "the workflow's exit code is not known: it was killed, or its node does not share "
                f"{where} (set RHAPSODY_WORK_DIR to a folder that all nodes see)"
            )
            return 1
        return self.launcher_code if self.launcher_code >= 0 else 128 - self.launcher_code


def _make_sigchld_pipe() -> int:
    """Return a descriptor that is readable when a child has ended."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _end_all(spec: LaunchSpec, directory: str, segments: SegmentTracker) -> None:
    """End all that is below this process; on other nodes, have the node supervisors do it."""
    if spec.command.remote:
        segments.record(descendants.pids())
        # The launcher first: without the directory it would find the real dragon-cleanup. Then its
        # child on this host, the overlay agent, which was reparented to this process. What is left
        # are shims, and ssh or srun, which end after the node supervisors, and these end when the
        # directory has gone.
        for _ in ("launcher", "agent"):
            pids = [pid for pid in _children() if _runs_python(pid) and not is_shim(pid)]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            descendants.wait_for_end(pids, time.monotonic() + NODE_EXIT_SECONDS)
        shutil.rmtree(directory, ignore_errors=True)
        descendants.wait_for_end(descendants.pids(), time.monotonic() + NODE_EXIT_SECONDS)
    descendants.kill_all(segments.record)
    segments.unlink()


def _children() -> list[int]:
    me = os.getpid()
    return [pid for pid, process in processes().items() if process.parent == me]


def _runs_python(pid: int) -> bool:
    """Whether a process runs this interpreter, as all of Dragon does, and srun and ssh do not."""
    with contextlib.suppress(OSError):
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    return False


def _print_error(message: str) -> None:
    _write_stderr(f"rhapsody: {message}\n".encode())


def _write_stderr(data: bytes) -> None:
    with contextlib.suppress(OSError):  # a closed stderr
        os.write(2, data)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
