"""Dask's own options of a task, and what is refused."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rhapsody.api import ComputeTask, Resources, Session
from rhapsody.api.errors import BackendError, DependencyError, TaskValidationError

from .helpers import Client, add, ended, options

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"function": add, **options(colour="red")}, "accepted: "),
        ({"function": add, **options(cwd="/tmp")}, "for executables"),
        ({"function": add, **options(resources={"GPU": "one"})}, "must be a number"),
        ({"function": add, **options(resources=["GPU"])}, "a dict of numbers"),
        ({"function": add, **options(allow_other_workers=True)}, "needs workers"),
        ({"function": add, **options(workers="")}, "an address or name"),
        ({"function": add, **options(workers=[1.5])}, "an address or name"),
        ({"function": add, **options(key="")}, "UTF-8"),
        ({"function": add, **options(key="half a \ud800")}, "UTF-8"),
        ({"function": add, **options(retries=-1)}, "how many more"),
        ({"function": add, "resources": Resources(ranks=2)}, "one rank"),
        ({"function": add, "resources": Resources(env={"A": "b"})}, "process"),
        ({"executable": "ls", **options(env={"A": 1})}, "must be a str"),
    ],
)
def test_what_dask_cannot_do_is_refused_and_the_rest_runs(
    run: Any, fields: Any, words: str
) -> None:
    async def scenario(session: Session, _: Any) -> None:
        good = ComputeTask(function=add, args=(1,))
        with pytest.raises(TaskValidationError, match=words):
            await session.submit_tasks([ComputeTask(**fields), good])
        await session.wait_tasks([good], timeout=30)
        assert good.return_value == 2

    run(scenario)


def test_dask_s_own_options(run: Any) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        info = await asyncio.to_thread(backend.client.run, os.getpid)
        address, pid = next(iter(info.items()))
        named, tied = await ended(
            session,
            ComputeTask(function=add, args=(1,), **options(key="my-own-key", priority=5)),
            ComputeTask(function=os.getpid, **options(workers=[address])),
        )
        assert named.return_value == 2
        assert tied.return_value == pid

    run(scenario)


def test_a_graph_that_the_scheduler_refuses_fails_alone(run: Any, cluster: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        nowhere = [
            ComputeTask(function=add, args=(i,), **options(workers="nowhere.invalid:8000"))
            for i in range(3)
        ]
        nobody = ComputeTask(executable="true", **options(workers=["nobody", 99]))
        child = ComputeTask(function=add, args=(nowhere[1],))
        grandchild = ComputeTask(function=add, args=(child,))
        good = ComputeTask(function=add, args=(1,))
        await ended(session, good, *nowhere, nobody, child, grandchild)
        assert good.return_value == 2
        for task in (*nowhere, nobody):
            assert isinstance(task.exception, BackendError), task
            assert "workers=" in str(task.exception)
            assert task.exception.__cause__ is not None
        assert isinstance(child.exception, DependencyError)
        assert isinstance(grandchild.exception, DependencyError)
        late = ComputeTask(function=add, args=(1,), after=[good], **options(workers=(0, 1)))
        await ended(session, late)
        assert late.return_value == 2

    run(scenario)


def test_options_that_the_client_refuses_fail_their_own_tasks(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        take = backend.client.map

        def refuse_some(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("priority") == 7:
                raise TypeError("not this one")
            return take(*args, **kwargs)

        monkeypatch.setattr(backend.client, "map", refuse_some)
        bad = ComputeTask(function=add, args=(1,), **options(priority=7))
        child = ComputeTask(function=add, args=(bad,))
        good = ComputeTask(function=add, args=(1,))
        await ended(session, child, bad, good)
        assert good.return_value == 2
        assert "not this one" in str(bad.exception)
        assert isinstance(child.exception, DependencyError)

    run(scenario)


def test_a_key_that_another_client_has_computed(run: Any, cluster: Any) -> None:
    with Client(cluster, set_as_default=False) as client:
        theirs = client.submit(add, 1, key="theirs")
        assert theirs.result(timeout=30) == 2

        async def scenario(session: Session, _: Any) -> None:
            (task,) = await ended(
                session, ComputeTask(function=add, args=(7,), **options(key="theirs"))
            )
            assert task.return_value == 2
            twice = [
                ComputeTask(function=time.sleep, args=(1,), **options(key="same")) for _ in "ab"
            ]
            await ended(session, *twice)
            assert twice[0].state == "DONE"
            assert isinstance(twice[1].exception, TaskValidationError)

        run(scenario)


def fail_first(marker: str) -> str:
    if os.path.exists(marker):
        return "second"
    Path(marker).touch()
    raise OSError("first")


def test_retries_of_dask_and_of_the_session(run: Any, tmp_path: Path) -> None:
    async def scenario(session: Session, _: Any) -> None:
        theirs, ours = await ended(
            session,
            ComputeTask(function=fail_first, args=(str(tmp_path / "a"),), **options(retries=1)),
            ComputeTask(function=fail_first, args=(str(tmp_path / "b"),), retries=1),
        )
        assert theirs.return_value == ours.return_value == "second"

    run(scenario)
