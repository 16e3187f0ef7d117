"""Running, cancelled and timed out on Dask."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from processes import alive
from rhapsody.api import ComputeTask, Session
from rhapsody.api.errors import TaskTimeoutError

from .helpers import Client, add, ended, options, until

pytestmark = pytest.mark.timeout(180)


def test_running_means_that_a_worker_has_started_it(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        first = [ComputeTask(function=time.sleep, args=(1.5,)) for _ in range(2)]
        later = [ComputeTask(function=time.sleep, args=(0.3,)) for _ in range(2)]
        await session.submit_tasks([*first, *later])
        await until(lambda: all(t.state == "RUNNING" for t in first))
        assert {t.state for t in later} == {"SUBMITTED"}
        await session.wait_tasks([*first, *later], timeout=30)

    run(scenario)


STUBBORN = """
trap '' TERM
sh -c "trap '' TERM; sleep 600" &
echo $! > child
echo $$ > parent
wait
"""


def test_cancel_takes_the_whole_process_group(run: Any, tmp_path: Path) -> None:
    async def scenario(session: Session, _: Any) -> None:
        task = ComputeTask(
            executable="sh", arguments=["-c", STUBBORN], **options(cwd=str(tmp_path))
        )
        await session.submit_tasks([task])
        await until(lambda: (tmp_path / "parent").exists() and task.state == "RUNNING")
        pids = [int((tmp_path / name).read_text()) for name in ("child", "parent")]
        assert all(map(alive, pids))
        assert await session.cancel(task) is True
        assert task.state == "CANCELED"
        assert not any(map(alive, pids))

    run(scenario)


def test_cancel_of_what_has_not_started(run: Any, tmp_path: Path) -> None:
    async def scenario(session: Session, _: Any) -> None:
        busy = [ComputeTask(function=time.sleep, args=(2,)) for _ in range(2)]
        queued = [
            ComputeTask(executable="touch", arguments=[str(tmp_path / f"ran{i}")])
            for i in range(20)
        ]
        await session.submit_tasks([*busy, *queued])
        results = await asyncio.gather(*(session.cancel(task) for task in queued))
        assert results == [True] * 20
        await session.wait_tasks(busy, timeout=30)
        assert not list(tmp_path.glob("ran*"))

    run(scenario)


def test_an_async_function_is_canceled_and_a_running_function_is_reported(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        sleeper = ComputeTask(function=asyncio.sleep, args=(600,))
        busy = ComputeTask(function=time.sleep, args=(2,))
        await session.submit_tasks([sleeper, busy])
        await until(lambda: sleeper.state == busy.state == "RUNNING")
        assert await session.cancel(sleeper) is True
        assert sleeper.state == "CANCELED"
        assert await session.cancel(busy) is False
        assert busy.state == "RUNNING"
        await session.wait_tasks([busy], timeout=30)
        assert busy.state == "DONE"

    run(scenario)


def test_timeouts(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        program, function = await ended(
            session,
            ComputeTask(executable="sleep", arguments=["600"], timeout=0.5),
            ComputeTask(function=time.sleep, args=(3,), timeout=0.5),
        )
        assert isinstance(program.exception, TaskTimeoutError)
        assert program.exception.stopped
        assert isinstance(function.exception, TaskTimeoutError)
        assert not function.exception.stopped

    run(scenario)


def test_close_takes_the_children_and_leaves_the_cluster(
    run: Any, cluster: Any, tmp_path: Path
) -> None:
    async def scenario(session: Session, _: Any) -> ComputeTask:
        task = ComputeTask(
            executable="sh", arguments=["-c", STUBBORN], **options(cwd=str(tmp_path))
        )
        await session.submit_tasks([task])
        await until(lambda: (tmp_path / "parent").exists())
        return task

    task = run(scenario)
    assert task.state == "CANCELED"
    assert not alive(int((tmp_path / "child").read_text()))
    with Client(cluster, set_as_default=False) as client:
        assert client.submit(add, 1).result(timeout=30) == 2

        def plugins(dask_worker: Any) -> list[str]:
            return [name for name in dask_worker.plugins if name.startswith("rhapsody")]

        assert not any(client.run(plugins).values())
