"""Executables: what they are given, what becomes of their output, and how many run at once."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import hashlib
import itertools
import json
import os
import random
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fifos import PATIENCE, Fifo
from processes import gone, most_at_once, open_session, peak_memory, run, wardens
from rhapsody.api import (
    ComputeTask,
    Resources,
    TaskExecutionError,
    TaskTimeoutError,
    TaskValidationError,
)
from rhapsody.runtime.local.children import Children, Ended, Launch

MIB = 1 << 20


def shell(script: str, *arguments: str, **fields: Any) -> ComputeTask:
    """A task that runs a script in a shell of its own, with arguments in $1, $2, ..."""
    return ComputeTask(executable="/bin/sh", arguments=["-c", script, "sh", *arguments], **fields)


def python(code: str, *arguments: str, **fields: Any) -> ComputeTask:
    return ComputeTask(
        executable=sys.executable, arguments=["-I", "-S", "-c", code, *arguments], **fields
    )


def out(task: ComputeTask) -> str:
    assert task.stdout is not None
    return task.stdout


def err(task: ComputeTask) -> str:
    assert task.stderr is not None
    return task.stderr


def options(**given: Any) -> dict[str, Any]:
    return {"task_backend_specific_kwargs": given}


# ---------------------------------------------------------------------- output


async def test_output_and_exit_code() -> None:
    task = shell("echo out; echo err >&2; exit 0")
    await run(task)
    assert (task.state, task.exit_code) == ("DONE", 0)
    assert (task.stdout, task.stderr) == ("out\n", "err\n")
    assert task.exception is None


async def test_a_failure_carries_uid_stderr_and_exit_code() -> None:
    task = shell("echo before; echo why >&2; exit 41", uid="bad")
    async with open_session() as session:
        (future,) = await session.submit_tasks([task])
        with pytest.raises(TaskExecutionError) as caught:
            await future
    assert (caught.value.uid, caught.value.stderr, caught.value.exit_code) == ("bad", "why\n", 41)
    assert task.exception is caught.value
    assert (task.state, task.exit_code, task.stdout) == ("FAILED", 41, "before\n")


async def test_a_signal_is_a_negative_exit_code() -> None:
    task = shell("kill -SEGV $$")
    await run(task)
    assert (task.state, task.exit_code) == ("FAILED", -signal.SIGSEGV)


async def test_output_that_is_no_utf8_is_decoded_with_replacement() -> None:
    task = shell(r"printf 'a\377b'; printf '\300\200' >&2")
    await run(task)
    assert (task.stdout, task.stderr) == ("a\ufffdb", "\ufffd\ufffd")


async def test_nul_bytes_and_line_ends_stay_as_they_are() -> None:
    task = shell(r"printf 'a\0b\r\nc\r'")
    await run(task)
    assert task.stdout == "a\0b\r\nc\r"


async def test_output_up_to_the_limit_is_all_in_memory() -> None:
    task = shell(f"head -c {MIB} /dev/zero | tr '\\0' x")
    await run(task)
    assert task.stdout == "x" * MIB
    assert task.stdout_file is None


async def test_200_mb_of_output_go_to_a_file_and_not_to_memory() -> None:
    size = 200 * MIB
    # A line with a number each 1024 bytes, so that a lost or doubled piece changes the file.
    task = python(
        f"import sys; w = sys.stdout.buffer.write\n"
        f"for i in range({size // 1024}): w(b'%01023d\\n' % i)",
        uid="big",
    )
    async with open_session() as session:
        Path("/proc/self/clear_refs").write_text("5")  # our peak is what we hold now
        before = peak_memory(os.getpid())
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=PATIENCE)
        grown = peak_memory(os.getpid()) - before
        warden = peak_memory(wardens()[0])
        path = Path(session.path) / "big.stdout"
    assert task.state == "DONE"
    assert task.stdout_file == str(path)
    assert path.stat().st_size == size
    expected = hashlib.sha1(usedforsecurity=False)
    for i in range(0, size // 1024, 1024):
        expected.update(b"".join(b"%01023d\n" % j for j in range(i, i + 1024)))
    found = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(MIB):
            found.update(piece)
    assert found.digest() == expected.digest()
    assert str(path) in out(task).splitlines()[0]  # says where all of it is
    assert out(task).endswith(f"{size // 1024 - 1:01023d}\n")
    assert len(out(task)) < 100_000
    assert grown < 16 * MIB
    assert warden < 40 * MIB


async def test_a_large_stderr_goes_to_a_file_and_its_end_into_the_error() -> None:
    task = shell("head -c 8000000 /dev/zero | tr '\\0' x >&2; echo last words >&2; exit 3")
    await run(task)
    assert task.state == "FAILED"
    assert task.stderr_file is not None
    assert Path(task.stderr_file).stat().st_size == 8000000 + len("last words\n")
    assert task.stdout_file is None
    assert isinstance(task.exception, TaskExecutionError)
    assert str(task.exception).endswith("last words")
    assert len(str(task.exception)) < 5000


async def test_captured_output_streams_to_files_of_the_session(roster: Fifo) -> None:
    task = shell(
        f"echo early; echo early >&2; {roster.here}; read line < ./go; echo late",
        capture_stdio=True,
        uid="streams",
    )
    os.mkfifo("go")
    async with open_session() as session:
        await session.submit_tasks([task])
        await roster.line()
        folder = Path(session.path)
        assert (folder / "streams.stdout").read_text() == "early\n"  # while it runs
        assert (folder / "streams.stderr").read_text() == "early\n"
        Path("go").write_text("on\n")
        await session.wait_tasks([task], timeout=PATIENCE)
        assert (task.stdout, task.stderr) == (
            str(folder / "streams.stdout"),
            str(folder / "streams.stderr"),
        )
    assert task.state == "DONE"
    assert Path(out(task)).read_text() == "early\nlate\n"


async def test_captured_output_of_a_failure_is_in_its_error() -> None:
    task = shell("echo the reason >&2; exit 2", capture_stdio=True)
    await run(task)
    assert isinstance(task.exception, TaskExecutionError)
    assert task.exception.exit_code == 2
    assert "the reason" in str(task.exception)
    assert Path(err(task)).read_text() == "the reason\n"


async def test_many_writers_of_both_streams_lose_nothing() -> None:
    tasks = [
        python(
            "import os\nfor i in range(2000): os.write(1 + i % 2, b'%07d\\n' % i)",
        )
        for _ in range(4)
    ]
    await run(*tasks)
    for task in tasks:
        assert [int(n) for n in out(task).split()] == list(range(0, 2000, 2))
        assert [int(n) for n in err(task).split()] == list(range(1, 2000, 2))


# ---------------------------------------------------------------------- what it is given


SHOW_ENV = "import os, json; print(json.dumps(dict(os.environ)))"


async def test_env_is_added_over_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_PARENT", "kept")
    monkeypatch.setenv("CHANGED", "by nobody")
    task = python(SHOW_ENV, **options(env={"CHANGED": "by the task", "ADDED": "a=b c"}))
    await run(task)
    seen = json.loads(out(task))
    assert seen["FROM_PARENT"] == "kept"
    assert (seen["CHANGED"], seen["ADDED"]) == ("by the task", "a=b c")
    assert os.environ["CHANGED"] == "by nobody"


async def test_env_replace_takes_the_place_of_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_PARENT", "kept")
    task = python(SHOW_ENV, **options(env={"ONLY": "this"}, env_replace=True))
    bare = python(SHOW_ENV, **options(env_replace=True))
    await run(task, bare)
    # LC_CTYPE is Python's own doing, where there is no locale.
    assert json.loads(out(task)).keys() - {"LC_CTYPE"} == {"ONLY"}
    assert json.loads(out(bare)).keys() <= {"LC_CTYPE"}


async def test_a_later_change_of_the_environment_is_seen_by_later_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ERA", "first")
    async with open_session() as session:
        first = shell("echo $ERA")
        await (await session.submit_tasks([first]))[0]
        monkeypatch.setenv("ERA", "second")
        second = shell("echo $ERA")
        await (await session.submit_tasks([second]))[0]
        monkeypatch.delenv("ERA")
        third = shell('echo "${ERA-gone}"')
        await (await session.submit_tasks([third]))[0]
    assert [out(t) for t in (first, second, third)] == ["first\n", "second\n", "gone\n"]


async def test_a_program_is_looked_up_in_the_path_of_its_own_environment(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "my-own-tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    task = ComputeTask(executable="my-own-tool", **options(env={"PATH": path}))
    without = ComputeTask(executable="my-own-tool")
    await run(task, without)
    assert (task.state, task.stdout) == ("DONE", "found\n")
    assert (without.state, without.exit_code) == ("FAILED", 127)


async def test_cwd(tmp_path: Path) -> None:
    folder = tmp_path / "some where"
    folder.mkdir()
    there, relative, here = (
        shell("pwd -P", **options(cwd=folder)),
        shell("pwd -P", **options(cwd="some where")),
        shell("pwd -P"),
    )
    await run(there, relative, here)
    assert out(there) == out(relative) == f"{folder.resolve()}\n"
    assert out(here) == f"{tmp_path.resolve()}\n"


async def test_a_program_is_found_relative_to_cwd(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    tool = tmp_path / "sub" / "tool"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    task = ComputeTask(executable="./tool", **options(cwd=tool.parent))
    await run(task)
    assert (task.state, task.stdout) == ("DONE", "found\n")


async def test_the_working_directory_of_the_driver_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    async with open_session() as session:
        first, second = shell("pwd -P"), shell("pwd -P")
        await (await session.submit_tasks([first]))[0]
        monkeypatch.chdir(tmp_path / "other")
        await (await session.submit_tasks([second]))[0]
    assert out(second) == f"{(tmp_path / 'other').resolve()}\n"


async def test_stdin_as_text_bytes_and_path(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"from a file\n")
    large = b"0123456789abcdef" * (MIB // 4)
    text = ComputeTask(executable="cat", **options(stdin="grüße\n"))
    octets = ComputeTask(executable="cat", **options(stdin=b"\x00raw\n"))
    path = ComputeTask(executable="cat", **options(stdin=tmp_path / "input"))
    relative = ComputeTask(executable="cat", **options(stdin=Path("input"), cwd=tmp_path))
    count = ComputeTask(executable="wc", arguments=["-c"], **options(stdin=large))
    none = ComputeTask(executable="cat")
    await run(text, octets, path, relative, count, none)
    assert text.stdout == "grüße\n"
    assert octets.stdout == "\0raw\n"
    assert path.stdout == relative.stdout == "from a file\n"
    assert int(out(count)) == len(large)
    assert (none.state, none.stdout) == ("DONE", "")


async def test_stdin_that_nobody_reads_blocks_nobody() -> None:
    task = ComputeTask(executable="true", **options(stdin=b"x" * (8 * MIB)))
    await run(task)
    assert task.state == "DONE"


# ---------------------------------------------------------------------- no injection

EVIL = ["; touch pwned", "$(touch pwned)", "`touch pwned`", "a b\nc", "'\"\\", "*", "-n", "", "é"]


async def test_arguments_reach_the_program_as_they_are() -> None:
    task = python("import sys, json; print(json.dumps(sys.argv[1:]))", *EVIL)
    await run(task)
    assert json.loads(out(task)) == EVIL
    assert not Path("pwned").exists()


async def test_with_a_shell_arguments_are_no_code() -> None:
    show = f"{sys.executable} -I -S -c 'import sys, json; print(json.dumps(sys.argv[1:]))'"
    task = ComputeTask(executable=show, arguments=EVIL, **options(shell=True))
    await run(task)
    assert json.loads(out(task)) == EVIL
    assert not Path("pwned").exists()


async def test_the_executable_is_code_with_a_shell_only() -> None:
    line = "echo one && echo two | tr t T"
    with_shell = ComputeTask(executable=line, **options(shell=True))
    without = ComputeTask(executable=line)
    await run(with_shell, without)
    assert with_shell.stdout == "one\nTwo\n"
    assert (without.state, without.exit_code) == ("FAILED", 127)


async def test_numbers_and_paths_as_arguments(tmp_path: Path) -> None:
    task = ComputeTask(executable="echo", arguments=[1, 2.5, tmp_path, b"raw"])
    await run(task)
    assert task.stdout == f"1 2.5 {tmp_path} raw\n"


@pytest.mark.parametrize(
    "given",
    [
        {"cwd": 3},
        {"env": ["A=1"]},
        {"env": {"A": 1}},
        {"env": {"A=B": "x"}},
        {"env": {"A": "x\0y"}},
        {"stdin": 5},
        {"shell": "yes"},
        {"env_replace": "no"},
    ],
)
async def test_bad_options_are_refused_at_submit(given: dict[str, Any]) -> None:
    (name,) = given
    bad, good = ComputeTask(executable="true", **options(**given)), ComputeTask(executable="true")
    async with open_session() as session:
        with pytest.raises(TaskValidationError, match=name):
            await session.submit_tasks([bad, good])
        await session.wait_tasks([good], timeout=PATIENCE)
    assert good.state == "DONE"


@pytest.mark.parametrize(
    "given",
    [{"cwd": 5}, {"cwd": b"x"}, {"env": "A=1"}, {"env": ["a"]}]
    + [{"env": env} for env in ({"A": 1}, {"A": Path("x")}, {1: "x"}, {"A=B": "x"}, {"A": "\0"})],
)
def test_a_bad_environment_or_folder_is_refused_by_resources(given: dict[str, Any]) -> None:
    with pytest.raises(TaskValidationError, match=next(iter(given))):
        Resources(**given)


class Word(str, enum.Enum):
    SHELL = "sh"
    NAME = "WORD"
    TEXT = "a text"
    FOLDER = "folder"


class Bytes(bytes):
    pass


async def test_a_text_of_any_class_is_its_text(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    script = 'echo "$WORD,$1,$(cat),${PWD##*/}"'
    tasks = [
        ComputeTask(
            executable=Word.SHELL,
            arguments=["-c", script, "-", Word.TEXT],
            resources=need,
            **options(stdin=Bytes(b"bytes"), **given),
        )
        for need, given in (
            (None, {"env": {Word.NAME: Word.TEXT}, "cwd": Word.FOLDER}),
            (Resources(env={Word.NAME: Word.TEXT}, cwd=Word.FOLDER), {}),
            (Resources(env={Word.NAME: Word.TEXT}, cwd=tmp_path / "folder"), {}),
        )
    ]
    await run(*tasks)
    assert [task.stdout for task in tasks] == ["a text,a text,bytes,folder\n"] * 3


async def test_a_change_of_the_environment_after_the_check_is_not_seen() -> None:
    env: dict[str, Any] = {"A": "x"}
    need = Resources(env=env)
    env["A"] = 5
    task = ComputeTask(executable="printenv", arguments=["A"], resources=need)
    await run(task)
    assert task.stdout == "x\n"


@pytest.mark.parametrize(
    "wrong", [{"argv": [5]}, {"env": {"A": 1}}, {"stdin": 5}, {"cwd": 5}, {"cores": [object()]}]
)
async def test_what_cannot_be_told_the_warden_is_the_trouble_of_one(wrong: dict[str, Any]) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    def hear(events: list[Any]) -> None:
        for event in events:
            heard.put_nowait(event)

    children = Children(hear)
    launch = Launch(["true"], "out", "err")
    first = children.run(launch)
    with pytest.raises((TypeError, ValueError)):
        children.run(dataclasses.replace(launch, **wrong))
    last = children.run(launch)
    ends = [await asyncio.wait_for(heard.get(), PATIENCE) for _ in range(4)]
    await children.close()
    assert {end.key for end in ends if isinstance(end, Ended)} == {first, last}


# ---------------------------------------------------------------------- what cannot be started


async def test_what_cannot_be_started_fails_as_a_shell_has_it(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("not a program")
    text = tmp_path / "no-format"
    text.write_text("no format that the kernel knows")
    text.chmod(0o755)
    missing = ComputeTask(executable="there-is-no-such-program")
    absolute = ComputeTask(executable="/there/is/no/such/program")
    closed = ComputeTask(executable=str(plain))
    folder = ComputeTask(executable=str(tmp_path))
    unknown = ComputeTask(executable=str(text))
    nowhere = ComputeTask(executable="true", **options(cwd=tmp_path / "missing"))
    no_input = ComputeTask(executable="cat", **options(stdin=tmp_path / "missing"))
    fine = ComputeTask(executable="true")
    tasks = [missing, absolute, closed, folder, unknown, nowhere, no_input, fine]
    await run(*tasks)
    assert [t.exit_code for t in tasks[:5]] == [127, 127, 126, 126, 126]
    assert fine.state == "DONE"
    for task in tasks[:-1]:
        assert task.state == "FAILED"
        assert isinstance(task.exception, TaskExecutionError)
        assert isinstance(task.exception.__cause__, OSError)
    assert "there-is-no-such-program" in str(missing.exception)
    assert str(tmp_path / "missing") in str(nowhere.exception)
    assert str(tmp_path / "missing") in str(no_input.exception)


async def test_what_no_system_call_takes_fails_alone() -> None:
    nul = ComputeTask(executable="echo", arguments=["a\0b"])
    lone = ComputeTask(executable="echo", arguments=["\ud800"])
    long = ComputeTask(executable="echo", arguments=["x" * (4 * MIB)])
    fine = ComputeTask(executable="echo", arguments=["fine"])
    async with open_session() as session:
        try:
            await session.submit_tasks([nul, lone, long, fine])
        except TaskValidationError:
            pass  # refused at once is as good
        await session.wait_tasks([fine], timeout=PATIENCE)
    assert fine.stdout == "fine\n"
    assert "DONE" not in (nul.state, lone.state, long.state)


# ---------------------------------------------------------------------- descendants


async def test_a_grandchild_that_holds_the_pipe_open_delays_nobody(roster: Fifo) -> None:
    task = shell(f"({roster.here}; exec sleep 1000) & read _ < ./there; echo done; exit 5")
    os.mkfifo("there")
    async with open_session() as session:
        await session.submit_tasks([task])
        grandchild = int(await roster.line())
        Path("there").write_text("yes\n")
        await session.wait_tasks([task], timeout=PATIENCE)
        assert (task.exit_code, task.stdout) == (5, "done\n")
        await roster.empty()  # without being told to: its task is over
        await gone(grandchild)


async def test_cancel_takes_the_whole_group(roster: Fifo) -> None:
    task = shell(f"{roster.here}; (echo $$ >&9; sleep 1000; true) & (sleep 1000; true); true")
    async with open_session() as session:
        await session.submit_tasks([task])
        await roster.lines(2)
        assert await session.cancel(task)
        assert roster.is_empty()  # True is not said before it is so
    assert task.state == "CANCELED"
    assert task.exit_code == -signal.SIGTERM


async def test_cancel_lets_a_program_clean_up(roster: Fifo) -> None:
    script = f"trap 'echo cleaned; exit 7' TERM; {roster.here}; while :; do sleep 1000 & wait; done"
    task = shell(script)
    async with open_session() as session:
        await session.submit_tasks([task])
        await roster.line()
        assert await session.cancel(task)
    assert (task.state, task.stdout) == ("CANCELED", "cleaned\n")


async def test_cancel_escalates_where_sigterm_is_ignored(roster: Fifo) -> None:
    task = shell(f"trap '' TERM; {roster.here}; sleep 1000 & sleep 1000; sleep 1000")
    async with open_session(grace=0.1) as session:
        await session.submit_tasks([task])
        await roster.line()
        assert await session.cancel(task)
        assert roster.is_empty()
    assert (task.state, task.exit_code) == ("CANCELED", -signal.SIGKILL)


async def test_a_grandchild_that_ignores_sigterm_goes_with_its_parent(roster: Fifo) -> None:
    script = f"(trap '' TERM; {roster.here}; exec sleep 1000) & wait"
    task = shell(script)
    async with open_session(grace=1000) as session:
        await session.submit_tasks([task])
        await roster.line()
        assert await session.cancel(task)  # at once: the child itself heard the SIGTERM
        await roster.empty()


async def test_a_stopped_process_can_be_canceled(roster: Fifo) -> None:
    task = shell(f"{roster.here}; sleep 1000; true")
    async with open_session(grace=1000) as session:
        await session.submit_tasks([task])
        pid = int(await roster.line())
        os.killpg(pid, signal.SIGSTOP)
        assert await session.cancel(task)
        await roster.empty()
        await gone(pid)


@pytest.mark.parametrize("trap", [":", "trap '' TERM"])
async def test_descendants_that_left_the_group_go_with_a_cancel(roster: Fifo, trap: str) -> None:
    away = shlex.join(["setsid", "/bin/sh", *roster.script("sleep 1000; true", before=trap)])
    task = shell(f"{trap}; {away} & {away} & wait; sleep 1000")
    async with open_session(grace=0.1) as session:
        await session.submit_tasks([task])
        pids = [int(line) for line in await roster.lines(2)]
        assert [os.getsid(pid) for pid in pids] == pids
        assert await session.cancel(task)
        await roster.empty()
        for pid in pids:
            await gone(pid)


async def test_descendants_that_left_the_group_go_with_the_session(roster: Fifo) -> None:
    # Twice removed: its parent has ended, so that it is nobody's descendant any more.
    away = shlex.join(["setsid", "/bin/sh", *roster.script("sleep 1000; true")])
    task = shell(f"({away} &) ; read _ < ./there")
    os.mkfifo("there")
    async with open_session() as session:
        await session.submit_tasks([task])
        pid = int(await roster.line())
        Path("there").write_text("yes\n")
        await session.wait_tasks([task], timeout=PATIENCE)
        assert task.state == "DONE"
    assert roster.is_empty()
    await gone(pid)


async def test_close_ends_what_runs(roster: Fifo) -> None:
    tasks = [shell(f"{roster.here}; sleep 1000 & sleep 1000; true") for _ in range(2)]
    waiting = [shell(f"{roster.here}; exit 0") for _ in range(20)]
    async with open_session() as session:
        futures = await session.submit_tasks([*tasks, *waiting])
        await roster.lines(2)
    assert all(future.done() for future in futures)
    assert {task.state for task in (*tasks, *waiting)} == {"CANCELED"}
    assert roster.is_empty()


async def test_close_escalates_too(roster: Fifo) -> None:
    task = shell(f"trap '' TERM; {roster.here}; sleep 1000; sleep 1000")
    async with open_session(grace=0.1) as session:
        await session.submit_tasks([task])
        await roster.line()
    assert task.state == "CANCELED"
    assert roster.is_empty()


# ---------------------------------------------------------------------- timeout and retries


async def test_a_timeout_takes_the_whole_group(roster: Fifo) -> None:
    task = shell(f"trap '' TERM; {roster.here}; sleep 1000 & sleep 1000; :", timeout=0.1)
    async with open_session(grace=0.1) as session:
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=PATIENCE)
        assert roster.is_empty()
    assert task.state == "FAILED"
    assert isinstance(task.exception, TaskTimeoutError)
    assert task.exception.stopped
    assert (await roster.line()).isdigit()


async def test_a_timeout_counts_from_the_start_and_not_from_the_submit() -> None:
    first = shell("read _ < ./go")
    second = shell("echo ran", timeout=1.5)  # a busy machine may take long for an echo
    os.mkfifo("go")
    async with open_session(slots=1) as session:
        await session.submit_tasks([first, second])
        await asyncio.sleep(1.7)  # longer than its timeout
        assert second.state == "SUBMITTED"
        Path("go").write_text("on\n")
        await session.wait_tasks([second], timeout=PATIENCE)
    assert (second.state, second.stdout) == ("DONE", "ran\n")


async def test_retries_run_it_again_until_it_ends_well() -> None:
    task = shell('echo x >> tries; [ "$(wc -l < tries)" = 3 ]', retries=5)
    await run(task)
    assert (task.state, task.exit_code) == ("DONE", 0)
    assert Path("tries").read_text() == "x\n" * 3


async def test_retries_come_to_an_end() -> None:
    task = shell("echo x >> tries; exit 9", retries=2)
    await run(task)
    assert (task.state, task.exit_code) == ("FAILED", 9)
    assert Path("tries").read_text() == "x\n" * 3


async def test_a_canceled_task_is_not_retried(roster: Fifo) -> None:
    task = shell(f"{roster.here}; sleep 1000; true", retries=5)
    async with open_session() as session:
        await session.submit_tasks([task])
        await roster.line()
        assert await session.cancel(task)
        assert roster.is_empty()
    assert task.state == "CANCELED"


# ---------------------------------------------------------------------- slots


@pytest.mark.parametrize("slots", [1, 2, 5])
async def test_slots_are_never_exceeded(slots: int) -> None:
    # By their own account: a line is one write to the end of the file.
    tasks = [shell("echo begin >> log; echo end >> log") for _ in range(150)]
    async with open_session(slots) as session:
        for start in range(0, 150, 50):
            await session.submit_tasks(tasks[start : start + 50])
            await tasks[start]
        await session.wait_tasks(tasks, timeout=PATIENCE)
    assert all(task.state == "DONE" for task in tasks)
    assert len(Path("log").read_text().split()) == 300
    assert most_at_once(Path("log")) <= slots


async def test_all_slots_are_used_at_once() -> None:
    # Each needs the next one to be there.
    names = ["a", "b", "c", "d"]
    for name in names:
        os.mkfifo(name)
    chain = [shell("cat a"), *(shell("cat $2 > $1", a, b) for a, b in itertools.pairwise(names))]
    chain.append(shell("echo through > $1", names[-1]))
    fillers = [shell("exit 0") for _ in range(20)]
    async with open_session(slots=5) as session:
        await session.submit_tasks([*fillers, *chain])
        await session.wait_tasks(chain, timeout=PATIENCE)
    assert chain[0].stdout == "through\n"


async def test_cancel_wherever_a_task_is(roster: Fifo) -> None:
    """Running, in line at the warden (a few per slot), in the driver's queue, and ended."""
    ended = shell("exit 0")
    running = shell(f"{roster.here}; echo running >&9; sleep 1000; true")
    others = [shell(f"echo {number} >> ran") for number in range(40)]
    in_line, in_queue = others[1], others[37]
    async with open_session(slots=1) as session:
        await session.submit_tasks([ended])
        await session.wait_tasks([ended], timeout=PATIENCE)
        await session.submit_tasks([running, *others])
        await roster.lines(2)
        assert not await session.cancel(ended)
        assert await session.cancel(in_line)
        assert await session.cancel(in_queue)
        assert running.state == "RUNNING"
        assert await session.cancel(running)
        assert not await session.cancel(running)
        await session.wait_tasks(others, timeout=PATIENCE)
    assert ended.state == "DONE"
    assert {running.state, in_line.state, in_queue.state} == {"CANCELED"}
    rest = [number for number in range(40) if number not in (1, 37)]
    assert [int(line) for line in Path("ran").read_text().split()] == rest
    assert [others[number].state for number in rest] == ["DONE"] * 38


async def test_cancels_in_the_midst_lose_no_slot() -> None:
    random.seed(3)
    tasks = [shell("echo begin >> log; echo end >> log") for _ in range(200)]
    tasks += [shell("exit 1") for _ in range(50)]
    tasks += [ComputeTask(executable="no-such-program") for _ in range(50)]
    random.shuffle(tasks)
    async with open_session(slots=3) as session:
        await session.submit_tasks(tasks)
        for at in range(0, 300, 15):
            victims = random.sample(tasks, 8)
            answers = await asyncio.gather(*map(session.cancel, victims))
            for victim, answer in zip(victims, answers, strict=True):
                assert victim.state == "CANCELED" or not answer
            await session.wait_tasks(tasks[at : at + 15], timeout=PATIENCE)
        os.mkfifo("a")
        os.mkfifo("b")
        chain = [shell("cat a"), shell("cat b > a"), shell("echo whole > b")]
        await session.submit_tasks(chain)
        await session.wait_tasks(chain, timeout=PATIENCE)  # three slots are still there
        again = [shell("echo begin >> log2; echo end >> log2") for _ in range(60)]
        await session.submit_tasks(again)
        await session.wait_tasks(again, timeout=PATIENCE)
    assert chain[0].stdout == "whole\n"
    assert {task.state for task in again} == {"DONE"}
    assert most_at_once(Path("log2")) <= 3
    for task in tasks:
        assert task.done()
