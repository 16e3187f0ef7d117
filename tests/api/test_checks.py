"""How often a backend is asked whether it can run a task, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from manual import ManualBackend
from rhapsody.api import (
    ComputeTask,
    ResourceError,
    Resources,
    Session,
    TaskValidationError,
)
from rhapsody.runtime.task import Task


class Strict(ManualBackend):
    """Notes what it checks, and refuses what asks for more cores than it knows to have."""

    cores: int | None = 8

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[str] = []

    def _check(self, task: Task, options: Mapping[str, Any]) -> None:
        self.checked.append(task["uid"])
        need: Resources | None = task.get("resources")
        if need is not None and self.cores is not None and need.cores > self.cores:
            raise ResourceError(f"task '{task['uid']}': {need.cores} cores of {self.cores}")


class KnowsWhenStarted(Strict):
    """An engine whose cores are known once it is up."""

    cores = None

    async def _start(self) -> None:
        await super()._start()
        self.cores = 8


def program(cores: int = 1, **fields: Any) -> ComputeTask:
    need = Resources(cores_per_rank=cores)
    return ComputeTask(executable="x", resources=need, **fields)


async def test_a_task_is_checked_once() -> None:
    backend = Strict()
    async with Session([await backend]) as session:
        tasks = [program() for _ in range(10)]
        await session.submit_tasks(tasks)
        assert backend.checked == [task.uid for task in tasks]
        assert backend.given == tasks


async def test_a_framework_s_own_tasks_are_checked() -> None:
    async with Strict() as backend:
        with pytest.raises(ResourceError, match="9 cores of 8"):
            await backend.submit_tasks([{"uid": "a", "executable": "x"}, program(9, uid="b")])
        assert backend.given == []
        with pytest.raises(TaskValidationError, match="'a' is already with backend"):
            await backend.submit_tasks([{"uid": "a", "executable": "x"}] * 2)
        await backend.submit_tasks([{"uid": "a", "executable": "x"}])
        assert [task["uid"] for task in backend.given] == ["a"]


async def test_what_a_started_backend_turns_out_not_to_have_fails_alone() -> None:
    backend = KnowsWhenStarted()
    small, large, other = program(), program(9), program(8)
    async with Session([backend]) as session:
        await session.submit_tasks([small, large, other])
        await session.wait_tasks([large], timeout=60)
        assert isinstance(large.exception, ResourceError)
        assert backend.given == [small, other]


async def test_what_a_backend_has_lost_since_fails_a_child_that_needs_it() -> None:
    backend = Strict()
    async with Session([await backend]) as session:
        parent, lost = program(), program(8)
        child = program(8, after=[parent])
        again = program(8, retries=1)
        await session.submit_tasks([parent, child, again])
        backend.cores = 4
        backend.deliver(parent, "DONE")
        backend.deliver(again, "FAILED", exception=OSError("its node is gone"))
        await session.wait_tasks([child, again], timeout=60)
        assert isinstance(child.exception, ResourceError)
        assert isinstance(again.exception, ResourceError)
        with pytest.raises(ResourceError):
            await session.submit_tasks([lost])
        assert backend.given == [parent, again]
