"""Functions in processes that travel in one bundle: what happens to one is not its neighbours'."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fifos import PATIENCE, Fifo, report, wait_for_release
from pools import process_pool
from processes import driver_of, gone
from rhapsody.api import ComputeTask, Resources, SerializationError, Session, WorkerLostError


async def warm(width: int, grace: float = 5.0) -> Session:
    """A session whose workers have run so many short calls that the next come in bundles."""
    session = Session([await process_pool(width, grace=grace)])
    short = [ComputeTask(function=os.getpid) for _ in range(300)]
    await session.submit_tasks(short)
    await asyncio.gather(*short)
    return session


def tasks_of(function: Callable[..., Any], *args: Any, count: int = 1) -> list[ComputeTask]:
    return [ComputeTask(function=function, args=args) for _ in range(count)]


# ---------------------------------------------------------------------- what is called


def hear(path: str, go: str) -> int:
    report(path, os.getpid())
    wait_for_release(go)
    return os.getpid()


def asleep(path: str) -> None:
    report(path, os.getpid())
    while True:
        signal.pause()


def hold(path: str, seconds: float) -> str:
    """Without letting go of the GIL: nothing else runs in this process meanwhile."""
    report(path, os.getpid())
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return "held"


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def _refuse() -> None:
    raise ValueError("not here")


class Unreadable:
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


# ---------------------------------------------------------------------- cancel and close


@pytest.mark.parametrize("width", [1, 2])
async def test_all_of_a_bundle_are_canceled_wherever_they_are(width: int, roster: Fifo) -> None:
    """Some run, some are in a bundle behind them, some are given back in this moment."""
    for count in range(1, 13):
        session = await warm(width)
        async with session:
            tasks = tasks_of(asleep, roster.path, count=count)
            await session.submit_tasks(tasks)
            worker = int(await roster.line())
            canceled = await asyncio.wait_for(asyncio.gather(*map(session.cancel, tasks)), PATIENCE)
            assert canceled == [True] * count
            assert {task.state for task in tasks} == {"CANCELED"}
            await gone(worker)


async def test_close_in_the_midst_of_bundles_cancels_each_call(roster: Fifo) -> None:
    for count in (3, 8, 40):
        session = await warm(2)
        tasks = tasks_of(asleep, roster.path, count=count)
        await session.submit_tasks(tasks)
        worker = int(await roster.line())
        await asyncio.wait_for(session.close(), PATIENCE)
        assert {task.state for task in tasks} == {"CANCELED"}
        await gone(worker)


async def test_a_cancel_does_not_hit_the_call_before_it_that_holds_the_gil(roster: Fifo) -> None:
    async with await warm(1) as session:
        holder, *behind = [*tasks_of(hold, roster.path, 1.3), *tasks_of(os.getpid, count=5)]
        await session.submit_tasks([holder, *behind])
        await roster.line()
        assert await session.cancel(behind[2])
        await asyncio.wait_for(session.wait_tasks([holder, *behind]), PATIENCE)
    assert (holder.state, holder.return_value) == ("DONE", "held")
    assert [task.state for task in behind] == ["DONE", "DONE", "CANCELED", "DONE", "DONE"]


async def test_a_cancel_and_a_timeout_of_one_call_at_once(roster: Fifo) -> None:
    async with await warm(1) as session:
        (task,) = tasks_of(asleep, roster.path)
        await session.submit_tasks([task])
        await roster.line()
        backend = next(iter(session.backends.values()))
        said = await asyncio.gather(*(backend.cancel_task(task.uid) for _ in range(5)))
        assert said == [True] * 5


async def test_a_call_that_is_given_back_has_not_begun(roster: Fifo, go: Fifo) -> None:
    """Its time does not run while it waits behind a long one."""
    async with await warm(1) as session:
        first = tasks_of(hear, roster.path, go.path)
        later = [ComputeTask(function=os.getpid, timeout=1.5) for _ in range(6)]
        await session.submit_tasks([*first, *later])
        await roster.line()
        await asyncio.sleep(1.7)  # longer than the timeout
        assert {task.state for task in later} == {"SUBMITTED"}
        go.release()
        await asyncio.wait_for(session.wait_tasks([*first, *later]), PATIENCE)
    assert {task.state for task in later} == {"DONE"}


async def test_the_signal_that_ends_a_worker_is_not_the_drivers(roster: Fifo) -> None:
    """A forked process inherits the descriptor by which asyncio hears of signals."""
    loop = asyncio.get_running_loop()
    heard: list[str] = []
    loop.add_signal_handler(signal.SIGTERM, heard.append, "SIGTERM")
    try:
        # With an hour of grace nothing but the SIGTERM can have ended it.
        async with await warm(1, grace=3600) as session:
            (task,) = tasks_of(asleep, roster.path)
            await session.submit_tasks([task])
            worker = int(await roster.line())
            assert await asyncio.wait_for(session.cancel(task), PATIENCE)
            await gone(worker)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    assert heard == []


# ---------------------------------------------------------------------- neighbours


async def test_short_calls_are_not_kept_behind_a_long_one(roster: Fifo, go: Fifo) -> None:
    async with await warm(2) as session:
        tasks = [*tasks_of(hear, roster.path, go.path), *tasks_of(os.getpid, count=99)]
        await session.submit_tasks(tasks)
        await asyncio.wait_for(session.wait_tasks(tasks[1:]), PATIENCE)
        assert not tasks[0].done()
        go.release()
        await tasks[0]


async def test_long_calls_after_short_ones_are_spread_over_the_workers(
    roster: Fifo, go: Fifo
) -> None:
    """Each waits until all others run: on one worker they would wait for ever."""
    async with await warm(3) as session:
        tasks = tasks_of(hear, roster.path, go.path, count=3)
        await session.submit_tasks(tasks)
        assert len({await roster.line() for _ in tasks}) == 3
        go.release(3)
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("place", [0, 7, 19])
@pytest.mark.parametrize(
    ("argument", "error"), [(Deadly(), WorkerLostError), (Unreadable(), SerializationError)]
)
async def test_an_argument_that_harms_its_bundle_fails_its_own_call_only(
    place: int, argument: object, error: type[Exception]
) -> None:
    async with await warm(2) as session:
        tasks = tasks_of(id, None, count=20)
        tasks[place] = ComputeTask(function=id, args=(argument,))
        await session.submit_tasks(tasks)
        await asyncio.wait_for(session.wait_tasks(tasks), PATIENCE)
        assert [n for n, task in enumerate(tasks) if task.state != "DONE"] == [place]
        assert isinstance(tasks[place].exception, error)


async def test_calls_beside_one_that_cannot_be_pickled_are_spread_all_the_same(
    roster: Fifo, go: Fifo
) -> None:
    def bad(_: object) -> None: ...

    unpicklable = (number for number in range(3))
    async with await warm(2) as session:
        tasks = tasks_of(hear, roster.path, go.path, count=2)
        refused = ComputeTask(function=bad, args=(unpicklable,))
        await session.submit_tasks([refused, *tasks])
        assert len({await roster.line() for _ in tasks}) == 2
        go.release(2)
        await asyncio.wait_for(session.wait_tasks([refused, *tasks]), PATIENCE)
    assert isinstance(refused.exception, SerializationError)
    assert {task.state for task in tasks} == {"DONE"}


async def test_a_worker_killed_in_the_midst_of_a_bundle_loses_one_call(roster: Fifo) -> None:
    async with await warm(1) as session:
        tasks = [*tasks_of(os.getpid, count=4), *tasks_of(asleep, roster.path)]
        tasks += tasks_of(os.getpid, count=20)
        await session.submit_tasks(tasks)
        os.kill(int(await roster.line()), signal.SIGKILL)
        await asyncio.wait_for(session.wait_tasks(tasks), PATIENCE)
    assert [n for n, task in enumerate(tasks) if task.state != "DONE"] == [4]
    assert isinstance(tasks[4].exception, WorkerLostError)
    assert tasks[4].exception.transient


# ---------------------------------------------------------------------- what they hold and start


async def test_a_retry_never_holds_its_resources_twice(tmp_path: Path) -> None:
    """Its end frees them before it is run again, under the same uid."""
    cores = len(os.sched_getaffinity(0))

    def third_time(path: str) -> int:
        with open(path, "a") as file:
            file.write(".")
        if os.path.getsize(path) < 3:
            raise ValueError("not yet")
        return len(os.sched_getaffinity(0))

    async with await warm(2) as session:
        tasks = [
            ComputeTask(
                function=third_time,
                args=(str(tmp_path / f"tries{n}"),),
                resources=Resources(),
                retries=2,
            )
            for n in range(100)
        ]
        await session.submit_tasks(tasks)
        await asyncio.wait_for(session.wait_tasks(tasks), PATIENCE)
        assert {task.return_value for task in tasks} == {1}
        # All of the machine can be had afterwards: nothing was lost on the way.
        whole = ComputeTask(function=os.getpid, resources=Resources(cores_per_rank=cores))
        await session.submit_tasks([whole])
        await asyncio.wait_for(session.wait_tasks([whole]), PATIENCE)
        assert whole.state == "DONE"


def start_away(path: str, trap: bool) -> None:
    """Start a process in a session of its own, which may ignore SIGTERM; wait for it."""
    script = "trap '' TERM; echo ready; exec sleep 1000" if trap else "echo ready; exec sleep 1000"
    child = subprocess.Popen(["sh", "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    report(path, os.getpid(), child.pid)
    child.wait()


@pytest.mark.parametrize("trap", [False, True])
async def test_what_left_the_workers_group_goes_with_a_cancel(roster: Fifo, trap: bool) -> None:
    async with await warm(1) as session:
        (task,) = tasks_of(start_away, roster.path, trap)
        await session.submit_tasks([task])
        pids = await roster.pids()
        assert await session.cancel(task)
        for pid in pids:
            await gone(pid)


async def test_what_forks_during_a_cancel_leaves_nothing(roster: Fifo) -> None:
    async with await warm(1) as session:
        for _ in range(5):
            (task,) = tasks_of(subprocess.call, ["sh", "-c", roster.forking()])
            await session.submit_tasks([task])
            await roster.line()
            assert await session.cancel(task)
            await roster.empty()


DRIVER = """
import asyncio, os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_bundles import start_away, warm
from rhapsody.api import ComputeTask

async def main():
    async with await warm(2) as session:
        tasks = [ComputeTask(function=start_away, args=(sys.argv[2], True)) for _ in range(2)]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_what_left_the_workers_group_goes_with_the_driver(
    roster: Fifo, tmp_path: Path
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    folders = os.pathsep.join(map(str, Path(__file__).parents[:2]))
    async with driver_of(script, folders, str(roster.path), warnings="ignore") as driver:
        pids = await roster.pids(2)
        driver.kill()
        for pid in pids:
            await gone(pid)
