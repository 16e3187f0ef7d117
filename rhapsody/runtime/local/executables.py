"""Runs executable tasks: from a task to its child process, and from the child's end to the result.

The local backend, Dask's workers and Dragon's nodes all run executables by this module. In order:
`describe` reads a task, `ExecutableRun` makes the `Launch` of its child and reads its `Ended`, and
`ExecutableRunner` starts runs one by one and lets their callers await them. The local backend
starts them in bursts, and gives its runs to `Children` itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rhapsody.runtime.arguments import command_of, shell_command
from rhapsody.runtime.errors import BackendError, TaskExecutionError
from rhapsody.runtime.machine.mpi import LOCAL_MPI, local_mpiexec, rank_command, worst_rank
from rhapsody.runtime.machine.slots import Grant
from rhapsody.runtime.task import Task

from .children import RESOURCE_ERRNOS, Children, Ended, Launch, Started

__all__ = [
    "Executable",
    "ExecutableRun",
    "ExecutableRunner",
    "Outcome",
    "describe",
    "start_error",
]

EndState = Literal["DONE", "FAILED", "CANCELED"]

_ERROR_TAIL = 4096  # bytes of a captured stderr that are read for the error


class Executable(NamedTuple):
    """An executable task as its child process needs it. It can be pickled.

    `words` are the executable and its arguments; with `shell` the first is a line for `/bin/sh`.
    `stdin` is what the child reads, or as a `str` the path of a file. With `capture` both outputs
    go to files.
    """

    uid: str
    words: Sequence[str]
    shell: bool = False
    ranks: int = 1
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    env_replace: bool = False
    stdin: bytes | str | None = None
    capture: bool = False
    cores: Sequence[int] = ()


def describe(
    task: Task, grant: Grant | None = None, *, words: Sequence[str] | None = None
) -> Executable:
    """Return what a task runs, with its parents' results in place; its own options win.

    Args:
        task: the task, as an object or as a dict.
        grant: the cores and GPUs that it holds on this machine.
        words: its command line, where the caller makes it.
    """
    options = task.get("task_backend_specific_kwargs") or {}
    need = task.get("resources")
    cwd = options.get("cwd") or (need and need.cwd)
    env = {
        **((need and need.env) or {}),
        **(grant.env if grant is not None else {}),
        **(options.get("env") or {}),
    }
    return Executable(
        task["uid"],
        command_of(task) if words is None else words,
        bool(options.get("shell")),
        1 if need is None else need.ranks,
        os.path.abspath(cwd) if cwd else None,
        env,
        bool(options.get("env_replace")),
        _stdin(options.get("stdin")),
        bool(task.get("capture_stdio")),
        () if grant is None else grant.cores,
    )


def _stdin(value: str | bytes | Path | None) -> bytes | str | None:
    if isinstance(value, Path):
        return os.fspath(value)
    return value.encode() if isinstance(value, str) else value


class Outcome(NamedTuple):
    """How an executable ended. It can be pickled.

    `stdout` and `stderr` are text; with `capture_stdio` the paths of the files. `started` and
    `ended` are seconds of `time.monotonic()` on the machine that ran it; None where it never ran.
    """

    state: EndState
    exit_code: int
    stdout: str
    stderr: str
    stdout_file: str | None = None
    stderr_file: str | None = None
    started: float | None = None
    ended: float | None = None
    error: BackendError | TaskExecutionError | None = None

    def fields(self) -> dict[str, Any]:
        """Return the result fields of the task."""
        fields: dict[str, Any] = {
            "stdout": self.stdout,
            "stderr": self.stderr,
            "exit_code": self.exit_code,
            "stdout_file": self.stdout_file,
            "stderr_file": self.stderr_file,
            "started": self.started,
            "ended": self.ended,
        }
        if self.error is not None:
            fields["exception"] = self.error
        return fields


class ExecutableRun:
    """One run of an executable: the child to start, and the outcome once it has ended.

    Args:
        executable: what to run.
        directory: where output files are written, named by the task's uid.
        scratch: where MPI ranks note their failures, if not there: a directory that no other run
            of the task uses at the same time.

    Raises:
        ResourceError: it has several ranks, and this machine has no `mpiexec`.
    """

    __slots__ = ("_executable", "_ranks_path", "launch")

    def __init__(self, executable: Executable, directory: str, scratch: str | None = None) -> None:
        uid, words, shell, ranks, cwd, env, env_replace, stdin, capture, cores = executable
        argv = shell_command(words) if shell else words
        base = os.path.join(directory, uid)
        self._executable = executable
        self._ranks_path: str | None = None
        if ranks > 1:
            path = self._ranks_path = os.path.join(scratch or directory, uid)
            worst_rank(path)  # a run that was abandoned may have left its note
            argv = rank_command(local_mpiexec(uid, ranks), ranks, argv, path)
            env = {**LOCAL_MPI, **(env or {})}
        self.launch = Launch(
            argv,
            base + ".stdout",
            base + ".stderr",
            to_files=capture,
            cwd=cwd,
            env=env,
            env_replace=env_replace,
            stdin=stdin,
            cores=cores,
        )

    def outcome(self, end: Ended, backend: str | None = None) -> Outcome:
        """Return how the task ended; `backend` is the name for an error of the infrastructure.

        Raises:
            OSError, ValueError: the note of failed ranks is unreadable.
        """
        code = end.exit_code
        if self._ranks_path is not None:
            code = worst_rank(self._ranks_path) or code
        out, err, out_file, err_file = end.stdout, end.stderr, end.stdout_file, end.stderr_file
        captured = self._executable.capture and end.refused is None and end.error is None
        if captured:
            out = out_file = self.launch.stdout_path
            err = err_file = self.launch.stderr_path
        state: EndState = "FAILED"
        error: BackendError | TaskExecutionError | None = None
        if end.error is not None:
            error = end.error
            error.backend = backend
        elif end.killed:
            state = "CANCELED"
        elif code == 0:
            state = "DONE"
        else:
            said = end.stderr or (_tail(err) if captured else "")
            error = TaskExecutionError(self._executable.uid, said, code)
            if end.refused is not None:
                error.__cause__ = OSError(end.refused, end.stderr)
        return Outcome(state, code, out, err, out_file, err_file, end.started, end.ended, error)


def start_error(error: Exception, backend: str) -> Exception:
    """Return the error of a task that could not be run: the system's as a BackendError."""
    if isinstance(error, BackendError):
        error.backend = backend
    if not isinstance(error, OSError):
        return error
    wrapped = BackendError(
        f"cannot run the task: {error}", backend=backend, transient=error.errno in RESOURCE_ERRNOS
    )
    wrapped.__cause__ = error
    return wrapped


def _tail(path: str) -> str:
    """Return the end of a file, for an error."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _ERROR_TAIL))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"({path}: {error.strerror})"


class _Waiting(NamedTuple):
    run: ExecutableRun
    outcome: asyncio.Future[Outcome]
    on_start: Callable[[], None] | None


class ExecutableRunner:
    """Runs executables as children of this process, each awaited by its caller.

    Made and used on the thread of a running event loop.

    Args:
        backend: the name of the backend, for errors.
    """

    def __init__(self, backend: str | None = None) -> None:
        self._backend = backend
        self._children = Children(self._on_children)
        self._waiting: dict[int, _Waiting] = {}

    def start(
        self, run: ExecutableRun, on_start: Callable[[], None] | None = None
    ) -> tuple[int, asyncio.Future[Outcome]]:
        """Start a run; returns its key for `kill`, and the future of its outcome.

        `on_start` is called when the child runs. To cancel the future does not stop the child.

        Raises:
            BackendError: no process can be started.
        """
        self._children.sync_environment()
        key = self._children.run(run.launch)
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[key] = _Waiting(run, outcome, on_start)
        return key, outcome

    def kill(self, key: int, grace: float) -> None:
        """Send SIGTERM to a run's process group, and SIGKILL `grace` seconds later."""
        self._children.kill(key, grace)

    async def close(self) -> None:
        """End what runs: its outcome is CANCELED."""
        await self._children.close()
        for waiting in self._waiting.values():
            if not waiting.outcome.done():
                waiting.outcome.set_result(Outcome("CANCELED", -signal.SIGKILL, "", ""))
        self._waiting.clear()

    def _on_children(self, events: list[Started | Ended]) -> None:
        for event in events:
            if isinstance(event, Started):
                if event.key in self._waiting and (tell := self._waiting[event.key].on_start):
                    tell()
            elif (waiting := self._waiting.pop(event.key, None)) is not None:
                run, outcome, _ = waiting
                if outcome.done():  # its caller has gone
                    continue
                try:
                    outcome.set_result(run.outcome(event, self._backend))
                except (OSError, ValueError) as error:
                    outcome.set_exception(error)
