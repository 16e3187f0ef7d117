"""The contract of a backend: what the base class does for every engine, and what it promises.

The backend of `thirdparty/starlight` is a package of its own that knows the base class only.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rhapsody
from functions import double, fail, noop
from manual import ManualBackend
from rhapsody.api import (
    ComputeTask,
    Resources,
    Session,
    TaskValidationError,
)
from rhapsody.backends import (
    BackendMainStates,
    BaseBackend,
    BaseExecutionBackend,
    ConcurrentExecutionBackend,
    NoopExecutionBackend,
    StateMapper,
    TasksMainStates,
)

THIRD_PARTY = Path(__file__).parents[1] / "thirdparty"


# ---------------------------------------------------------------------- a third party's backend


@pytest.fixture
def starlight(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BaseExecutionBackend]:
    """How its user gets it: by name, from a package that happens to be installed."""
    monkeypatch.syspath_prepend(THIRD_PARTY)

    def make(**kwargs: Any) -> BaseExecutionBackend:
        backend: BaseExecutionBackend = rhapsody.get_backend("starlight", **kwargs)
        return backend

    return make


async def test_a_third_partys_backend_runs_tasks(starlight: Callable[..., Any]) -> None:
    tasks = [ComputeTask(function=double, args=(n,)) for n in range(200)]
    failed = ComputeTask(function=fail)
    async with Session([starlight()]) as session:
        futures = await session.submit_tasks([*tasks, failed])
        assert await asyncio.gather(*futures[:-1]) == tasks
        with pytest.raises(KeyError):
            await failed
        assert session.get_statistics()["backends"] == {"starlight": {"DONE": 200, "FAILED": 1}}
    assert [task.return_value for task in tasks] == [2 * n for n in range(200)]


async def test_a_third_partys_backend_knows_parents_retries_and_timeouts(
    starlight: Callable[..., Any],
) -> None:
    runs: list[int] = []
    release = threading.Event()

    def flaky(value: int) -> int:
        runs.append(value)
        if len(runs) < 3:
            raise OSError
        return value

    parent = ComputeTask(function=double, args=(4,))
    child = ComputeTask(function=flaky, args=([parent],), retries=2)
    slow = ComputeTask(function=release.wait, timeout=0.05)
    try:
        async with Session([starlight()]) as session:
            await session.submit_tasks([child, parent, slow])
            assert (await child).return_value == [8]
            await session.wait_tasks([slow], timeout=60)
            release.set()
    finally:
        release.set()
    assert isinstance(slow.exception, rhapsody.TaskTimeoutError)
    assert not slow.exception.stopped


async def test_a_third_partys_backend_is_one_among_others(starlight: Callable[..., Any]) -> None:
    function = ComputeTask(function=double, args=(1,))
    executable = ComputeTask(executable="/bin/echo", arguments=[function])
    async with Session([starlight(), ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([function, executable])
        assert (await executable).stdout == "2\n"
    assert (function.backend, executable.backend) == ("starlight", "concurrent")


async def test_its_own_checks_are_asked_about_every_task(starlight: Callable[..., Any]) -> None:
    good = ComputeTask(function=double, args=(1,))
    bad: list[tuple[ComputeTask, str]] = [
        (ComputeTask(function=lambda: 1), "a star has a name"),
        (ComputeTask(function=lambda: 1, backend="starlight"), "a star has a name"),
        (ComputeTask(executable="x"), "runs function tasks only"),
        (
            ComputeTask(function=noop, task_backend_specific_kwargs={"range": 1}),
            "does not know 'range' in task_backend_specific_kwargs; accepted: distance",
        ),
    ]
    async with Session([starlight()]) as session:
        with pytest.raises(TaskValidationError) as caught:
            await session.submit_tasks([*(task for task, _ in bad), good])
        assert list(caught.value.errors) == [task.uid for task, _ in bad]
        for task, words in bad:
            assert words in caught.value.errors[task.uid]
        await good
        known = ComputeTask(function=noop, task_backend_specific_kwargs={"distance": 4.2})
        await session.submit_tasks([known])
        await known


async def test_a_check_that_raises_refuses_its_task_only() -> None:
    class Careless(ManualBackend):
        def _check(self, task: Any, options: Any) -> None:
            raise LookupError(options["colour"])

    good = ComputeTask(function=double)
    bad = ComputeTask(function=double, task_backend_specific_kwargs={"colour": "red"})
    backend = ManualBackend("good")
    bad.backend = "careless"
    async with Session([backend, Careless("careless")]) as session:
        with pytest.raises(TaskValidationError, match="LookupError: red") as caught:
            await session.submit_tasks([good, bad])
        assert set(caught.value.errors) == {bad.uid}
        assert await backend.handed(1) == [good]


async def test_its_tasks_can_be_canceled_as_far_as_it_can(starlight: Callable[..., Any]) -> None:
    begun, release = threading.Event(), threading.Event()

    def watch() -> None:
        begun.set()
        release.wait()

    running, queued = ComputeTask(function=watch), ComputeTask(function=noop)
    try:
        async with Session([starlight(telescopes=1)]) as session:
            await session.submit_tasks([running, queued])
            await asyncio.to_thread(begun.wait)
            assert await session.cancel(queued) is True
            assert await session.cancel(running) is False
            release.set()
            await running
    finally:
        release.set()
    assert (running.state, queued.state) == ("DONE", "CANCELED")


async def test_its_tasks_end_with_the_session(starlight: Callable[..., Any]) -> None:
    session = Session([starlight(telescopes=1)])
    futures = await session.submit_tasks([ComputeTask(function=noop) for _ in range(500)])
    await session.close()
    assert all(future.done() for future in futures)


# ---------------------------------------------------------------------- without a session


async def test_frameworks_drive_a_backend_directly() -> None:
    """Plain dicts in, callbacks out; results are written into the dicts."""
    heard: list[tuple[str, str]] = []
    ended = asyncio.Event()
    tasks: list[dict[str, Any]] = [
        {"uid": "f", "function": double, "args": [4], "kwargs": {}},
        {"uid": "g", "function": fail, "args": [], "kwargs": {}},
        {"uid": "e", "executable": "/bin/echo", "arguments": ["hi"]},
        {"uid": "x", "executable": "/bin/sh", "arguments": ["-c", "echo no >&2; exit 4"]},
    ]

    def callback(task: dict[str, Any], state: str) -> None:
        heard.append((task["uid"], state))
        assert state in ("RUNNING", task["state"])  # a burst is taken in before it is told
        if sum(state != "RUNNING" for _, state in heard) == len(tasks):
            ended.set()

    async with ConcurrentExecutionBackend() as backend:
        backend.register_callback(callback)
        await backend.submit_tasks(tasks)
        await ended.wait()
    f, g, e, x = tasks
    assert (f["state"], f["return_value"], f["stdout"], f["exit_code"]) == ("DONE", 8, "8", 0)
    assert (g["state"], g["exit_code"]) == ("FAILED", 1)
    assert isinstance(g["exception"], KeyError)
    assert (e["state"], e["stdout"], e["exit_code"]) == ("DONE", "hi\n", 0)
    assert (x["state"], x["stderr"], x["exit_code"]) == ("FAILED", "no\n", 4)
    assert isinstance(x["exception"], rhapsody.TaskExecutionError)
    assert sorted(heard) == [
        ("e", "DONE"), ("e", "RUNNING"), ("f", "DONE"), ("f", "RUNNING"),
        ("g", "FAILED"), ("g", "RUNNING"), ("x", "FAILED"), ("x", "RUNNING"),
    ]  # fmt: skip


class Unspeakable:
    def __str__(self) -> str:
        raise LookupError("no words")


class Stone(ComputeTask):
    def update(self, *args: Any, **kwargs: Any) -> None:
        raise PermissionError("written in stone")


async def test_a_task_that_takes_no_results_harms_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks: list[Any] = [
        {"uid": "silent", "function": double},
        Stone(function=double, uid="stone"),
        {"uid": "other", "function": double},
    ]
    async with ManualBackend() as backend:
        await backend.submit_tasks(tasks)
        value = Unspeakable()
        backend.deliver_burst([(task, "DONE", {"return_value": value}) for task in tasks])
        await backend.heard()
    assert tasks[0]["stdout"] == "<Unspeakable whose str raises LookupError>"
    assert tasks[2]["state"] == "DONE"
    assert "task 'stone' cannot be written to" in caplog.text


async def test_tasks_of_an_unknown_uid_are_not_canceled() -> None:
    for backend in (NoopExecutionBackend(), ConcurrentExecutionBackend(), ManualBackend()):
        async with backend:
            assert await backend.cancel_task("nobody") is False


async def test_cancel_all_says_how_many_were_stopped() -> None:
    async with ManualBackend() as backend:
        await backend.submit_tasks([ComputeTask(function=noop) for _ in range(5)])
        assert await backend.cancel_all_tasks() == 5
        assert await backend.cancel_all_tasks() == 0
    async with ManualBackend(stoppable=False) as backend:
        await backend.submit_tasks([ComputeTask(function=noop) for _ in range(5)])
        assert await backend.cancel_all_tasks() == 0


async def test_a_uid_is_with_a_backend_once() -> None:
    async with ManualBackend() as backend:
        first, same = {"uid": "t", "function": noop}, {"uid": "t", "function": noop}
        for again in ([first, first], [first, same]):
            with pytest.raises(TaskValidationError, match="'t' is already with backend 'manual'"):
                await backend.submit_tasks(again)
            assert backend.given == []  # none of them was handed over
        await backend.submit_tasks([first])
        for task in (first, same):
            with pytest.raises(TaskValidationError, match="already with"):
                await backend.submit_tasks([{"uid": "other", "function": noop}, task])
        assert backend.given == [first]
        backend.deliver(first, "DONE")
        await backend.heard()
        assert first["state"] == "DONE"
        await backend.submit_tasks([same])  # the uid is free again


async def test_one_bad_task_and_none_is_handed_over() -> None:
    async with ManualBackend() as backend:
        good, bad = ComputeTask(function=noop), {"uid": "b", "function": noop}
        bad["task_backend_specific_kwargs"] = {"wrong": 1}
        with pytest.raises(TaskValidationError, match="'wrong'"):
            await backend.submit_tasks([good, bad])
        assert backend.given == []
        await backend.submit_tasks([good])
        assert backend.given == [good]


def test_build_task_checks_what_it_builds() -> None:
    backend = ManualBackend()
    task = backend.build_task("t", {"function": noop, "args": (1,)}, {"speed": 3})
    assert task["uid"] == "t"
    assert task["function"] is noop
    assert task["task_backend_specific_kwargs"] == {"speed": 3}
    with pytest.raises(TaskValidationError, match="'warp'"):
        backend.build_task("t", {"function": noop}, {"warp": 9})


def test_links_make_files_visible(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    (there / "out.txt").write_text("result")
    options = "task_backend_specific_kwargs"
    source = {"uid": "s", "executable": "x", options: {"cwd": there}, "output_files": ["out.txt"]}
    target = {"uid": "t", "executable": "x", options: {"cwd": here}}
    backend = ConcurrentExecutionBackend()
    link = backend.link_explicit_data_deps(src_task=source, dst_task=target, file_name="out.txt")
    assert link["target"] == str(here / "out.txt")
    assert (here / "out.txt").read_text() == "result"
    assert backend.link_implicit_data_deps(source, target)["target"] == [str(here / "out.txt")]
    link = backend.link_explicit_data_deps(
        dst_task=target, file_path=str(there / "out.txt"), file_name="other.txt"
    )
    assert Path(link["target"]).read_text() == "result"
    with pytest.raises(TaskValidationError, match="needs a file_path"):
        backend.link_explicit_data_deps(dst_task=target, file_name="x")


def test_links_are_where_the_resources_say(tmp_path: Path) -> None:
    backend = ConcurrentExecutionBackend()
    places = [str(tmp_path / name) for name in ("one", "two")]
    one, two = (
        ComputeTask(executable="x", output_files=["o"], resources=Resources(cwd=place))
        for place in places
    )
    made = backend.link_explicit_data_deps(one, two, "o")
    assert made == {"source": f"{places[0]}/o", "target": f"{places[1]}/o"}
    assert os.readlink(made["target"]) == made["source"]
    assert backend.link_implicit_data_deps(one, two) == {"target": [made["target"]]}


def test_a_link_points_to_what_is_said_of_it(tmp_path: Path) -> None:
    """One made before is replaced; what is not ours is left alone, and said to be in the way."""
    backend = ConcurrentExecutionBackend()

    def task(name: str) -> dict[str, Any]:
        return {"uid": name, "task_backend_specific_kwargs": {"cwd": str(tmp_path / name)}}

    first, second, reader = task("first"), task("second"), task("reader")
    for producer in (first, second, second):
        made = backend.link_explicit_data_deps(producer, reader, "o")
        assert os.readlink(made["target"]) == made["source"]
    os.unlink(made["target"])
    os.symlink("/somewhere/else", made["target"])
    (tmp_path / "reader" / "p").write_text("mine")
    for name in ("o", "p"):
        with pytest.raises(TaskValidationError, match=f"reader/{name}' exists, and is not a link"):
            backend.link_explicit_data_deps(first, reader, name)
    assert (tmp_path / "reader" / "p").read_text() == "mine"


def test_what_else_frameworks_find_on_a_backend() -> None:
    backend = ManualBackend()
    assert BaseBackend is BaseExecutionBackend
    assert backend.get_task_states_map().terminal_states == {"DONE", "FAILED", "CANCELED"}
    for name in (
        "submit_tasks",
        "cancel_task",
        "cancel_all_tasks",
        "register_callback",
        "shutdown",
    ):
        assert callable(getattr(backend, name))
    with pytest.raises(TypeError, match="callable"):
        backend.register_callback("no function")  # type: ignore[arg-type]


async def test_task_state_cb_is_deliver() -> None:
    async with ManualBackend() as backend:
        task: dict[str, Any] = {"uid": "t", "function": noop}
        await backend.submit_tasks([task])
        backend.task_state_cb(task, "DONE")
        await backend.heard()
        assert task["state"] == "DONE"


def test_states_are_their_names_and_map() -> None:
    assert TasksMainStates.DONE == "DONE"
    assert f"{TasksMainStates.FAILED} {BackendMainStates.RUNNING!s}" == "FAILED RUNNING"
    assert [*TasksMainStates] == [
        "NEW", "WAITING", "SUBMITTED", "RUNNING", "DONE", "FAILED", "CANCELED",
    ]  # fmt: skip
    mapper = StateMapper({"finished": "DONE", 7: "FAILED"})
    states = {"finished": "DONE", 7: "FAILED", "RUNNING": "RUNNING", TasksMainStates.NEW: "NEW"}
    assert {state: mapper.to_main_state(state) for state in states} == states
    assert (mapper.DONE, mapper.RUNNING) == ("DONE", "RUNNING")
    with pytest.raises(ValueError, match="unknown task state 'gone'; known: finished, 7, NEW"):
        mapper.to_main_state("gone")
    with pytest.raises(ValueError, match="ENDED"):
        StateMapper({"x": "ENDED"})


# ---------------------------------------------------------------------- folders


async def test_a_backend_without_a_session_works_in_the_current_folder(tmp_path: Path) -> None:
    assert ManualBackend().work_dir == os.getcwd() == str(tmp_path)


async def test_a_session_lends_its_folder(tmp_path: Path) -> None:
    backend = ManualBackend()
    async with Session([backend], work_dir=tmp_path, uid="s"):
        assert not (tmp_path / "s").exists()
        assert backend.work_dir == str(tmp_path / "s")
        assert backend.is_attached
        assert backend.attached_to == ["s"]


# ---------------------------------------------------------------------- resources


async def test_a_backend_says_what_it_lacks() -> None:
    async with Session([ConcurrentExecutionBackend()]) as session:
        wanted = [
            Resources(cores_per_rank=100_000),
            Resources(gpus_per_rank=100),
            Resources(memory_per_rank="1000TiB"),
        ]
        for need in wanted:
            with pytest.raises(rhapsody.ResourceError):
                await session.submit_tasks([ComputeTask(executable="x", resources=need)])
