"""The end of the driver, of the session and of the script: nothing of the workers stays."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from fifos import PATIENCE, Fifo, report
from pools import CONTEXTS, QUICK, process_pool
from processes import driver_of, gone
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

Driver = AbstractAsyncContextManager[asyncio.subprocess.Process]

BUSY = """
import asyncio, multiprocessing, os, signal, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

context, line, then = sys.argv[1:]

def busy(line):
    child = subprocess.Popen(["sleep", "1000"])
    apart = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with open(line, "w") as file:
        file.write(f"{os.getpid()} {child.pid} {apart.pid}\\n")
    child.wait()

async def start():
    pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(context))
    session = Session([await ConcurrentExecutionBackend(pool)])
    tasks = [ComputeTask(function=busy, args=(line,)) for _ in range(4)]
    await session.submit_tasks(tasks)
    return session, tasks

async def main():
    session, tasks = await start()
    if then == "wait":
        async with session:
            await session.wait_tasks(tasks)
    else:
        while session.get_statistics()["counts"]["RUNNING"] < 2:
            await asyncio.sleep(0)
        sys.stdin.read()
        if then == "raise":
            raise LookupError("a bug of the workflow")

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture
def busy_driver(tmp_path: Path, roster: Fifo) -> Callable[[str, str], Driver]:
    """Run the script in a process group of its own, with a context and what it does then."""
    script = tmp_path / "script.py"
    script.write_text(BUSY)

    def start(context: str, then: str) -> Driver:
        words = (context, str(roster.path), then)
        return driver_of(script, *words, warnings="ignore", start_new_session=True)

    return start


async def end_of(driver: asyncio.subprocess.Process) -> str:
    """What it said, once it has ended by itself."""
    _, said = await asyncio.wait_for(driver.communicate(b"go"), PATIENCE)
    return said.decode()


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
async def test_a_driver_killed_with_busy_workers_leaves_nothing(
    context: str, roster: Fifo, busy_driver: Callable[[str, str], Driver]
) -> None:
    async with busy_driver(context, "wait") as process:
        pids = await roster.pids(2)
        process.kill()
        for pid in pids:
            await gone(pid)
        await gone(process.pid)


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("then", ["return", "raise"])
async def test_a_session_that_was_never_closed_does_not_keep_the_script_from_its_end(
    context: str, then: str, roster: Fifo, busy_driver: Callable[[str, str], Driver]
) -> None:
    async with busy_driver(context, then) as process:
        pids = await roster.pids(2)
        said = await end_of(process)
        for pid in pids:
            await gone(pid)
        assert process.returncode == (then == "raise"), said
        assert ("LookupError" in said) == (then == "raise")


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
async def test_ctrl_c_ends_the_script_and_its_busy_workers(
    context: str, roster: Fifo, busy_driver: Callable[[str, str], Driver]
) -> None:
    async with busy_driver(context, "wait") as process:
        pids = await roster.pids(2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all of the group
        said = await end_of(process)
        for pid in pids:
            await gone(pid)
        assert process.returncode != 0
        assert said.rstrip().endswith("KeyboardInterrupt")


OWN_CLASSES = """
import asyncio, multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

class Point:
    def __init__(self, x): self.x = x
    def moved(self, by): return Point(self.x + by)

class Wrong(Exception):
    def __init__(self, point, *, why):
        super().__init__(why)
        self.point = point

def move(point, by):
    assert isinstance(point, Point)
    return point.moved(by)

def fail(point):
    raise Wrong(point, why="as told")

async def main():
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(sys.argv[1]))
    async with Session([await ConcurrentExecutionBackend(pool)]) as session:
        moves = ComputeTask(function=move, args=(Point(3), 4))
        again = ComputeTask(function=move, args=(moves, 1))
        fails = ComputeTask(function=fail, args=(Point(5),))
        await session.submit_tasks([moves, again, fails])
        await session.wait_tasks([moves, again, fails])
    assert isinstance(moves.return_value, Point), moves.exception
    assert again.return_value.x == 8
    assert isinstance(fails.exception, Wrong), fails.exception
    assert fails.exception.point.x == 5 and str(fails.exception) == "as told"
    print("all is well")

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_classes_of_a_script_cross_both_ways(context: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(OWN_CLASSES)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), context],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.stderr) == ("all is well\n", "")


# ---------------------------------------------------------------------- close


def busy(line: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    apart = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    report(line, os.getpid(), child.pid, apart.pid)
    child.wait()


@pytest.mark.parametrize("context", CONTEXTS)
async def test_close_ends_busy_workers_and_settles_what_waits(context: str, roster: Fifo) -> None:
    session = Session([await process_pool(2, context)])
    tasks = [ComputeTask(function=busy, args=(roster.path,)) for _ in range(2)]
    waiting = [ComputeTask(function=os.getpid) for _ in range(50)]
    futures = await session.submit_tasks([*tasks, *waiting])
    pids = await roster.pids(2)
    await asyncio.wait_for(session.close(), PATIENCE)
    for pid in pids:
        await gone(pid)
    assert all(future.done() for future in futures)
    assert {task.state for task in [*tasks, *waiting]} == {"CANCELED"}


def in_use(pools: list[weakref.ref[ProcessPoolExecutor]]) -> tuple[int, int]:
    """Threads and descriptors, when these pools, which are the user's and have pipes, have gone."""
    deadline = time.monotonic() + PATIENCE
    while gc.collect() or any(pool() is not None for pool in pools):
        assert time.monotonic() < deadline, "a pool is still there"
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("context", CONTEXTS)
def test_no_process_no_thread_and_no_descriptor_is_left(context: str) -> None:
    pids: set[int] = set()
    pools: list[weakref.ref[ProcessPoolExecutor]] = []

    async def use() -> None:
        pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(context))
        pools.append(weakref.ref(pool))
        async with Session([await ConcurrentExecutionBackend(pool)]) as session:
            tasks = [ComputeTask(function=os.getpid) for _ in range(50)]
            await session.submit_tasks(tasks)
            await asyncio.gather(*tasks)
            pids.update(task.return_value for task in tasks)

    asyncio.run(use())  # what Python keeps for all: the fork server, the tracker of resources
    before = in_use(pools)
    pids.clear()
    asyncio.run(use())
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert in_use(pools) == before
    assert multiprocessing.active_children() == []


async def test_a_session_may_end_before_its_workers_are_up() -> None:
    for _ in range(10):
        tasks: list[Any] = [ComputeTask(function=os.getpid) for _ in range(8)]
        async with Session([await process_pool(2, QUICK)]) as session:
            await session.submit_tasks(tasks)
        assert all(task.done() for task in tasks)
        assert {task.state for task in tasks} <= {"DONE", "CANCELED"}
