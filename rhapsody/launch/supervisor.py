"""Supervises Dragon's launcher, so that a workflow under it ends as one under Python does.

Left alone, the launcher of dragonhpc 0.15.0 does not end when a node or the workflow dies hard;
SIGTERM to it leaves the workflow behind, which then takes a core; Ctrl-C takes the runtime away
under the workflow; and where something goes wrong on several nodes it runs `dragon-cleanup`, which
kills and removes all that the user has of Dragon, and of Python.

Two processes watch it. The one that called `supervise` has the terminal, and passes signals on. Its
child, the supervisor, starts the launcher and takes its output. Both are subreapers: what either of
them started comes to it when its parent dies, so that whichever is killed, the other finds all of
it. The workflow's own begin and end come by files in a folder of the run's (see `head`).
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

from . import workflow_runner as head
from .dragon import node_supervisor as keeper
from .dragon.node_supervisor import BEAT_SECONDS, LOST_BEATS
from .dragon.output import LauncherOutput
from .dragon.pmix import with_pmix
from .dragon.shared_memory import Segments
from .run_directory import Report, is_stand_in, libraries, make_folder, read_report, with_programs

__all__ = ["PASSED_ON", "Job", "supervise"]

# Together they are less than the 30 s that Slurm waits between SIGTERM and SIGKILL (KillWait).
ASKED_SECONDS = 15.0  # for the workflow to end, once it was asked to
TOLD_SECONDS = 10.0  # for the launcher to end, once it was told to; Dragon's own patience is 5 s
ENDED_SECONDS = 15.0  # for the launcher to end, after the workflow has
NODES_SECONDS = 4 * BEAT_SECONDS  # for the nodes to end by themselves when the run is over
_CLOSED_SECONDS = 5.0  # for the launcher's output to end, after all have ended
_AT_ONCE = 4096  # bytes that a pipe which is ready takes without blocking (PIPE_BUF)
_AHEAD = 1 << 16  # bytes that we take from the launcher before our own reader took them
#: signals that mean the whole run
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Job:
    """What is to run: Dragon's line without the program, and the workflow with its arguments."""

    line: Sequence[str]
    workflow: Sequence[str]
    environ: Mapping[str, str]
    several: bool = False  # nodes, so that the workflow may run on another host
    shared_dir: str | None = None  # where all nodes see it; for several nodes
    outside: str | None = None  # in an image: the socket of the process outside (see `image`)


def supervise(job: Job) -> int:
    """Run a job to its end, and return the exit code for it; nothing of it is left then.

    The workflow's own code, 128 + n where signal n ended it, and 130, 143 or 129 where SIGINT,
    SIGTERM or SIGHUP to this process did. All children of this process are taken for the job's.
    In an image the process outside gets the signals, and their numbers come by stdin; what comes
    here is the runner's copy.
    """
    descendants.adopt()
    segments = Segments()
    folder = make_folder(job.environ, job.shared_dir if job.several else None, job.outside)
    if job.outside is not None:
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        descendants.adopt()  # a fork does not inherit it
        code = 1
        try:
            code = _Supervisor(job, folder, reader, segments).run()
        except BaseException:
            traceback.print_exc()
            _end_all(job, folder, segments)
        finally:
            os._exit(code)
    os.close(reader)
    with _passed_on_to(writer):
        _, status = os.waitpid(pid, 0)
    os.close(writer)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _say(f"the supervisor was killed by {_name(-code)}, and all that it ran is ended too")
        code = 128 - code
    _end_all(job, folder, segments)
    shutil.rmtree(folder, ignore_errors=True)
    return code


@contextlib.contextmanager
def _passed_on_to(fd: int) -> Iterator[None]:
    """Write the numbers of signals that come to a pipe; those that are ignored stay so."""

    def tell(number: int, _: object) -> None:
        with contextlib.suppress(OSError):  # the supervisor is about to end
            os.write(fd, bytes([number]))

    heard = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, tell) for number in heard}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Timer:
    """A step to take at a time; setting it again forgets the step before."""

    def __init__(self) -> None:
        self.when: float | None = None
        self._step: Callable[[], None] = lambda: None

    def set(self, seconds: float, step: Callable[[], None]) -> None:
        self.when = time.monotonic() + seconds
        self._step = step

    def ring(self) -> None:
        """Take the step, if its time has come."""
        if self.when is not None and self.when <= time.monotonic():
            self.when = None
            self._step()


class _Supervisor:
    """The loop: signs of the launcher, of the workflow and of the caller, and deadlines."""

    def __init__(self, job: Job, folder: str, control: int, segments: Segments) -> None:
        self.job = job
        self.folder = folder
        self.control = control
        self.segments = segments
        self.report = Report()
        self.beats = 0
        self.missed = 0  # beats of the workflow's
        self.verdict: int | None = None  # the exit code, where it is not the workflow's
        self.head_gone = False
        self.launcher = 0
        self.status: int | None = None  # the launcher's, once it has ended
        self.requests = 0
        self.killed = False
        self.deadline = _Timer()
        self.look = _Timer()
        self.output = LauncherOutput(self.is_over)
        self.out = bytearray()  # for our stdout
        self.deaf = False  # our stdout takes nothing any more
        self.pipe: int | None = None  # the launcher's stdout, until its end
        self.children = _bell_of_children()
        self.poll = select.poll()
        self.react: dict[int, Callable[[], None]] = {}

    def run(self) -> int:
        """Start the launcher, and return the exit code when all of it has gone."""
        self.listen(self.control, lambda: self.on_control(self.control))
        if self.job.outside is not None:
            self.listen(0, lambda: self.on_control(0))
        self.listen(self.children, self.on_child)
        if self.job.several:
            self.look.set(BEAT_SECONDS, self.on_beat)
        else:
            # Open for writing too, or the head's end would be the pipe's.
            self.bell = os.open(os.path.join(self.folder, head.BELL), os.O_RDWR | os.O_NONBLOCK)
            self.listen(self.bell, self.on_bell)
        self.start()
        while self.status is None or self.pipe is not None or self.out:
            self.turn()
        return self.exit_code()

    def start(self) -> None:
        """Start the launcher in a group of its own; in a session of its own it hangs."""
        self.pipe, writer = os.pipe()
        os.set_blocking(self.pipe, False)
        self.listen(self.pipe, self.on_output)
        script, *arguments = self.job.workflow
        beat = BEAT_SECONDS if self.job.several else 0
        line = [*self.job.line, head.__file__, self.folder, str(beat), script, *arguments]
        path = with_programs(self.folder, self.job.environ.get("PATH", ""))
        self.launcher = os.posix_spawn(
            line[0],
            line,
            with_pmix({**self.job.environ, "PATH": path}, lambda: libraries(self.folder)),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, writer, 1),
            ],
            setpgroup=0,
            setsigmask=[],
            setsigdef=[*PASSED_ON, signal.SIGQUIT, signal.SIGPIPE],
        )
        os.close(writer)

    # ------------------------------------------------------------------ the loop

    def listen(self, fd: int, react: Callable[[], None]) -> None:
        self.react[fd] = react
        self.poll.register(fd, select.POLLIN)

    def turn(self) -> None:
        """Wait for something to happen, and take it up."""
        if self.out:
            self.react[1] = self.write
            self.poll.register(1, select.POLLOUT)
        if self.pipe is not None:
            self.poll.register(self.pipe, select.POLLIN if len(self.out) < _AHEAD else 0)
        due = [timer.when for timer in (self.deadline, self.look) if timer.when is not None]
        patience = max(0.0, min(due) - time.monotonic()) * 1000 if due else None
        for fd, _ in self.poll.poll(patience):
            self.react[fd]()
        for timer in (self.deadline, self.look):
            timer.ring()

    def on_control(self, fd: int) -> None:
        """Take the numbers of signals from the caller; the end of the pipe is the caller's end."""
        numbers = os.read(fd, 64)
        if not numbers:
            self.kill()
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(1)  # nobody is there to be told more
        for number in numbers:
            self.request(number)

    def on_child(self) -> None:
        """Reap: the launcher, and orphans of it that came to us."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.children, 4096)
        for pid, status in descendants.reap():
            if pid == self.launcher:
                self.status = os.waitstatus_to_exitcode(status)
                self.on_launcher_end()

    def on_launcher_end(self) -> None:
        self.take_report()
        if self.status is not None and self.status < 0 and not self.killed:
            _say(f"Dragon's launcher was killed by {_name(-self.status)}: ending what it ran")
        _end_all(self.job, self.folder, self.segments)
        # What holds the pipe open is not below us, and not ours to wait for. Who reads our output
        # may take longer, unless the user does not want to wait any more.
        impatient = self.requests > 1
        self.deadline.set(_CLOSED_SECONDS, self.give_up if impatient else self.close_pipe)

    # ------------------------------------------------------------------ the workflow's output

    def on_output(self) -> None:
        if self.pipe is None:  # closed in this same turn
            return
        data = os.read(self.pipe, _AHEAD)
        if not data:
            self.close_pipe()
            return
        ours, dragons = self.output.sort(data)
        if not self.deaf:
            self.out += ours
        if dragons:
            _write_error(dragons)
        if self.output.code is not None:
            self.on_head_end()

    def close_pipe(self) -> None:
        if self.pipe is not None:
            if not self.deaf:
                self.out += self.output.rest()
            self.poll.unregister(self.pipe)
            os.close(self.pipe)
            self.pipe = None

    def give_up(self) -> None:
        """Let the output be."""
        self.deaf = True
        self.out.clear()
        self.close_pipe()

    def write(self) -> None:
        """Write what our stdout takes now."""
        try:
            del self.out[: os.write(1, self.out[:_AT_ONCE])]
        except OSError:  # nobody reads it any more, and the workflow need not end for that
            self.deaf = True
            self.out.clear()
        if not self.out:
            self.poll.unregister(1)

    # ------------------------------------------------------------------ the workflow's end

    def take_report(self) -> None:
        """Read what the head has told, and notice its begin and its end."""
        before, self.report = self.report, read_report(self.folder) or self.report
        if self.report.host and not before.host:
            self.segments.look(descendants.pids())
        self.missed = 0 if self.report != before or not self.report.host else self.missed + 1
        if self.report.ended is not None:
            self.on_head_end()

    def on_bell(self) -> None:
        os.read(self.bell, 4096)
        self.take_report()

    def on_beat(self) -> None:
        """Give a sign of life to the nodes, and look for one of the workflow on another host."""
        self.beats += 1
        with (
            contextlib.suppress(OSError),  # a full disk; the next may go through
            open(os.path.join(self.folder, keeper.ALIVE), "r+b") as file,
        ):
            file.write(b"%d" % self.beats)
        self.take_report()
        if self.missed >= LOST_BEATS and not self.head_gone:
            host, seconds = self.report.host, LOST_BEATS * BEAT_SECONDS
            _say(f"no sign of life of the workflow on {host} for {seconds:g} s: ending Dragon")
            self.verdict = self.verdict or 1
            self.head_gone = True
            self.interrupt()
        self.look.set(BEAT_SECONDS, self.on_beat)

    def is_over(self) -> bool:
        """Whether the workflow has ended, or was killed, so that Dragon's line is Dragon's."""
        self.report = read_report(self.folder) or self.report
        if self.report.ended is not None or self.job.several:  # there Dragon has no such line
            return self.report.ended is not None
        return self.report.head not in descendants.pids()

    def on_head_end(self) -> None:
        if not self.head_gone:
            self.head_gone = True
            self.segments.look(descendants.pids())
            if self.status is None:
                self.deadline.set(ENDED_SECONDS, self.on_hang)

    def on_hang(self) -> None:
        _say(f"Dragon's launcher still runs {ENDED_SECONDS:g} s after the workflow: ending it")
        self.interrupt() if self.job.several else self.kill()

    # ------------------------------------------------------------------ stopping

    def request(self, number: int) -> None:
        """Do what a signal to the caller means: the first asks, the second does not."""
        self.requests += 1
        if self.status is not None:
            self.give_up()
            return
        if self.requests > 1:
            self.kill()
            return
        self.take_report()
        if self.head_gone:  # its own exit code stands
            self.interrupt()
            return
        self.verdict = 128 + number
        if self.ask():
            _say(f"{_name(number)}: the workflow has {ASKED_SECONDS:g} s to end; again ends it now")
            self.deadline.set(ASKED_SECONDS, self.interrupt)
        else:
            _say(f"{_name(number)}: ending Dragon; again ends it now")
            self.interrupt()

    def ask(self) -> bool:
        """Give the workflow a Ctrl-C, which lets it close its sessions; whether it could be done.

        Not the launcher yet: that would take the runtime away under it.
        """
        if not self.report.host:
            return False
        if self.job.several:
            with open(os.path.join(self.folder, head.STOP), "wb") as file:
                file.write(b"!")
            return True
        if self.report.pid not in descendants.pids():
            return False
        os.kill(self.report.pid, signal.SIGINT)
        return True

    def interrupt(self) -> None:
        """Tell the launcher to end the runtime: by SIGINT to its group, the one way it survives."""
        self.segments.look(descendants.pids())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launcher, signal.SIGINT)
        self.deadline.set(TOLD_SECONDS, self.kill)

    def kill(self) -> None:
        """End all of it, now."""
        if self.status is None:
            self.killed = True
            _say("killing Dragon and the workflow")
            _end_all(self.job, self.folder, self.segments)
            self.on_child()

    def exit_code(self) -> int:
        """The code for the caller, from what was seen."""
        if self.verdict is not None:
            return self.verdict
        for code in (self.report.ended, self.output.code):
            if code is not None and code < 0:
                _say(f"the workflow was ended by {_name(-code)}")
                return 128 - code
            if code is not None:
                return code
        assert self.status is not None
        if self.status == 0 and self.job.several:
            where = os.path.dirname(self.folder)
            _say(
                "the workflow's exit code is not known: it was killed, or its node does not share "
                f"{where} (set RHAPSODY_WORK_DIR to a folder that all nodes see)"
            )
            return 1
        return self.status if self.status >= 0 else 128 - self.status


def _bell_of_children() -> int:
    """Return a descriptor that can be read when a child has ended."""
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    os.set_blocking(theirs, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    return ours


def _end_all(job: Job, folder: str, segments: Segments) -> None:
    """End all that is below this process; on several nodes also what is not, by their keepers."""
    if job.several:
        segments.look(descendants.pids())
        # The launcher first: without the folder it would find the real dragon-cleanup. Then what it
        # had here, its overlay agent, comes to us. What is left carries its programs to the nodes,
        # or is one of their keepers, which end what they keep when the folder has gone.
        for _ in ("launcher", "agent"):
            here = [pid for pid in _children() if _runs_python(pid) and not is_stand_in(pid)]
            for pid in here:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            descendants.wait_for_end(here, time.monotonic() + NODES_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)
        descendants.wait_for_end(descendants.pids(), time.monotonic() + NODES_SECONDS)
    descendants.end_all(segments)


def _children() -> list[int]:
    me = os.getpid()
    return [pid for pid, process in processes().items() if process.parent == me]


def _runs_python(pid: int) -> bool:
    """Whether a process runs this interpreter, as all of Dragon does, and srun and ssh do not."""
    with contextlib.suppress(OSError):
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    return False


def _say(text: str) -> None:
    _write_error(f"rhapsody: {text}\n".encode())


def _write_error(data: bytes) -> None:
    with contextlib.suppress(OSError):  # a closed stderr
        os.write(2, data)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
