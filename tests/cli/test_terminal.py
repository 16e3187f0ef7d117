"""`rhapsody run` on a terminal: its progress, and Ctrl-C."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import ESCAPE, command, terminal

# ---------------------------------------------------------------------- on a terminal


PRINTING = """
    async def main():
        async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
            tasks = [ComputeTask(executable="sleep", arguments=[str(s)]) for s in (0, 1)]
            await session.submit_tasks(tasks)
            await tasks[0]
            print("first done", flush=True)
            if (child := os.fork()) == 0:
                # In one piece: Python 3.12 warns of the fork, and may do so in between.
                sys.stdout.write("from a child\\n")
                sys.stdout.flush()
                os._exit(0)
            os.waitpid(child, 0)
            await session.wait_tasks(tasks)
            print("all done")

    asyncio.run(main())
"""


def test_on_a_terminal_a_line_shows_the_progress(script: Callable[..., Path]) -> None:
    with terminal("run", script(PRINTING)) as screen:
        assert screen.end() == 0
    assert re.search(r"concurrent .*1/2.* 1 running", screen.seen)
    for line in ("first done", "from a child", "all done", "2 DONE"):
        assert f"{line}\r\n" in screen.seen
    # The last that is drawn is wiped, and not drawn again.
    assert screen.seen.rindex(f"{ESCAPE}J") > screen.seen.rindex("running")
    assert "running" not in screen.seen.split("rhapsody: 2 tasks")[1]


def test_in_a_pipe_nothing_is_drawn(script: Callable[..., Path]) -> None:
    done = command("run", script(PRINTING), env={"TERM": "xterm"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "first done\nfrom a child\nall done\n"
    assert ESCAPE not in done.stdout + done.stderr
    assert "running" not in done.stderr


def test_a_dumb_terminal_is_not_drawn_on(script: Callable[..., Path]) -> None:
    with terminal("run", script(PRINTING), env={"TERM": "dumb"}) as screen:
        assert screen.end() == 0
    assert ESCAPE not in screen.seen


def test_unfinished_lines_and_both_streams_are_left_as_they_are(
    script: Callable[..., Path],
) -> None:
    path = script("""
        async def main():
            async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
                task = ComputeTask(executable="sleep", arguments=["1"])
                await session.submit_tasks([task])
                print("50%", end="", flush=True)
                await asyncio.sleep(0.6)
                print("...100%", file=sys.stderr)
                sys.stdout.writelines(["a\\n", "b\\n"])
                await session.wait_tasks([task])

        asyncio.run(main())
    """)
    with terminal("run", path) as screen:
        assert screen.end() == 0
    assert "50%...100%\r\n" in screen.seen
    assert "a\r\nb\r\n" in screen.seen
    assert "0/1" in screen.seen


def test_a_log_line_goes_above_the_block(script: Callable[..., Path]) -> None:
    path = script("""
        import logging

        async def main():
            async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
                task = ComputeTask(executable="sleep", arguments=["2"])
                await session.submit_tasks([task])
                await asyncio.sleep(0.6)
                logging.getLogger("rhapsody.test").warning("careful")
                await session.wait_tasks([task])

        asyncio.run(main())
    """)
    with terminal("run", path) as screen:
        assert screen.end() == 0
    before, after = screen.seen.split("careful")
    # By what every block has: the first may be drawn before the task runs.
    assert before.count("0/1") == before.count(f"{ESCAPE}J"), "the block was not wiped first"
    assert "running" in after


# ---------------------------------------------------------------------- Ctrl-C


LONG = """
    async def main():
        async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
            shell = ["-c", {shell!r}]
            task = ComputeTask(executable="sh", arguments=shell)
            await session.submit_tasks([task])
            try:
                await session.wait_tasks([task])
            finally:
                print("leaving", flush=True)

    asyncio.run(main())
"""


def opened(path: Path) -> int:
    """The pidfd of the process whose id is written to ``path`` once it runs."""
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "the task did not start"
        time.sleep(0.02)
    return os.pidfd_open(int(path.read_text()))


def is_gone(pidfd: int, seconds: float) -> bool:
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


def test_ctrl_c_closes_the_session(script: Callable[..., Path], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with terminal("run", script(LONG.format(shell=f"echo $$ > {pid}; exec sleep 600"))) as screen:
        task = opened(pid)
        screen.interrupt()
        screen.until("leaving\r\n")
        assert screen.end() == 130
    assert "1 CANCELED" in screen.seen
    assert screen.seen.endswith("rhapsody: interrupted\r\n")
    assert "Traceback" not in screen.seen
    assert is_gone(task, 0), "the session's close came back before its task was gone"


def test_a_second_ctrl_c_leaves_no_process(script: Callable[..., Path], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    deaf = f"trap '' TERM INT; echo $$ > {pid}; while :; do sleep 1; done"
    with terminal("run", script(LONG.format(shell=deaf))) as screen:
        task = opened(pid)
        screen.interrupt()
        screen.until("leaving\r\n")  # it is closing, and the task does not want to stop
        screen.interrupt()
        assert screen.end() in (130, -signal.SIGINT)
    assert is_gone(task, 10)


MAP_WORK = """
        async def main():
            async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
                await session.map(work, [600])

        asyncio.run(main())
"""


def test_threads_that_cannot_be_stopped_are_named_and_a_second_ctrl_c_ends_them(
    script: Callable[..., Path],
) -> None:
    path = script(
        """
        import time

        def work(seconds):
            print("up", flush=True)
            time.sleep(seconds)
    """
        + MAP_WORK
    )
    with terminal("run", path) as screen:
        screen.until("up")
        screen.interrupt()
        screen.until("1 of its threads still run, Ctrl-C again ends them\r\n")
        screen.interrupt()
        assert screen.end() == -signal.SIGINT


def test_a_thread_may_be_in_a_print_when_ctrl_c_comes(script: Callable[..., Path]) -> None:
    """CPython's print holds no reference to the stream, which is no more when the script ends."""
    path = script(
        """
        import time

        class Slow:
            def __str__(self):
                before = id(sys.stdout)
                os.write(1, b"up")
                while id(sys.stdout) == before:
                    time.sleep(0.01)
                return "late"

        def work(seconds):
            print(Slow())
            time.sleep(seconds)
    """
        + MAP_WORK
    )
    with terminal("run", path) as screen:
        screen.until("up")
        screen.interrupt()
        screen.until("1 of its threads still run, Ctrl-C again ends them\r\n")
        screen.until("late\r\n")  # its thread goes on beside ours
        screen.interrupt()
        assert screen.end() == -signal.SIGINT


def test_ctrl_c_in_a_script_without_a_session(script: Callable[..., Path]) -> None:
    path = script("print('up', flush=True)\nimport time\ntime.sleep(600)\n", header="")
    with terminal("run", path) as screen:
        screen.until("up")
        screen.interrupt()
        assert screen.end() == 130


@pytest.mark.parametrize("ignored", [False, True])  # SIGINT, as in a shell's background job
def test_sigterm_closes_the_session_as_ctrl_c_does(
    script: Callable[..., Path], tmp_path: Path, ignored: bool
) -> None:
    path = script("""
        async def main():
            session = Session(backends=[await ConcurrentExecutionBackend()])
            shell = "trap 'echo > ended; exit' TERM; while :; do sleep 0.1; done"
            task = ComputeTask(executable="sh", arguments=["-c", shell])
            try:
                async with session:
                    await session.submit_tasks([task])
                    print("up", flush=True)
                    await session.wait_tasks([task])
            finally:
                print(task.state, session.closed, flush=True)

        asyncio.run(main())
    """)
    process = subprocess.Popen(
        [sys.executable, "-m", "rhapsody", "run", str(path)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "CANCELED True\n"), err
    assert err.splitlines()[-1] == "rhapsody: terminated", err
