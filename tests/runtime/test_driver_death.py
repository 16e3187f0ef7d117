"""The driver dies, and nothing that it started stays.

Each descendant holds a FIFO open; its end of file says that the last of them has gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from fifos import Fifo
from proc import is_warden
from processes import alive, children_of, descendants_of, driver_of, gone

HEAD = """
import asyncio, os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

ROSTER = sys.argv[1]
HERE = f"exec 9>'{ROSTER}'; echo $$ >&9"

def shell(script, **fields):
    return ComputeTask(executable="/bin/sh", arguments=["-c", script], **fields)
"""

# Children, grandchildren, some that ignore SIGTERM, some in sessions of their own, some whose
# parents have ended; and behind them tasks that must never begin.
FAMILY = (
    HEAD
    + """
SCRIPTS = [
    f"{HERE}; sleep 1000; true",
    f"trap '' TERM HUP INT; {HERE}; sleep 1000 & sleep 1000; sleep 1000",
    f"{HERE}; (echo g >&9; exec sleep 1000) & wait",
    f"{HERE}; setsid sh -c 'echo s >&9; sleep 1000; true' & wait",
    f"{HERE}; (setsid sh -c 'trap \\"\\" TERM; echo d >&9; sleep 1000; true' &) ; sleep 1000; true",
]

async def main():
    backend = await ConcurrentExecutionBackend(slots=len(SCRIPTS), grace=0.1)
    async with Session(backends=[backend]) as session:
        tasks = [shell(script) for script in SCRIPTS]
        later = [shell("echo begun >> begun; exit 1") for _ in range(30)]
        futures = await session.submit_tasks([*tasks, *later])
        await session.wait_tasks(tasks)

asyncio.run(main())
"""
)
REPORTS = 5 + 3  # of FAMILY


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGHUP])
async def test_no_process_survives_its_driver(roster: Fifo, number: int) -> None:
    async with driver_of(FAMILY, str(roster.path)) as driver:
        await roster.lines(REPORTS)
        everybody = descendants_of(driver.pid)
        assert len(everybody) >= REPORTS + 1  # the warden too
        os.kill(driver.pid, number)
        assert await driver.wait() == -number
        await roster.empty()
        for pid in everybody:
            await gone(pid)
    assert not Path("begun").exists()


GUARDING = """
import asyncio, subprocess, sys
from rhapsody.runtime.local.children import Children

async def main():
    children = Children(lambda events: None)
    script = ["sh", "-c", f"read go; {sys.argv[1]}"]
    trees = [
        subprocess.Popen(script, stdin=subprocess.PIPE, start_new_session=True) for _ in range(4)
    ]
    for process in trees:
        children.guard(process.pid)
    await asyncio.sleep(0)  # the warden is told at the end of this turn
    for process in trees:
        process.stdin.write(b"go\\n")
        process.stdin.flush()
    await asyncio.to_thread(sys.stdin.buffer.read)

asyncio.run(main())
"""


async def test_nothing_survives_below_what_is_guarded(roster: Fifo) -> None:
    """Processes of the driver's own, below which others leave their groups, and fork on and on."""
    async with driver_of(GUARDING, roster.forking()) as driver:
        await roster.lines(4)
        os.kill(driver.pid, signal.SIGKILL)
        await roster.empty()


async def test_the_warden_leaves_by_itself(roster: Fifo) -> None:
    async with driver_of(FAMILY, str(roster.path)) as driver:
        await roster.lines(REPORTS)
        (warden,) = children_of(driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
        await gone(warden)
        assert roster.is_empty()  # it was the last


async def test_a_stopped_child_does_not_survive(roster: Fifo) -> None:
    program = FAMILY.replace("SCRIPTS = [", 'SCRIPTS = [f"{HERE}; sleep 1000; true"]; _ = [')
    async with driver_of(program, str(roster.path)) as driver:
        pid = int(await roster.line())
        os.killpg(pid, signal.SIGSTOP)
        os.kill(driver.pid, signal.SIGKILL)
        await roster.empty()
        await gone(pid)


async def test_a_driver_that_exits_without_a_close_leaves_nothing(roster: Fifo) -> None:
    program = FAMILY.replace(
        "await session.wait_tasks(tasks)",
        "await asyncio.to_thread(sys.stdin.buffer.read); os._exit(3)",
    )
    async with driver_of(program, str(roster.path)) as driver:
        await roster.lines(REPORTS)
        assert driver.stdin is not None
        driver.stdin.close()
        assert await driver.wait() == 3
        await roster.empty()


async def test_a_driver_whose_loop_fails_leaves_nothing(roster: Fifo) -> None:
    program = FAMILY.replace(
        "await session.wait_tasks(tasks)",
        "await asyncio.to_thread(sys.stdin.buffer.read); raise OSError('by the author')",
    )
    async with driver_of(program, str(roster.path)) as driver:
        await roster.lines(REPORTS)
        assert driver.stdin is not None
        driver.stdin.close()
        assert await driver.wait() == 1
        assert roster.is_empty()  # this one closed its session
        assert driver.stderr is not None
        assert b"by the author" in await driver.stderr.read()


FORKING = (
    HEAD
    + """
def survivor():
    # What multiprocessing does for its users: a fork that keeps all that we have open.
    if os.fork() == 0:
        with open(ROSTER, "w") as file:
            print(os.getpid(), file=file, flush=True)
            signal.pause()

async def main():
    backend = await ConcurrentExecutionBackend(slots=2)
    async with Session(backends=[backend]) as session:
        task = shell(f"{HERE}; sleep 1000; true")
        await session.submit_tasks([task])
        while task.state != "RUNNING":
            await asyncio.sleep(0.01)
        survivor()
        await session.wait_tasks([task])

asyncio.run(main())
"""
)


async def test_a_forked_process_of_the_author_does_not_hide_the_drivers_death(
    roster: Fifo,
) -> None:
    async with driver_of(FORKING, str(roster.path)) as driver:
        pids = [int(line) for line in await roster.lines(2)]
        (warden,) = [pid for pid in children_of(driver.pid) if is_warden(pid)]
        os.kill(driver.pid, signal.SIGKILL)
        try:
            await gone(warden)
            left = [pid for pid in pids if alive(pid)]
            assert len(left) == 1  # the author's own process, which is not ours to end
        finally:
            for pid in pids:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
        await roster.empty()


WORKERS = (
    HEAD
    + """
import multiprocessing

def work(path):
    import os, subprocess
    with open(path, "w") as file:
        print(os.getpid(), file=file, flush=True)
        subprocess.run(["sleep", "1000"], pass_fds=[file.fileno()])

async def main():
    pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(sys.argv[2]))
    backend = await ConcurrentExecutionBackend(pool)
    async with Session(backends=[backend]) as session:
        tasks = [ComputeTask(function=work, args=(ROSTER,)) for _ in range(2)]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)

if __name__ == "__main__":
    asyncio.run(main())
"""
)


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_workers_and_what_they_started_go_with_the_driver(
    roster: Fifo, method: str, tmp_path: Path
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(WORKERS)
    async with driver_of(script, str(roster.path), method) as driver:
        await roster.lines(2)
        os.kill(driver.pid, signal.SIGKILL)
        assert await driver.wait() == -signal.SIGKILL
        await roster.empty()


async def test_a_driver_that_dies_while_it_starts_many_leaves_nothing(roster: Fifo) -> None:
    program = (
        HEAD
        + """
async def main():
    backend = await ConcurrentExecutionBackend(slots=8)
    async with Session(backends=[backend]) as session:
        tasks = [shell(f"{HERE}; [ $$ = 0 ] || sleep 0.01; true") for _ in range(5000)]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)

asyncio.run(main())
"""
    )
    async with driver_of(program, str(roster.path)) as driver:
        await roster.lines(50)
        (warden,) = children_of(driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
        await asyncio.gather(gone(warden), driver.wait())
        assert roster.is_empty()
