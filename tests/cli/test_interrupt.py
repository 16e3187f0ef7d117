"""Ctrl-C, once and twice, at a driver with executables in every mood."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fifos import Fifo
from processes import children_of, driver_of, gone

# argv: the roster, the grace, and what an executable does before it waits.
PROGRAM = """
import asyncio, sys
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

roster, grace, trap = sys.argv[1:]
script = f"{trap}; exec 9>'{roster}'; echo $$ >&9; sleep 1000 & wait; sleep 1000; true"

async def main():
    backend = await ConcurrentExecutionBackend(slots=2, grace=float(grace))
    session = Session(backends=[backend])
    tasks = [ComputeTask(executable="/bin/sh", arguments=["-c", script]) for _ in range(12)]
    try:
        async with session:
            await session.submit_tasks(tasks)
            await session.wait_tasks(tasks)
    finally:
        print(*sorted({task.state for task in tasks}), session.closed, flush=True)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise SystemExit(130)
"""
IGNORES = "trap '' TERM INT"


async def test_once_stops_everything_and_closes_the_session(roster: Fifo) -> None:
    async with driver_of(PROGRAM, str(roster.path), "1000", ":") as driver:
        await roster.lines(2)
        (warden,) = children_of(driver.pid)
        os.kill(driver.pid, signal.SIGINT)
        assert await driver.wait() == 130
        assert roster.is_empty()
        await gone(warden)
        assert driver.stdout is not None
        assert driver.stderr is not None
        assert await driver.stdout.read() == b"CANCELED True\ninterrupted\n"
        said = (await driver.stderr.read()).decode()
        assert "Traceback" not in said
        assert "never retrieved" not in said


async def test_once_escalates_where_sigterm_is_ignored(roster: Fifo) -> None:
    async with driver_of(PROGRAM, str(roster.path), "0.1", IGNORES) as driver:
        await roster.lines(2)
        os.kill(driver.pid, signal.SIGINT)
        assert await driver.wait() == 130
        assert roster.is_empty()
        assert driver.stdout is not None
        assert await driver.stdout.read() == b"CANCELED True\ninterrupted\n"


async def test_twice_ends_the_driver_at_once_and_its_executables_too(roster: Fifo) -> None:
    """The grace is long, and nobody waits for it."""
    trap = "trap '' INT; trap 'echo TERM >&9' TERM"
    async with driver_of(PROGRAM, str(roster.path), "1000", trap) as driver:
        await roster.lines(2)
        os.kill(driver.pid, signal.SIGINT)
        # The first has been heard when the executables are told; they go on.
        assert await roster.lines(2) == ["TERM", "TERM"]
        os.kill(driver.pid, signal.SIGINT)
        assert await driver.wait() == 130
        await roster.empty()


async def test_ctrl_c_of_a_terminal_reaches_no_executable_by_itself(roster: Fifo) -> None:
    """It goes to the whole foreground group; the executables end by the driver's order only."""
    trap = "trap 'echo INT >> heard' INT; trap 'exit 0' TERM"
    async with driver_of(PROGRAM, str(roster.path), "1000", trap, start_new_session=True) as driver:
        await roster.lines(2)
        os.killpg(driver.pid, signal.SIGINT)
        assert await driver.wait() == 130
        await roster.empty()
    assert not Path("heard").exists()
