"""What /proc says of processes; the standard library alone, for programs that run before a venv."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

#: of a process that has ended, or that we may not look at
GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_line(pid: int) -> list[bytes]:
    """The words of a process's command; none of one that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    return []


def program(pid: int) -> str:
    """The program that a process runs: its path, or that of the script where it runs Python."""
    words = [os.fsdecode(word) for word in command_line(pid)]
    if words and os.path.basename(words[0]).startswith("python"):
        after = [word for word in words[1:] if not word.startswith("-") or word == "-c"]
        return after[0] if after and after[0] != "-c" else words[0]
    return words[0] if words else ""


def is_warden(pid: int) -> bool:
    return program(pid).endswith(("local/warden", "local/warden/__main__.py"))


def mapped_files(pid: int, prefix: str) -> set[int]:
    """Inodes of the files with such a path that a process maps; none of one that has ended."""
    with contextlib.suppress(*GONE):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {int(line.split()[4]) for line in lines if f" {prefix}" in line}
    return set()
