"""Starts a child: its group, working directory, environment, cores, input and outputs."""

from __future__ import annotations

import errno
import os
import signal
import stat

from .messages import Run
from .output import Stream

__all__ = ["Spawner"]

# Signals that Python, or we, ignore or handle.
_RESTORED = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
_RESTORED += [signal.SIGQUIT]


class Spawner:
    """Starts children with what they have in common: environment, working directory, cores.

    The process has one thread, so that it can set its own working directory and CPU affinity and
    let the child inherit them, in place of code between fork and exec.
    """

    def __init__(self) -> None:
        self._environ: dict[bytes, bytes] = dict(os.environb)
        self._directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        self._affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self._null = os.open(os.devnull, os.O_RDONLY)

    def set_environment(self, variables: dict[str, str]) -> None:
        """Give children these variables from now on."""
        self._environ = _encoded(variables)  # now, and not again for each child

    def set_directory(self, path: str) -> None:
        """Start children in another directory from now on; in the same if we cannot go there."""
        try:
            os.chdir(path)
            directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # removed or closed to us: where we are is as good as any other place
            os.fchdir(self._directory)
            return
        os.close(self._directory)
        self._directory = directory

    def spawn(self, run: Run) -> tuple[int, list[Stream]]:
        """Start a child; returns its pid, and stdout and stderr where they do not go to files.

        Raises:
            OSError: it cannot be started.
            ValueError: an argument or a variable is of a form that no process can be given.
        """
        theirs: list[int] = []  # descriptors that are the child's alone
        streams: list[Stream] = []
        try:
            if run.stdin is None:
                stdin = self._null
            else:
                stdin = _open_input(run.stdin, run.cwd)
                theirs.append(stdin)
            actions = [(os.POSIX_SPAWN_DUP2, stdin, 0)]
            for number, path in ((1, run.stdout_path), (2, run.stderr_path)):
                if run.to_files:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                else:
                    reader, writer = os.pipe()
                    os.set_blocking(reader, False)
                    streams.append(Stream(reader, run.limit, path))
                theirs.append(writer)
                actions.append((os.POSIX_SPAWN_DUP2, writer, number))
            return self._spawn(run, actions), streams
        except (OSError, ValueError):
            for stream in streams:
                stream.close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)

    def _spawn(self, run: Run, actions: list[tuple[int, int, int]]) -> int:
        environ = self._environ
        if run.env_replace:
            environ = _encoded(run.env)
        elif run.env:
            environ = {**environ, **_encoded(run.env)}
        pinned = run.cores and self._affinity is not None
        try:
            if run.cwd is not None:
                os.chdir(run.cwd)
            program = _which(run.argv[0], environ)
            if pinned:
                os.sched_setaffinity(0, run.cores)
            return os.posix_spawn(
                program,
                run.argv,
                environ,
                file_actions=actions,
                setpgroup=0,
                setsigmask=[],
                setsigdef=_RESTORED,
            )
        finally:
            if pinned and self._affinity is not None:
                os.sched_setaffinity(0, self._affinity)
            if run.cwd is not None:
                os.fchdir(self._directory)


def _encoded(variables: dict[str, str]) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.fsencode(value) for name, value in variables.items()}


def _which(name: str, environ: dict[bytes, bytes]) -> str:
    if "/" in name:
        return name
    for folder in os.fsdecode(environ.get(b"PATH", os.fsencode(os.defpath))).split(":"):
        path = os.path.join(folder or ".", name)
        try:
            if stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.X_OK):
                return path
        except OSError:
            continue
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def _open_input(stdin: bytes | str, cwd: str | None) -> int:
    """Bytes go through an unlinked file, so that a child that never reads them blocks nobody."""
    if isinstance(stdin, str):
        # Without waiting: a named pipe that nobody writes to would keep all others waiting.
        fd = os.open(os.path.join(cwd or ".", stdin), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(fd, True)
        return fd
    import tempfile  # here: it takes a quarter of a start, and few children need it

    with tempfile.TemporaryFile() as file:
        file.write(stdin)
        file.flush()
        fd = os.dup(file.fileno())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
