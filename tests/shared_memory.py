"""Segments of MPICH's in /dev/shm: its programs leave theirs behind when they are killed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from proc import mapped_files, pids
from processes import descendants_of

_PREFIX = Path("/dev/shm/mpich_shm_")


def mpich_segments() -> set[Path]:
    """Those of this user. Their names are random, and say nothing of who made them."""
    return {
        path for path in _PREFIX.parent.glob(f"{_PREFIX.name}*") if _owner(path) == os.geteuid()
    }


def remove_orphans(segments: set[Path]) -> None:
    """Remove segments, but none that a process maps which is not below this one.

    Another run on this machine maps its own as long as one of its ranks lives.
    """
    if not segments:
        return
    ours = {os.getpid(), *descendants_of(os.getpid())}
    in_use = {n for pid in pids() if pid not in ours for n in mapped_files(pid, str(_PREFIX))}
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            if segment.stat().st_ino not in in_use:
                segment.unlink()


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return None
