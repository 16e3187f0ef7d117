"""A mixture of everything on the local backend, with cancels and a close in between.

Threads, worker processes and executables; failing, dying, hanging, deaf to SIGTERM; retried, out of
time, canceled, dependent. Whatever happens when: each task ends once, and nothing stays behind.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend

# Seconds, and how leftovers are recognised: of this run, for the processes of another one in a
# container are seen from here.
NAP = f"987.{secrets.randbits(64)}"


def quick(*results: Any) -> int:
    return len(results)


def slow(*results: Any) -> int:
    time.sleep(0.02)
    return len(results)


def fails(*results: Any) -> None:
    raise ValueError(len(results))


def dies(*results: Any) -> None:
    os._exit(3)


async def waits(*results: Any) -> int:
    await asyncio.sleep(0.05)
    return len(results)


async def hangs(*results: Any) -> None:
    await asyncio.Event().wait()


FUNCTIONS = [quick, slow, fails, waits, hangs]
SCRIPTS = [
    "true",
    "exit 3",
    "sleep 0.03",
    f"sleep {NAP} & echo x",
    "kill -9 $$",
    "trap '' TERM; sleep 0.5",
    f"exec sleep {NAP}",
]


def some_task(choose: random.Random, before: list[ComputeTask]) -> ComputeTask:
    backend = choose.choice(["threads", "processes"])
    parents = choose.sample(before, min(len(before), choose.choice([0, 0, 0, 1, 2])))
    fields: dict[str, Any] = {
        "backend": backend,
        "retries": choose.choice([0, 0, 1, 2]),
        "timeout": choose.choice([None, 0.02, 0.3]),
    }
    if choose.random() < 0.6:
        function = choose.choice([*FUNCTIONS, dies] if backend == "processes" else FUNCTIONS)
        if function is hangs:
            fields["timeout"] = 0.1
        return ComputeTask(function=function, args=tuple(parents), **fields)
    script = choose.choice(SCRIPTS)
    if "exec" in script:
        fields["timeout"] = 0.1
    return ComputeTask(executable="/bin/sh", arguments=["-c", script], after=parents, **fields)


def leftovers() -> list[bytes]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if NAP.encode() in words:
            found.append(words)
    return found


@pytest.mark.parametrize("early_close", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
async def test_a_mixture_of_everything(seed: int, early_close: bool) -> None:
    choose = random.Random(seed)
    tasks: list[ComputeTask] = []
    for _ in range(80):
        tasks.append(some_task(choose, tasks))
    threads = ConcurrentExecutionBackend(name="threads", slots=3, grace=0.2)
    processes = ConcurrentExecutionBackend(ProcessPoolExecutor(2), name="processes", grace=0.2)
    session = Session([threads, processes])

    async def cancel_some() -> None:
        for task in choose.sample(tasks, 15):
            await asyncio.sleep(choose.random() * 0.02)
            if task.state != "NEW":
                stopped = await session.cancel(task)
                assert not stopped or task.state == "CANCELED"

    canceling = asyncio.create_task(cancel_some())
    futures: list[asyncio.Future[Any]] = []
    for start in range(0, len(tasks), 20):
        futures += await session.submit_tasks(tasks[start : start + 20])
        await asyncio.sleep(0.005)
    if early_close:
        await asyncio.sleep(0.1)
    else:
        await canceling
        await session.wait_tasks(tasks, timeout=60)
    await asyncio.wait_for(session.close(), 20)
    await canceling

    assert all(future.done() for future in futures)
    assert session.get_statistics()["counts"] == Counter(task.state for task in tasks)
    for task in tasks:
        assert task.state in ("DONE", "FAILED", "CANCELED")
        assert (task.exception is not None) == (task.state == "FAILED")
        if task.state == "DONE" and task.function is not None:
            assert task.return_value == len(task.args)
    assert leftovers() == []
