"""What the Dragon backend costs in the driver: a session on a stand-in for Dragon.

And, to tell how busy the machine was, what there is without it: the session on the no-op backend,
and an event loop beside three threads that do nothing but run.

Every function has ended by the time that it is handed over, so that what is measured is ours: from
`submit_tasks` to the last task that is settled, over all threads of the driver. The little that the
stand-in itself takes is among it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from benchmarks import dragon_stand_in, sessions, side
from rhapsody.api import Session
from rhapsody.backends import DragonExecutionBackend
from rhapsody.backends.execution.noop import NoopExecutionBackend


def _backend() -> DragonExecutionBackend:
    dragon_stand_in.install()
    return DragonExecutionBackend(node_timeout=600.0)


async def _cpu(backend: Any, number: int) -> dict[str, Any]:
    """Return as `seconds` the processor time of this process, per task."""
    async with Session(backends=[await backend]) as session:
        warm = sessions.increments(side.WARM_UP)
        await session.submit_tasks(warm)
        await session.wait_tasks(warm)
        tasks = sessions.increments(number)
        began = time.process_time()
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        seconds = time.process_time() - began
    return {"seconds": seconds / number, "result": sum(map(sessions.worth, tasks))}


async def _bare_stall(number: int) -> dict[str, Any]:
    """Return as `seconds` the longest time for which the loop stood still beside busy threads."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            pass

    for _ in range(3):
        threading.Thread(target=run).start()
    longest, last = 0.0, time.perf_counter()
    # About as long as as many tasks take, from now: that the threads are up takes as long.
    end = last + 15e-6 * number
    while last < end:
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    over.set()
    return {"seconds": longest, "result": number}


if __name__ == "__main__":
    side.main(
        {
            "session": lambda number: asyncio.run(_cpu(NoopExecutionBackend(), number)),
            "cpu": lambda number: asyncio.run(_cpu(_backend(), number)),
            "bare-stall": lambda number: asyncio.run(_bare_stall(number)),
            "stall": lambda number: asyncio.run(
                sessions.stall(_backend(), sessions.increments, number)
            ),
        }
    )
