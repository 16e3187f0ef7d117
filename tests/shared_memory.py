"""Segments of MPICH's in /dev/shm: its programs leave theirs behind when they are killed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from processes import descendants_of

_FOLDER = Path("/dev/shm")


def mpich_segments() -> set[Path]:
    """Those of this user. Their names are random, and say nothing of who made them."""
    return {path for path in _FOLDER.glob("mpich_shm_*") if _owner(path) == os.geteuid()}


def remove_orphans(segments: set[Path]) -> None:
    """Remove segments, but none that a process maps which is not below this one.

    Another run on this machine maps its own as long as one of its ranks lives.
    """
    if not segments:
        return
    in_use = _mapped_beside({os.getpid(), *descendants_of(os.getpid())})
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            if segment.stat().st_ino not in in_use:
                segment.unlink()


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return None


def _mapped_beside(ours: set[int]) -> set[int]:
    """Inodes of the segments that other processes than these map."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in ours:
            # One that we may not look at is another user's, as its segments are.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                for line in (entry / "maps").read_text().splitlines():
                    if f"{_FOLDER}/mpich_shm_" in line:
                        found.add(int(line.split()[4]))
    return found
