"""Functions on Dask: sync, async, by value; their exceptions and what cannot be pickled."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
from typing import Any

import pytest

from functions import fail
from rhapsody.api import ComputeTask, Session
from rhapsody.api.errors import SerializationError
from rhapsody.backends.execution.dask_parallel import DaskExecutionBackend

from .helpers import OnlyThere, add, add_later, ended, until

pytestmark = pytest.mark.timeout(180)


def test_functions_of_all_kinds(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        offset = 40
        tasks = await ended(
            session,
            ComputeTask(function=add, args=(1,), kwargs={"b": 2}),
            ComputeTask(function=add_later, args=(1,)),
            ComputeTask(function=lambda: offset + 2),
            ComputeTask(function=functools.partial(add, 5), kwargs={"b": 6}),
            ComputeTask(function="{}-{}".format, args=("a", "b")),
        )
        assert [t.return_value for t in tasks] == [3, 2, 42, 11, "a-b"]
        assert {t.state for t in tasks} == {"DONE"}
        assert tasks[0].stdout == "3"
        assert tasks[0].backend == "dask"

    run(scenario)


def test_names_on_the_dashboard_are_those_of_the_functions(run: Any) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        await ended(
            session,
            ComputeTask(function=add_later, args=(1,)),
            ComputeTask(executable="/bin/true"),
        )

        def prefixes(dask_scheduler: Any) -> list[str]:
            return list(dask_scheduler.task_prefixes)

        names = await asyncio.to_thread(backend.client.run_on_scheduler, prefixes)
        assert {"add_later", "true"} <= set(names)

    run(scenario)


def test_plain_dicts_without_a_session(cluster: Any) -> None:
    async def main() -> None:
        heard: list[tuple[str, str]] = []
        async with DaskExecutionBackend(cluster=cluster) as backend:
            backend.register_callback(lambda task, state: heard.append((task["uid"], state)))
            tasks: list[dict[str, Any]] = [
                {"uid": "f", "function": add, "args": (1,), "kwargs": {}},
                {"uid": "x", "executable": "echo", "arguments": ["hi"]},
            ]
            await backend.submit_tasks(tasks)
            await until(lambda: len([s for _, s in heard if s == "DONE"]) == 2)
            assert tasks[0]["return_value"] == 2
            assert tasks[1]["stdout"] == "hi\n"
            assert await backend.cancel_task("unknown") is False

    asyncio.run(main())


class NeedsArguments(Exception):
    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what} {code}")
        self.code = code


def raise_needs_arguments() -> None:
    raise NeedsArguments("bad", 7)


def raise_with_lock() -> None:
    raise ValueError("locked", threading.Lock())


def test_a_function_raises_its_own_exception(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        key, custom, lock, ends = await ended(
            session,
            ComputeTask(function=fail, args=("nope",)),
            ComputeTask(function=raise_needs_arguments),
            ComputeTask(function=raise_with_lock),
            ComputeTask(function=sys.exit, args=(3,)),
        )
        with pytest.raises(KeyError, match="nope"):
            await key
        assert "in fail" in str(key.stderr)
        assert isinstance(custom.exception, NeedsArguments)
        assert custom.exception.code == 7
        assert isinstance(lock.exception, ValueError)
        assert ends.state == "FAILED"
        again = await ended(session, ComputeTask(function=add, args=(1,)))
        assert again[0].state == "DONE"

    run(scenario)


def test_what_cannot_be_pickled_fails_alone(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        argument, result, generator, nested, here, good = await ended(
            session,
            ComputeTask(function=add, args=(threading.Lock(),)),
            ComputeTask(function=threading.Lock),
            ComputeTask(function=lambda: (i for i in range(3))),
            ComputeTask(function=lambda: {"deep": [threading.Lock()]}),
            ComputeTask(function=OnlyThere, args=(os.getpid(), 1)),
            ComputeTask(function=add, args=(1,)),
        )
        for task in (argument, result, generator, nested, here):
            assert isinstance(task.exception, SerializationError), task.exception
        assert good.return_value == 2

    run(scenario)
