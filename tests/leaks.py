"""What a run of `.ci/run` has left behind: processes, namespaces, mounts and shared memory.

`python tests/leaks.py before FILE` takes a picture; `... after FILE` says what is left, and exits
with 1 where something is. `RHAPSODY_CI_RUN` is a word of the run's own.

A process is the run's if it, or one above it, was started with that word in its environment: what
others do meanwhile on the machine is not, nor what their shells do. A container has an environment
of its own, but the engine's process above it has not. What was started without an environment, and
lost its parent, is known by the name of the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from proc import GONE, command_line, is_warden, mapped_files, pids, program

VARIABLE = "RHAPSODY_CI_RUN"
_PREFIX = f"{VARIABLE}=".encode()
GRACE = 5.0  # seconds for what ends by itself

_SHM = Path("/dev/shm")
_NAMES = {
    "apptainer", "conmon", "containerd", "containerd-shim-runc-v2", "dask", "dask-scheduler",
    "dask-worker", "dockerd", "dragon", "lmp", "munged", "slurmctld", "slurmd", "slurmstepd",
}  # fmt: skip


@dataclass
class Picture:
    """What is there: each thing by what identifies it, with words for people."""

    processes: dict[str, str] = field(default_factory=dict)  # PID@START: the command line
    namespaces: dict[str, str] = field(default_factory=dict)  # TYPE:[INODE]: a process in it
    mounts: dict[str, str] = field(default_factory=dict)  # the place: what is mounted there
    shared_memory: dict[str, str] = field(default_factory=dict)  # INODE: the path

    def without(self, before: Picture) -> dict[str, list[str]]:
        """What is in this picture and not in an earlier one, by kind."""
        new = {
            kind: sorted(words for key, words in found.items() if key not in getattr(before, kind))
            for kind, found in asdict(self).items()
        }
        return {kind: found for kind, found in new.items() if found}


def take(run: str) -> Picture:
    """Take a picture of what is the run's, of all mounts, and of memory that no stranger uses."""
    ours = _processes_of(run)
    picture = Picture(mounts=_mounts(), shared_memory=_shared_memory(ours))
    for pid in ours:
        with contextlib.suppress(*GONE):
            words = b" ".join(command_line(pid)).decode(errors="replace")[:200]
            picture.processes[f"{pid}@{_stat(pid)[19]}"] = f"{pid} {words}"
            for entry in Path(f"/proc/{pid}/ns").iterdir():
                if not entry.name.endswith("_for_children"):
                    name = os.readlink(entry)
                    picture.namespaces.setdefault(name, f"{name} of {pid} {words}")
    for kind in os.listdir("/proc/self/ns"):  # those that everybody is in
        picture.namespaces.pop(os.readlink(f"/proc/self/ns/{kind}"), None)
    return picture


def left(before: Picture, run: str, grace: float = GRACE) -> dict[str, list[str]]:
    """What is there and was not before; processes have `grace` seconds to end by themselves."""
    deadline = time.monotonic() + grace
    while True:
        after = take(run)
        new = after.without(before)
        ending = [int(key.partition("@")[0]) for key in after.processes.keys() - before.processes]
        if not ending or not _one_ends(ending, deadline):
            return new


def _one_ends(running: Iterable[int], deadline: float) -> bool:
    """Wait until one of these processes has ended; False if none has by `deadline`."""
    poll = select.poll()
    with contextlib.ExitStack() as stack:
        for pid in running:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                return True
            stack.callback(os.close, fd)
            poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _processes_of(run: str) -> set[int]:
    """Processes of the run, but this one and those above it."""
    parents = {pid: parent for pid in pids() if (parent := _parent(pid)) is not None}
    above = [os.getpid()]
    while above[-1] in parents:
        above.append(parents[above[-1]])
    marked = {pid for pid in parents if _PREFIX + run.encode() in _environment(pid)}
    return {pid for pid in parents if pid not in above and _is_ours(pid, parents, marked)}


def _is_ours(pid: int, parents: dict[int, int], marked: set[int]) -> bool:
    while pid not in marked:
        if parents.get(pid, 0) <= 1:  # nobody's child: its own parent has ended
            named = os.path.basename(program(pid)) in _NAMES or is_warden(pid)
            return named and not any(word.startswith(_PREFIX) for word in _environment(pid))
        pid = parents[pid]
    return True


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _parent(pid: int) -> int | None:
    """The pid of a process's parent; None of one that has ended, a zombie among them."""
    with contextlib.suppress(*GONE):
        state, parent = _stat(pid)[:2]
        return None if state in "ZX" else int(parent)
    return None


def _environment(pid: int) -> list[bytes]:
    """What a process was started with; nothing of one that has ended."""
    with contextlib.suppress(*GONE):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _mounts() -> dict[str, str]:
    """The mounts that this process sees, by place."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {words[4]: f"{words[4]} {words[words.index('-') + 1]}" for words in lines}


def _shared_memory(ours: set[int]) -> dict[str, str]:
    """Files in /dev/shm, but those that processes of others map."""
    files = {}
    for path in _SHM.iterdir():
        with contextlib.suppress(FileNotFoundError):
            files[path.stat().st_ino] = str(path)
    used = {inode for pid in pids() if pid not in ours for inode in mapped_files(pid, f"{_SHM}/")}
    return {str(inode): path for inode, path in files.items() if inode not in used}


def main(when: str, file: str) -> int:
    run = os.environ[VARIABLE]
    if when == "before":
        Path(file).write_text(json.dumps(asdict(take(run))))
        return 0
    found = left(Picture(**json.loads(Path(file).read_text())), run)
    for kind, things in found.items():
        print(f"{kind.replace('_', ' ')}:", *things, sep="\n  ")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
