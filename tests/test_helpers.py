"""What the other tests rely on: an end for whatever they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import processes
from fifos import Fifo
from processes import driver_of, gone
from shared_memory import mpich_segments, remove_orphans

HERE = Path(__file__).parent

LEAVES = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
os.kill(child.pid, 19)  # stopped, as it is found after some failures
with open(sys.argv[1], "w") as roster:
    print(child.pid, file=roster)
"""


async def test_what_holds_the_output_of_a_driver_is_killed_and_told(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ENDS", 0.5)
    with pytest.raises(AssertionError, match=r"left behind.*\d+: 'sleep 1000'"):
        async with driver_of(LEAVES, str(roster.path)):
            (pid,) = await roster.pids()
    await gone(pid)


HANGS = """
import pytest, threading

@pytest.fixture
def waits():
    yield
    threading.Event().wait()

def test_fails(waits):
    assert False
"""


def test_a_fixture_that_waits_for_ever_after_a_failure_ends_the_run(tmp_path: Path) -> None:
    conftest = (HERE / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest.replace("timeout=120.0", "timeout=0.5"))
    (tmp_path / "test_hangs.py").write_text(HANGS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_hangs.py"],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Timeout" in done.stdout + done.stderr
    assert "in waits" in done.stdout + done.stderr


# Maps a segment of shared memory, says so, and waits.
MAPS = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stranger() -> Iterator[Path]:
    """A segment of a process that is not below this one: the shell that started it has ended."""
    path = Path(f"/dev/shm/mpich_shm_stranger-{os.getpid()}")
    words = ["sh", "-c", 'exec 3<&0; "$@" <&3 &', "sh", sys.executable, "-c", MAPS, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        assert shell.stdin is not None
        pid = int(shell.stdout.readline())
        shell.wait(10)
        try:
            yield path
        finally:
            os.kill(pid, signal.SIGKILL)
            path.unlink()


def test_a_segment_that_others_use_is_left_alone(stranger: Path) -> None:
    mine = Path(f"/dev/shm/mpich_shm_mine-{os.getpid()}")
    mine.touch()
    assert {mine, stranger} <= mpich_segments()
    remove_orphans({mine, stranger})
    assert (mine.exists(), stranger.exists()) == (False, True)
