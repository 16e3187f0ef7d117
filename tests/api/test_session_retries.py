"""A task that fails is run again as often as its `retries` say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from functions import noop
from manual import ManualBackend
from rhapsody.api import (
    ComputeTask,
    Session,
)
from rhapsody.backends import ConcurrentExecutionBackend


async def test_a_task_that_fails_is_run_again_as_often_as_it_says() -> None:
    runs: Counter[str] = Counter()

    def flaky(name: str, good_at: int) -> int:
        runs[name] += 1
        if runs[name] < good_at:
            raise OSError(f"run {runs[name]}")
        return runs[name]

    third = ComputeTask(function=flaky, args=("third", 3), retries=5)
    never = ComputeTask(function=flaky, args=("never", 99), retries=2)
    once = ComputeTask(function=flaky, args=("once", 99))
    async with Session([ConcurrentExecutionBackend()]) as session:
        futures = await session.submit_tasks([third, never, once])
        await session.wait_tasks([third, never, once])
        assert await futures[0] is third
        assert session.get_statistics()["counts"] == {"DONE": 1, "FAILED": 2}
    assert runs == {"third": 3, "never": 3, "once": 1}
    assert (third.return_value, third.exception) == (3, None)
    assert str(never.exception) == "run 3"  # the last one


async def test_an_executable_is_retried_too(tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) -ge 3 ]"
    task = ComputeTask(executable="/bin/sh", arguments=["-c", script], retries=4)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        await task
    assert (tmp_path / "runs").read_text() == "x\n" * 3
    assert (task.exit_code, task.exception) == (0, None)


async def test_a_canceled_task_is_not_retried() -> None:
    task = ComputeTask(function=noop, retries=3)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        assert await session.cancel(task) is True
        await backend.heard()
        assert len(backend.given) == 1
    assert task.state == "CANCELED"


async def test_a_failure_while_it_is_being_canceled_is_not_retried() -> None:
    task = ComputeTask(function=noop, retries=3)

    class Fails(ManualBackend):
        async def _cancel(self, task: Any) -> bool:
            self.deliver(task, "FAILED", exception=OSError("it died of it"))
            return True

    backend = Fails()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        assert await session.cancel(task) is False  # it is not CANCELED, and cancel does not claim
        await backend.heard()
        assert len(backend.given) == 1
    assert task.state == "FAILED"
