"""What `.ci/run` says of a run that left something behind, and of one that did not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import leaks
from leaks import Picture, left, take
from proc import command_line

RUN = f"test-{os.getpid()}"
# Starts "$@" in a session of its own, says its pid, and ends: nobody is above it then.
LOSE = 'setsid "$@" >/dev/null 2>&1 & echo $!'
BEFORE = (b"setsid", b"env", b"unshare")  # what becomes the program

Lose = Callable[..., int]


@pytest.fixture
def lose() -> Iterator[Lose]:
    """Start a process that loses its parent; it is killed at the end."""
    lost: list[int] = []

    def start(*words: str, run: str | None = RUN) -> int:
        env = {**os.environ, **({leaks.VARIABLE: run} if run else {})}
        line = ["sh", "-c", LOSE, "sh", *words]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=30)
        lost.append(pid := int(done.stdout))
        # No event says that it has become the program.
        while (now := command_line(pid)) and (LOSE.encode() in now or now[0] in BEFORE):
            time.sleep(0.01)
        return pid

    yield start
    for pid in lost:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_nothing_is_left_of_a_run_that_cleaned_up() -> None:
    assert "processes" not in left(take(RUN), RUN)


def test_a_process_of_the_run_is_left_whatever_it_is(lose: Lose) -> None:
    before = take(RUN)
    pid = lose("sleep", "1000")
    assert left(before, RUN, grace=0)["processes"] == [f"{pid} sleep 1000"]
    assert "processes" not in left(take(RUN), RUN, grace=0)  # it was there before


def test_what_others_started_is_not(lose: Lose) -> None:
    before = take(RUN)
    lose("sleep", "1000", run=None)
    lose("sleep", "1000", run="another")
    # A shell that looks for what is left, and one that is above a program of that name.
    lose("sh", "-c", "sleep 1000; : local/warden distributed", run=None)
    lose("python3", "-c", "import time; time.sleep(1000)", "local/warden", run=None)
    assert "processes" not in left(before, RUN, grace=0)


def test_what_ends_by_itself_is_waited_for(lose: Lose) -> None:
    before = take(RUN)
    lose("sleep", "0.5")
    assert "processes" not in left(before, RUN, grace=30)


@pytest.mark.parametrize(
    "words",
    [
        ["{folder}/local/warden"],
        [sys.executable, "-I", "-S", "{folder}/local/warden/__main__.py"],
        ["{folder}/slurmd"],
    ],
)
def test_a_program_without_an_environment_is_known_by_its_name(
    lose: Lose, tmp_path: Path, words: list[str]
) -> None:
    before = take(RUN)
    script = Path(words[-1].format(folder=tmp_path))
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!{sys.executable}\nimport signal; signal.pause()\n")
    script.chmod(0o755)
    pid = lose("env", "-i", *(word.format(folder=tmp_path) for word in words), run=None)
    (said,) = left(before, RUN, grace=0)["processes"]
    assert said.startswith(f"{pid} ")


def test_a_namespace_is_left_with_what_is_in_it(lose: Lose) -> None:
    new = ["unshare", "--user", "--map-root-user", "--net"]
    allowed = subprocess.run([*new, "true"], capture_output=True, timeout=30).returncode == 0
    before = take(RUN)
    pid = lose(*new, "sleep", "1000")
    found = left(before, RUN, grace=0).get("namespaces", [])
    there = any(line.startswith("net:[") and f"of {pid} sleep" in line for line in found)
    assert there == allowed  # a container may forbid it


def test_shared_memory_that_nobody_uses_is_left() -> None:
    before = take(RUN)
    path = Path(f"/dev/shm/{RUN}")
    path.write_bytes(b"x")
    try:
        assert str(path) in left(before, RUN)["shared_memory"]
    finally:
        path.unlink()


def test_a_mount_is_left() -> None:
    before, after = Picture(mounts={"/": "/ ext4"}), take(RUN)
    after.mounts = {**before.mounts, "/run/netns/a": "/run/netns/a nsfs"}
    assert after.without(before)["mounts"] == ["/run/netns/a nsfs"]


def test_the_command(tmp_path: Path, lose: Lose) -> None:
    env = {**os.environ, leaks.VARIABLE: RUN}

    def command(when: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, leaks.__file__, when, str(tmp_path / "picture")]
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=60)

    assert command("before").returncode == 0
    assert "processes:" not in command("after").stdout
    pid = lose("sleep", "1000")
    done = command("after")
    assert done.returncode == 1, done
    assert f"processes:\n  {pid} sleep 1000\n" in done.stdout
