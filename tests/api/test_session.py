"""One session: its name, its folder, its event loop, and others beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from functions import double, noop
from manual import ManualBackend
from rhapsody.api import (
    BackendError,
    ComputeTask,
    Session,
    SessionError,
)
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend

# ---------------------------------------------------------------------- names and folders


def test_sessions_count_on_within_a_process() -> None:
    first, second = Session(), Session()
    number = int(first.uid.removeprefix("session."))
    assert first.uid == f"session.{number:04d}"
    assert second.uid == f"session.{number + 1:04d}"
    assert Session(uid="mine").uid == "mine"


def test_the_work_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Session().work_dir == Path.cwd()
    monkeypatch.setenv("RHAPSODY_WORK_DIR", str(tmp_path / "env"))
    assert Session().work_dir == tmp_path / "env"
    session = Session(uid="s", work_dir=tmp_path / "given")
    assert session.work_dir == tmp_path / "given"
    assert not session.work_dir.exists()  # made when it is needed
    assert session.path == tmp_path / "given" / "s"
    assert session.path.is_dir()
    assert Session(uid="s", work_dir=str(tmp_path / "given")).path.name == "s.1"


@pytest.mark.parametrize("work_dir", [5, 0, b"x", ["x"]])
def test_a_work_directory_is_a_path(work_dir: Any) -> None:
    with pytest.raises(SessionError, match="work_dir must be"):
        Session(work_dir=work_dir)


@pytest.mark.parametrize("kind", ["dangling", "file", "below a file", "proc", "nul"])
async def test_a_work_directory_that_cannot_be_made_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "dangling").symlink_to("/missing/folder")
    (tmp_path / "file").touch()
    place = {"below a file": "file/below", "proc": "/proc/nope", "nul": "a\0b"}.get(kind, kind)
    backend = ConcurrentExecutionBackend(slots=1)
    async with Session([backend], work_dir=place) as session:
        with pytest.raises(SessionError, match="work_dir") as caught:
            session.path.exists()
        assert repr(place) in str(caught.value)
        task = ComputeTask(executable="true", retries=3)
        other = ComputeTask(function=double, args=(1,))
        await session.submit_tasks([task, other])
        await session.wait_tasks([task, other], timeout=60)
    assert (task.state, other.state) == ("FAILED", "DONE")
    assert isinstance(task.exception, SessionError)
    assert "work_dir" in str(task.exception)


@pytest.mark.parametrize("uid", ["a/b", "..", 5, "a\0b"])
def test_a_session_uid_is_the_name_of_a_folder(uid: Any) -> None:
    with pytest.raises(SessionError, match="uid must be"):
        Session(uid=uid)


async def test_a_session_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    async with Session([ConcurrentExecutionBackend(), NoopExecutionBackend()]) as session:
        await session.map(double, [1])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- two loops


def test_a_session_belongs_to_one_event_loop() -> None:
    """A second asyncio.run is told so; it would wait for ever."""
    session, backend = Session(), ManualBackend()
    session.add_backend(backend)
    ended, left, late = (ComputeTask(function=noop) for _ in range(3))

    async def first() -> None:
        await session.submit_tasks([ended, left])
        backend.deliver(ended, "DONE")
        await ended

    async def follow() -> None:
        async for _ in session.as_completed([left]):
            pass

    async def second() -> None:
        assert await session.wait_tasks([ended]) == [ended]
        assert await session.cancel(ended) is False
        for attempt in (
            session.submit_tasks([late]),
            session.wait_tasks([left]),
            session.cancel(left),
            follow(),
        ):
            with pytest.raises(SessionError, match=r"another event loop; make a new session"):
                await asyncio.wait_for(attempt, 30)
        await session.close()

    asyncio.run(first())
    asyncio.run(second())
    assert (late.state, left.state) == ("NEW", "CANCELED")


@pytest.mark.parametrize("cls", [ConcurrentExecutionBackend, NoopExecutionBackend])
def test_a_backend_belongs_to_one_event_loop(cls: Any) -> None:
    backend = asyncio.run(cls.create())
    task = ComputeTask(function=noop)

    async def second() -> None:
        with pytest.raises(BackendError, match=r"another event loop; make a new one"):
            await backend
        async with Session([backend]) as session:
            await session.submit_tasks([task])
            await session.wait_tasks([task], timeout=30)

    asyncio.run(second())
    assert isinstance(task.exception, BackendError)


# ---------------------------------------------------------------------- two sessions


async def test_two_sessions_each_hear_of_their_own_tasks() -> None:
    """One after the other on one backend; both at once is refused, not mixed up."""
    backend = ManualBackend()
    first, second = Session([backend]), Session([backend])
    parent, child = ComputeTask(function=noop), None
    child = ComputeTask(function=noop, after=[parent])
    await first.submit_tasks([parent, child])
    meanwhile = ComputeTask(function=noop)
    await second.submit_tasks([meanwhile])
    with pytest.raises(BackendError, match=f"still runs 1 tasks of {first.uid}"):
        await meanwhile
    backend.deliver(parent, "DONE")
    await backend.handed(2)
    backend.deliver(child, "DONE")
    await first.wait_tasks([parent, child], timeout=60)
    assert first.get_statistics()["counts"] == {"DONE": 2}
    later = ComputeTask(function=noop)
    await second.submit_tasks([later])
    backend.deliver(later, "DONE")
    await second.wait_tasks([later], timeout=60)
    assert second.get_statistics()["counts"] == {"FAILED": 1, "DONE": 1}
    again = ComputeTask(function=noop)
    await first.submit_tasks([again])
    backend.deliver(again, "DONE")
    await first.wait_tasks([again], timeout=60)
    assert first.get_statistics()["counts"] == {"DONE": 3}
    await first.close()
    await second.close()


async def test_a_backend_that_is_at_work_cannot_be_given_to_another_session() -> None:
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([ComputeTask(function=noop)])
        with pytest.raises(BackendError, match=f"still runs 1 tasks of {session.uid}"):
            Session([backend])
