"""When the machine fails the warden, and what is left behind it: nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fifos import PATIENCE, Fifo
from processes import alive, children_of, gone, open_session, wardens
from rhapsody.api import BackendError, ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend


def shell(script: str, **fields: Any) -> ComputeTask:
    return ComputeTask(executable="/bin/sh", arguments=["-c", script], **fields)


def drive(program: str, *before: str) -> subprocess.CompletedProcess[str]:
    """Run a program with helpers of this folder in a process of its own."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [*before, sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


# ---------------------------------------------------------------------- the warden is lost


async def test_a_killed_warden_takes_its_children_along_and_has_a_successor(
    roster: Fifo,
) -> None:
    script = f"trap '' TERM; {roster.here}; (trap '' TERM; exec sleep 1000) & sleep 1000; :"
    away = f"setsid sh -c '{roster.here.replace(chr(39), '')}; sleep 1000; true' & wait"
    running = [shell(script), shell(away)]
    waiting = [shell("exit 0") for _ in range(60)]
    async with open_session(slots=2) as session:
        await session.submit_tasks([*running, *waiting])
        await roster.lines(2)
        (warden,) = wardens()
        os.kill(warden, signal.SIGKILL)
        await session.wait_tasks(running, timeout=PATIENCE)
        await roster.empty()
        for task in running:
            assert task.state == "FAILED"
            assert isinstance(task.exception, BackendError)
            assert task.exception.transient
            assert task.exception.backend == "concurrent"
            assert task.exception.host
            assert "exit code -9" in str(task.exception)
        await session.wait_tasks(waiting, timeout=PATIENCE)
        # Those in line at the warden run under the next, like the driver's own.
        assert {task.state for task in waiting} == {"DONE"}
        after = shell("echo after")
        await (await session.submit_tasks([after]))[0]
        assert after.stdout == "after\n"
        assert wardens() != [warden]
    assert wardens() == []


async def test_what_forks_while_a_killed_warden_is_cleaned_up_after_leaves_nothing(
    roster: Fifo,
) -> None:
    async with open_session(slots=2) as session:
        for _ in range(5):
            tasks = [shell(roster.forking()) for _ in range(2)]
            await session.submit_tasks(tasks)
            await roster.lines(2)
            os.kill(wardens()[0], signal.SIGKILL)
            await session.wait_tasks(tasks, timeout=PATIENCE)
            await roster.empty()


async def test_what_waits_at_a_killed_warden_is_started_by_the_next(roster: Fifo) -> None:
    running = [shell(f"{roster.here}; sleep 1000; true") for _ in range(2)]
    waiting = [shell(f"echo {n} >> began") for n in range(2)]
    async with open_session(slots=2) as session:
        await session.submit_tasks([*running, *waiting])
        await roster.lines(2)
        os.kill(wardens()[0], signal.SIGKILL)
        await session.wait_tasks([*running, *waiting], timeout=PATIENCE)
        await roster.empty()
    assert [task.state for task in (*running, *waiting)] == ["FAILED"] * 2 + ["DONE"] * 2
    assert sorted(Path("began").read_text().split()) == ["0", "1"]


async def test_nothing_runs_twice_however_often_the_warden_is_killed() -> None:
    tasks = [shell(f"echo {n} >> began") for n in range(300)]
    async with open_session(slots=2) as session:
        await session.submit_tasks(tasks)
        for done in range(20, 300, 20):
            await tasks_done(session, tasks, done)
            for warden in wardens():
                os.kill(warden, signal.SIGKILL)
        await session.wait_tasks(tasks, timeout=PATIENCE)
    began = Counter(map(int, Path("began").read_text().split()))
    assert set(began.values()) == {1}
    lost = [n for n, task in enumerate(tasks) if task.state == "FAILED"]
    assert len(lost) <= 14 * 6  # those that ran, and those whose starts were not heard of
    assert {task.state for n, task in enumerate(tasks) if n not in lost} == {"DONE"}
    assert all(began[n] for n in range(300) if n not in lost)


async def tasks_done(session: Session, tasks: list[ComputeTask], count: int) -> None:
    """Wait until so many have ended."""
    ended = 0
    async for _ in session.as_completed(tasks):
        ended += 1
        if ended >= count:
            return


async def test_what_waits_at_a_killed_warden_can_be_canceled(roster: Fifo) -> None:
    running = [shell(f"{roster.here}; sleep 1000; true") for _ in range(2)]
    waiting = [shell("touch began") for _ in range(2)]
    async with open_session(slots=2) as session:
        await session.submit_tasks([*running, *waiting])
        await roster.lines(2)
        os.kill(wardens()[0], signal.SIGKILL)  # nobody has heard of it yet
        assert await asyncio.gather(*map(session.cancel, waiting)) == [True, True]
        await session.wait_tasks(running, timeout=PATIENCE)
    assert [task.state for task in waiting] == ["CANCELED"] * 2
    assert not Path("began").exists()


async def test_a_warden_that_starts_nothing_is_not_tried_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    python = sys.executable
    tasks = [shell("exit 0") for _ in range(4)]
    async with open_session() as session:
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=PATIENCE)
        for task in tasks:
            assert isinstance(task.exception, BackendError)
            assert "exit code 1" in str(task.exception)
        monkeypatch.setattr(sys, "executable", python)
        after = shell("exit 0")
        await session.submit_tasks([after])
        await after


async def test_no_other_warden_for_what_waited_is_the_end_of_that_only(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    running = [shell(f"{roster.here}; sleep 1000; true") for _ in range(2)]
    waiting = [shell("exit 0") for _ in range(2)]
    async with open_session(slots=2) as session:
        await session.submit_tasks([*running, *waiting])
        await roster.lines(2)
        monkeypatch.setattr(sys, "executable", "/there/is/none")
        os.kill(wardens()[0], signal.SIGKILL)
        await session.wait_tasks([*running, *waiting], timeout=PATIENCE)
        assert all(isinstance(task.exception, BackendError) for task in (*running, *waiting))
        assert "cannot start processes" in str(waiting[0].exception)
        monkeypatch.setattr(sys, "executable", python)
        after = shell("exit 0")
        await session.submit_tasks([after])
        await after


async def test_a_retry_rides_out_the_loss_of_a_warden(roster: Fifo) -> None:
    task = shell(
        f"echo x >> tries; [ $(wc -l < tries) = 2 ] || {{ {roster.here}; sleep 1000; }}", retries=1
    )
    async with open_session() as session:
        await session.submit_tasks([task])
        await roster.line()
        os.kill(wardens()[0], signal.SIGKILL)
        await session.wait_tasks([task], timeout=PATIENCE)
        await roster.empty()
    assert task.state == "DONE"
    assert Path("tries").read_text() == "x\n" * 2


async def test_a_child_that_has_just_started_goes_with_a_killed_warden(roster: Fifo) -> None:
    """Its start is told up to 2 ms later, so that the driver may not know of it."""
    for _ in range(10):
        task = shell(f"{roster.here}; sleep 1000; true")
        async with open_session() as session:
            primer = shell("exit 0")
            await session.submit_tasks([primer])
            await session.wait_tasks([primer], timeout=PATIENCE)
            await session.submit_tasks([task])
            (warden,) = wardens()
            while not children_of(warden) and not task.done():
                await asyncio.sleep(0)
            os.kill(warden, signal.SIGKILL)
            await session.wait_tasks([task], timeout=PATIENCE)
            assert task.state == "FAILED"
            await roster.empty()


async def test_the_warden_ignores_the_signals_of_a_terminal(roster: Fifo) -> None:
    task = shell(f"{roster.here}; read _ < ./go; echo done")
    os.mkfifo("go")
    async with open_session() as session:
        await session.submit_tasks([task])
        await roster.line()
        (warden,) = wardens()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            os.kill(warden, number)
        Path("go").write_text("on\n")
        await session.wait_tasks([task], timeout=PATIENCE)
        assert wardens() == [warden]
    assert task.stdout == "done\n"


# ---------------------------------------------------------------------- nothing is left behind


async def test_after_close_nothing_is_left() -> None:
    async def once() -> None:
        async with open_session() as session:
            tasks = [shell("echo x; echo y >&2") for _ in range(20)]
            tasks += [shell("sleep 1000"), shell("setsid sleep 1000 & wait")]
            tasks += [ComputeTask(executable="no-such-program"), shell("cat", capture_stdio=True)]
            function = ComputeTask(function=os.getpid)
            await session.submit_tasks([*tasks, function])
            await session.wait_tasks([*tasks[:20], function], timeout=PATIENCE)

    await once()  # what is made once per process is not ours
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    children = set(children_of(os.getpid()))  # Python's own fork server, of other tests
    for _ in range(3):
        await once()
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
    assert set(children_of(os.getpid())) == children
    assert threading.active_count() <= threads


async def test_a_child_that_ends_while_the_backend_stops_keeps_nothing(
    roster: Fifo, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(ConcurrentExecutionBackend):
        async def _stop_process(self, key: int) -> bool:  # as a loop with much to do has it
            Path("go").write_text("on\n")
            while key in self._running:
                await asyncio.sleep(0)
            return await super()._stop_process(key)

    os.mkfifo("go")
    task = shell(f"{roster.here}; read _ < ./go")
    async with Session(backends=[await Slow()]) as session:
        await session.submit_tasks([task])
        await roster.line()
    assert (task.state, wardens(), caplog.text.count("cleanly")) == ("DONE", [], 0)


async def test_a_warden_keeps_no_descriptors_of_the_ended(roster: Fifo) -> None:
    async with open_session() as session:
        first = shell("exit 0")
        await session.submit_tasks([first])
        await session.wait_tasks([first], timeout=PATIENCE)
        (warden,) = wardens()
        before = sorted(os.listdir(f"/proc/{warden}/fd"))
        tasks = [shell("echo x; echo y >&2") for _ in range(30)]
        tasks += [shell("head -c 2000000 /dev/zero") for _ in range(5)]
        tasks += [ComputeTask(executable="no-such-program") for _ in range(10)]
        tasks += [ComputeTask(executable="cat", task_backend_specific_kwargs={"stdin": "x"})]
        tasks += [shell("echo x", capture_stdio=True) for _ in range(10)]
        stopped = [shell(f"{roster.here}; setsid sleep 1000 & wait") for _ in range(2)]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=PATIENCE)
        await session.submit_tasks(stopped)
        await roster.lines(2)
        assert all(await asyncio.gather(*map(session.cancel, stopped)))
        assert sorted(os.listdir(f"/proc/{warden}/fd")) == before
        assert children_of(warden) == []


async def test_a_backend_without_executables_has_no_warden() -> None:
    async with open_session() as session:
        await session.map(abs, [-1, -2])
        assert wardens() == []


async def test_children_inherit_no_descriptors_and_no_ignored_signals() -> None:
    code = "ls /proc/self/fd | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status"
    keep = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(keep, True)
    old = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        async with open_session() as session:
            task = shell(code)
            await (await session.submit_tasks([task]))[0]
    finally:
        os.close(keep)
        signal.signal(signal.SIGUSR1, old)
    assert task.stdout is not None
    count, blocked, ignored = task.stdout.splitlines()
    assert int(count) == 4  # the three, and the folder that ls reads
    assert int(blocked.split()[1], 16) == 0
    assert not int(ignored.split()[1], 16) & (1 << (signal.SIGPIPE - 1))
    assert not int(ignored.split()[1], 16) & (1 << (signal.SIGTERM - 1))
    assert not int(ignored.split()[1], 16) & (1 << (signal.SIGINT - 1))


async def test_two_backends_have_a_warden_each(roster: Fifo) -> None:
    a = await ConcurrentExecutionBackend(name="a", slots=1)
    b = await ConcurrentExecutionBackend(name="b", slots=1)
    async with Session(backends=[a, b]) as session:
        tasks = [
            shell(f"{roster.here}; read _ < ./{name}; exit 0", backend=name) for name in ("a", "b")
        ]
        os.mkfifo("a")
        os.mkfifo("b")
        futures = await session.submit_tasks(tasks)
        pids = [int(line) for line in await roster.lines(2)]
        both = wardens()
        assert len(both) == 2
        owners = {child: warden for warden in both for child in children_of(warden)}
        assert len({owners[pid] for pid in pids}) == 2
        # The loss of one is no matter to the other.
        os.kill(owners[pids[0]], signal.SIGKILL)
        await gone(pids[0])
        assert alive(pids[1])
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
        (lost,) = [task for task in tasks if task.done()]
        (kept,) = [task for task in tasks if not task.done()]
        Path(str(kept.backend)).write_text("on\n")
        await session.wait_tasks(tasks, timeout=PATIENCE)
        assert (lost.state, kept.state) == ("FAILED", "DONE")


# ---------------------------------------------------------------------- the machine is short of

TOO_MANY_FILES = """
import asyncio, os, resource
from collections import Counter
from fifos import PATIENCE
from rhapsody.api import BackendError, ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

def shell(script):
    return ComputeTask(executable="/bin/sh", arguments=["-c", script])

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    os.mkfifo("go")
    go = os.open("go", os.O_RDWR)
    backend = await ConcurrentExecutionBackend(slots=60)
    async with Session(backends=[backend]) as session:
        news = asyncio.Queue()
        backend.register_callback(lambda task, state: news.put_nowait((task, state)))
        tasks = [shell("read _ < go") for _ in range(60)]
        await session.submit_tasks(tasks)
        for _ in tasks:
            task, state = await asyncio.wait_for(news.get(), PATIENCE)
            assert state in ("RUNNING", "FAILED"), (task, state)
        states = Counter(task.state for task in tasks)
        assert 8 < states["RUNNING"] < 20, states
        for task in tasks:
            if task.state == "FAILED":
                assert isinstance(task.exception, BackendError), repr(task.exception)
                assert task.exception.transient and task.exception.backend == "concurrent"
                assert "open files" in str(task.exception), task.exception
        again = shell("echo again")
        await session.submit_tasks([again])
        await session.wait_tasks([again], timeout=PATIENCE)
        assert again.state == "FAILED" and isinstance(again.exception, BackendError)
        os.write(go, b"\\n" * 60)
        await session.wait_tasks(tasks, timeout=PATIENCE)
        assert Counter(task.state for task in tasks)["DONE"] == states["RUNNING"]
        more = [shell("echo more") for _ in range(8)]
        await session.submit_tasks(more)
        await session.wait_tasks(more, timeout=PATIENCE)
        assert [task.stdout for task in more] == ["more\\n"] * 8, [t.exception for t in more]

asyncio.run(main())
print("well")
"""


def test_descriptors_that_run_out_fail_tasks_and_come_back() -> None:
    found = drive(TOO_MANY_FILES)
    assert (found.stdout, found.stderr, found.returncode) == ("well\n", "", 0)


NO_FILES_FOR_THE_DRIVER = """
import asyncio, os, resource
from fifos import PATIENCE
from processes import open_session
from rhapsody.api import BackendError, ComputeTask

async def attempt(session):
    task = ComputeTask(executable="echo", arguments=["well"])
    await session.submit_tasks([task])
    await session.wait_tasks([task], timeout=PATIENCE)
    return task

def fill():
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return taken

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    async with open_session() as session:
        for left in range(8):  # a different step of the way to the first process fails
            taken = fill()
            for fd in taken[:left]:
                os.close(fd)
            task = await attempt(session)
            if left < 2:
                assert task.state == "FAILED", left
            if task.state == "FAILED":
                assert isinstance(task.exception, BackendError), repr(task.exception)
                assert task.exception.transient
            for fd in taken[left:]:
                os.close(fd)
        task = await attempt(session)
        assert task.stdout == "well\\n", task.exception
        taken = fill()
        task = await attempt(session)  # the warden is there, and has its own
        assert task.stdout == "well\\n", task.exception
        for fd in taken:
            os.close(fd)

asyncio.run(main())
print("well")
"""


def test_a_driver_without_descriptors_gets_its_children_later() -> None:
    found = drive(NO_FILES_FOR_THE_DRIVER)
    assert (found.stdout, found.stderr, found.returncode) == ("well\n", "", 0)


FULL_DISK = """
import asyncio, os, sys
from pathlib import Path
from fifos import PATIENCE
from processes import open_session
from rhapsody.api import BackendError, ComputeTask, RhapsodyError

def shell(script, **fields):
    return ComputeTask(executable="/bin/sh", arguments=["-c", script], **fields)

async def main():
    async with open_session() as session:
        spills = shell("head -c 9000000 /dev/zero; echo to the end >&2")
        await session.submit_tasks([spills])
        await session.wait_tasks([spills], timeout=PATIENCE)
        assert spills.state == "FAILED"
        assert isinstance(spills.exception, BackendError), repr(spills.exception)
        assert "output was lost" in str(spills.exception), spills.exception
        assert spills.exit_code == 0 and spills.stderr == "to the end\\n"
        small = shell("echo small")
        await session.submit_tasks([small])
        await session.wait_tasks([small], timeout=PATIENCE)
        assert small.stdout == "small\\n"
        captured = shell("head -c 9000000 /dev/zero", capture_stdio=True)
        await session.submit_tasks([captured])
        await session.wait_tasks([captured], timeout=PATIENCE)
        assert captured.state == "FAILED"
        assert isinstance(captured.exception, RhapsodyError), repr(captured.exception)
        for path in Path(session.path).iterdir():
            path.unlink()
        large = shell("head -c 1500000 /dev/zero")
        await session.submit_tasks([large])
        await session.wait_tasks([large], timeout=PATIENCE)
        assert large.state == "DONE", large.exception
        assert Path(large.stdout_file).stat().st_size == 1500000

asyncio.run(main())
print("well")
"""


def full_disk(folder: Path) -> list[str]:
    """A command that runs another where there is a disk of 4 MiB.

    Where the machine lets nobody mount one, files of at most 4 MiB: the same failure of a write,
    with another number.
    """
    mount = f"mount -t tmpfs -o size=4m tmpfs '{folder}' && cd '{folder}'"
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        command = [*unshare, "/bin/sh", "-c", f'{mount} && exec "$@"', "sh"]
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return ["/bin/sh", "-c", 'ulimit -f 8192; exec "$@"', "sh"]


def test_a_full_disk_fails_the_task_and_not_the_next(tmp_path: Path) -> None:
    found = drive(FULL_DISK, *full_disk(tmp_path))
    assert (found.stdout, found.stderr, found.returncode) == ("well\n", "", 0)
