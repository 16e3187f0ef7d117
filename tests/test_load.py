"""Many tasks of every kind, with deaths and cancels among them: each ends once, and rightly."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from functions import die, double, double_later, fail
from pools import process_pool
from rhapsody.api import ComputeTask, Resources, Session, WorkerLostError
from rhapsody.backends import ConcurrentExecutionBackend

PATIENCE = 90.0


def mixed(count: int, seed: int, *, deaths: bool) -> list[ComputeTask]:
    chance = random.Random(seed)
    tasks = []
    for n in range(count):
        kind = chance.random()
        if kind < 0.93:
            tasks.append(ComputeTask(function=double, args=(n,)))
        elif kind < 0.96:
            tasks.append(ComputeTask(function=double_later, args=(n,)))
        elif kind < 0.98:
            tasks.append(ComputeTask(function=fail, args=(n,)))
        elif kind < 0.985:
            tasks.append(ComputeTask(function=double, args=(n,), resources=Resources()))
        elif kind < 0.99:
            tasks.append(ComputeTask(executable="echo", arguments=[n]))
        elif deaths and kind < 0.993:
            tasks.append(ComputeTask(function=die, args=(n,)))
        else:
            tasks.append(ComputeTask(function=double, args=(tasks[chance.randrange(n)],)))
    return tasks


def check_result(task: ComputeTask) -> None:
    """A task that was not canceled, and whose parent was not."""
    if task.executable is not None:
        assert (task.state, task.stdout) == ("DONE", f"{task.arguments[0]}\n")
    elif task.function is fail:
        assert isinstance(task.exception, LookupError)
        assert task.exception.args == task.args
    elif task.function is die:
        assert isinstance(task.exception, WorkerLostError)
    elif task.args and isinstance(task.args[0], int):
        assert (task.state, task.return_value) == ("DONE", 2 * task.args[0])


@pytest.mark.parametrize("where", ["threads", "processes"])
async def test_ten_thousand_tasks_of_mixed_kinds(where: str) -> None:
    backend = await (ConcurrentExecutionBackend() if where == "threads" else process_pool(3))
    states: Counter[str] = Counter()
    tasks = mixed(10_000, 1, deaths=where == "processes")
    async with Session([backend]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=PATIENCE)
        counts = session.get_statistics()["counts"]
    states.update(task.state for task in tasks)
    assert counts == states
    assert set(states) == {"DONE", "FAILED"}
    for task in tasks:
        check_result(task)
    assert backend.dropped_events == 0


@pytest.mark.parametrize("seed", range(3))
async def test_deaths_and_cancels_among_very_many(seed: int) -> None:
    """Whoever is not canceled has the right end, whatever happens to the others."""
    backend = await process_pool(3)
    tasks = mixed(1500, seed, deaths=True)
    chance = random.Random(seed)
    async with Session([backend]) as session:
        await session.submit_tasks(tasks)

        async def cancel_some() -> list[tuple[ComputeTask, bool]]:
            told = []
            for _ in range(40):
                task = chance.choice(tasks)
                told.append((task, await session.cancel(task)))
                await asyncio.sleep(0)
            return told

        told = [
            one for each in await asyncio.gather(*(cancel_some() for _ in range(3))) for one in each
        ]
        await session.wait_tasks(tasks, timeout=PATIENCE)
    for task, stopped in told:
        if stopped:
            assert task.state == "CANCELED"
    canceled = {task.uid for task, _ in told}
    for task in tasks:
        if task.uid not in canceled:
            assert task.state != "CANCELED"
            check_result(task)


def test_tasks_made_by_several_threads_have_uids_of_their_own() -> None:
    barrier = threading.Barrier(8)

    def make() -> list[str]:
        barrier.wait()
        return [ComputeTask(function=double).uid for _ in range(5000)]

    with ThreadPoolExecutor(8) as executor:
        made = [executor.submit(make) for _ in range(8)]
        uids = [uid for future in made for uid in future.result()]
    assert len(set(uids)) == 40_000


async def test_sessions_side_by_side_do_not_hear_of_each_other() -> None:
    async def one(number: int) -> list[Any]:
        backend = await (process_pool(2) if number % 2 else ConcurrentExecutionBackend())
        async with Session([backend]) as session:
            tasks = [ComputeTask(function=double, args=(n + number,)) for n in range(300)]
            await session.submit_tasks(tasks)
            await asyncio.gather(*tasks)
            return [task.return_value for task in tasks]

    results = await asyncio.gather(*map(one, range(4)))
    assert results == [[2 * (n + number) for n in range(300)] for number in range(4)]


async def test_a_task_with_the_uid_of_one_that_ended_is_another(tmp_path: Path) -> None:
    async with Session([await process_pool(2)]) as session:
        for round_ in range(30):
            tasks = [ComputeTask(function=double, args=(round_,), uid=f"t{n}") for n in range(20)]
            await session.submit_tasks(tasks)
            await asyncio.gather(*tasks)
            assert {task.return_value for task in tasks} == {2 * round_}
            session.forget(tasks)
