"""The contract of a backend: what the base class does for every engine, and what it promises.

The backend of `thirdparty/starlight` is a package of its own that knows the base class only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import rhapsody
from functions import double, fail, noop
from manual import ManualBackend
from rhapsody.api import (
    BackendError,
    ComputeTask,
    DependencyError,
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


# ---------------------------------------------------------------------- lifecycle


@pytest.mark.parametrize("make", [NoopExecutionBackend, ConcurrentExecutionBackend, ManualBackend])
async def test_the_ways_to_start_a_backend(make: Callable[..., BaseExecutionBackend]) -> None:
    backend = make(name="mine")
    assert (backend.name, backend.state()) == ("mine", "INITIALIZED")
    assert await backend is backend
    assert backend.state() == "RUNNING"
    assert await backend is backend
    await backend.shutdown()
    await backend.shutdown()
    assert backend.state() == "SHUTDOWN"

    async with make() as backend:
        assert backend.state() == "RUNNING"
    assert backend.state() == "SHUTDOWN"

    one, other = await asyncio.gather(make(name="one"), make(name="other"))
    assert (one.state(), other.state()) == ("RUNNING", "RUNNING")
    await asyncio.gather(one.shutdown(), other.shutdown())

    never = make()
    await never.shutdown()
    assert never.state() == "SHUTDOWN"


@pytest.mark.parametrize("cls", [NoopExecutionBackend, ConcurrentExecutionBackend, ManualBackend])
async def test_create_gives_a_started_backend(cls: type[BaseExecutionBackend]) -> None:
    backend = await cls.create(name="made")
    assert (type(backend), backend.name, backend.state()) == (cls, "made", "RUNNING")
    await backend.shutdown()


@pytest.mark.parametrize("cls", [NoopExecutionBackend, ConcurrentExecutionBackend, ManualBackend])
async def test_a_backend_that_is_down_stays_down(cls: type[BaseExecutionBackend]) -> None:
    backend = await cls.create()
    await backend.shutdown()
    with pytest.raises(BackendError, match="is shut down") as caught:
        await backend
    assert caught.value.backend == backend.name
    with pytest.raises(BackendError, match="is shut down"):
        await backend.submit_tasks([ComputeTask(function=noop)])
    assert await backend.cancel_task("task") is False
    assert await backend.cancel_all_tasks() == 0


async def test_a_backend_shuts_down_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError):
        async with ManualBackend() as backend:
            raise ZeroDivisionError
    assert backend.stops == 1


async def test_a_canceled_start_is_begun_once() -> None:
    class Slow(ManualBackend):
        def __init__(self) -> None:
            super().__init__()
            self.may_start = asyncio.Event()

        async def _start(self) -> None:
            await super()._start()
            await self.may_start.wait()

    backend = Slow()

    async def start() -> None:
        await backend

    impatient = asyncio.create_task(start())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    backend.may_start.set()
    await backend
    assert (backend.starts, backend.state()) == (1, "RUNNING")
    await backend.shutdown()


async def test_shutdown_settles_what_an_engine_leaves_behind() -> None:
    backend = await ManualBackend()
    heard: list[tuple[str, str]] = []
    backend.register_callback(lambda task, state: heard.append((task["uid"], state)))
    tasks: list[dict[str, Any]] = [{"uid": uid, "function": noop} for uid in "ab"]
    await backend.submit_tasks(tasks)
    backend.deliver(tasks[0], "DONE")  # reported, not yet taken in
    await backend.shutdown()
    assert heard == [("a", "DONE"), ("b", "FAILED")]
    assert isinstance(tasks[1]["exception"], BackendError)
    backend.deliver(tasks[1], "DONE")
    await backend.heard()
    assert (tasks[1]["state"], backend.dropped_events) == ("FAILED", 1)


@pytest.mark.parametrize(
    "given",
    [
        {"executor": 5},
        {"executor": ProcessPoolExecutor},
        {"slots": 0},
        {"slots": -1},
        {"slots": True},
        {"slots": 1.0},
        {"slots": "2"},
        {"grace": "x"},
        {"grace": None},
        {"grace": True},
        {"grace": -1},
        {"grace": float("nan")},
        {"grace": float("inf")},
        {"name": None},
        {"name": ""},
        {"name": 5},
    ],
)
def test_the_local_backend_refuses_what_it_cannot_use(given: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match="must be"):
        ConcurrentExecutionBackend(**given)


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


# ---------------------------------------------------------------------- callbacks


async def test_a_callback_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def callback(task: Any, state: str) -> None:
        heard.append(task["uid"])
        raise RuntimeError("a bug of the callback's author")

    tasks = [ComputeTask(function=noop, uid=f"t{n}") for n in range(5)]
    backend = ManualBackend()
    backend.register_callback(callback)
    async with Session([backend]) as session:
        await session.submit_tasks(tasks)
        with caplog.at_level(logging.ERROR, "rhapsody"):
            backend.deliver_burst([(task, "DONE", None) for task in tasks])
            await session.wait_tasks(tasks)
            await backend.heard()
    assert heard == [task.uid for task in tasks]
    assert {task.state for task in tasks} == {"DONE"}
    for task in tasks:
        assert f"callback of backend 'manual' failed for {task.uid}" in caplog.text
    assert "a bug of the callback's author" in caplog.text


async def test_a_callback_is_called_after_the_task_has_its_results() -> None:
    seen: list[tuple[str, Any]] = []
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    backend.register_callback(lambda task, state: seen.append((task.state, task.return_value)))
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        await backend.heard()
        backend.deliver(task, "DONE", return_value=3)
        await task
    assert seen == [("RUNNING", None), ("DONE", 3)]


async def test_a_later_callback_takes_the_place_of_an_earlier() -> None:
    heard: list[str] = []
    async with ManualBackend() as backend:
        backend.register_callback(lambda task, state: heard.append("first"))
        backend.register_callback(lambda task, state: heard.append("second"))
        task = {"uid": "t", "function": noop}
        await backend.submit_tasks([task])
        backend.deliver(task, "DONE")
        await backend.heard()
    assert heard == ["second"]


# ---------------------------------------------------------------------- delivery


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often other threads wake it."""

    def __init__(self) -> None:
        super().__init__()
        self.wakes = 0

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.wakes += threading.current_thread() is not threading.main_thread()
        return super().call_soon_threadsafe(*args, **kwargs)


def in_threads(number: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_burst_from_many_threads_wakes_the_loop_once() -> None:
    async def main() -> None:
        tasks = [ComputeTask(function=noop) for _ in range(8000)]
        backend = ManualBackend()
        async with Session([backend]) as session:
            await session.submit_tasks(tasks)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, CountingLoop)
            loop.wakes = 0

            def report(number: int) -> None:
                for task in tasks[number::8]:
                    backend.deliver(task, "RUNNING")
                    backend.deliver(task, "DONE", return_value=number)

            in_threads(8, report)  # the loop stands still meanwhile
            # One, and where two threads come first at the same instant, one for each of these.
            assert 1 <= loop.wakes <= 8
            await session.wait_tasks(tasks, timeout=60)
            assert session.get_statistics()["counts"] == {"DONE": 8000}
        assert [task.return_value for task in tasks] == [n % 8 for n in range(8000)]
        assert backend.dropped_events == 0

    loop = CountingLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_a_burst_of_any_size_costs_one_wake() -> None:
    async def main() -> None:
        tasks = [ComputeTask(function=noop) for _ in range(5000)]
        backend = ManualBackend()
        async with Session([backend]) as session:
            await session.submit_tasks(tasks)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, CountingLoop)
            loop.wakes = 0
            burst = [(task, "DONE", None) for task in tasks]
            in_threads(1, lambda _: backend.deliver_burst(burst))
            assert loop.wakes == 1
            await session.wait_tasks(tasks)
            assert loop.wakes == 1

    loop = CountingLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


async def test_delivery_while_the_loop_is_at_work_loses_nothing() -> None:
    """Threads report while the loop takes in: no event is lost between two wakes."""
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        tasks = [ComputeTask(function=noop) for _ in range(6000)]
        backend = ManualBackend()
        async with Session([backend]) as session:
            await session.submit_tasks(tasks)

            def report(number: int) -> None:
                for task in tasks[number::6]:
                    backend.deliver(task, "RUNNING")
                    backend.deliver(task, "DONE")

            await asyncio.gather(*(asyncio.to_thread(report, n) for n in range(6)))
            await session.wait_tasks(tasks, timeout=60)
            assert session.get_statistics()["counts"] == {"DONE": 6000}
        assert (backend.dropped_events, session.dropped_events) == (0, 0)
    finally:
        sys.setswitchinterval(old)


async def test_a_large_burst_leaves_the_loop_to_others_in_between() -> None:
    tasks = [ComputeTask(function=noop) for _ in range(50_000)]
    backend = ManualBackend()
    turns = 0

    def turn() -> None:
        nonlocal turns
        if not tasks[-1].done():
            turns += 1
            asyncio.get_running_loop().call_soon(turn)

    async with Session([backend]) as session:
        await session.submit_tasks(tasks)
        backend.deliver_burst([(task, "DONE", None) for task in tasks])
        turn()
        await session.wait_tasks(tasks)
    assert turns >= 20


async def test_events_of_one_task_keep_their_order() -> None:
    heard: list[str] = []
    task = {"uid": "t", "function": noop}
    async with ManualBackend() as backend:
        backend.register_callback(lambda task, state: heard.append(state))
        await backend.submit_tasks([task])
        backend.deliver_burst([(task, "RUNNING", None), ("t", "DONE", {"return_value": 1})])
        await backend.heard()
    assert heard == ["RUNNING", "DONE"]


async def test_events_by_uid() -> None:
    task = ComputeTask(function=noop, uid="t")
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver("t", "RUNNING")
        backend.deliver("t", "DONE", return_value=5)
        assert (await task).return_value == 5


async def test_late_duplicate_and_unknown_events_are_dropped_and_counted() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    heard: list[str] = []
    backend.register_callback(lambda task, state: heard.append(state))
    async with Session([backend]) as session:
        (future,) = await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        backend.deliver(task, "DONE", return_value="first")
        backend.deliver(task, "DONE", return_value="second")  # duplicate
        backend.deliver(task, "FAILED", exception=KeyError())  # contradicts
        backend.deliver(task, "RUNNING")  # late
        backend.deliver("nobody", "DONE")  # unknown
        backend.deliver(ComputeTask(function=noop), "DONE")  # never submitted
        await backend.heard()
        assert await future is task
        assert session.get_statistics()["counts"] == {"DONE": 1}
    assert (task.state, task.return_value, task.exception) == ("DONE", "first", None)
    assert backend.dropped_events == 5
    assert heard == ["RUNNING", "DONE"]


async def test_a_second_running_is_dropped_and_counted() -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        for _ in range(3):
            backend.deliver(task, "RUNNING")
        await backend.heard()
        assert session.get_statistics()["counts"] == {"RUNNING": 1}
        assert session.dropped_events + backend.dropped_events == 2
        backend.deliver(task, "DONE")
        await task


@pytest.mark.parametrize("state", ["NEW", "WAITING", "SUBMITTED", "DANCING", ""])
async def test_states_that_a_running_task_cannot_take_are_dropped(state: str) -> None:
    task = ComputeTask(function=noop)
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        backend.deliver(task, "RUNNING")
        backend.deliver(task, state)
        await backend.heard()
        assert task.state == "RUNNING"
        assert session.dropped_events + backend.dropped_events == 1
        backend.deliver(task, "DONE")
        await task


async def test_a_copy_of_a_task_stands_for_the_task() -> None:
    """As engines have it that send tasks away and get them back."""
    tasks = [ComputeTask(function=noop, uid=f"t{n}") for n in range(3)]
    copies = [ComputeTask(function=noop, uid=f"t{n}") for n in range(3)]
    backend = ManualBackend()
    async with Session([backend]) as session:
        futures = await session.submit_tasks(tasks)
        backend.deliver(copies[0], "DONE", return_value=1)
        backend.deliver_all(copies[1:], "DONE")
        await session.wait_tasks(tasks, timeout=60)
        assert await asyncio.gather(*futures) == tasks
    assert tasks[0].return_value == 1
    assert {copy.state for copy in copies} == {"NEW"}


async def test_an_engine_that_reports_too_early_and_then_rightly() -> None:
    backend = ManualBackend()
    task = ComputeTask(function=noop)
    with pytest.raises(BackendError, match="reports before it is started"):
        backend.deliver(task, "DONE")
    assert backend.dropped_events == 1
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        assert task.state == "SUBMITTED"
        backend.deliver(task, "DONE")
        await session.wait_tasks([task], timeout=60)
    assert backend.dropped_events == 1


def test_an_engine_that_reports_when_the_loop_is_gone() -> None:
    backend = ManualBackend()
    task = ComputeTask(function=noop)

    async def main() -> None:
        await backend
        await backend.submit_tasks([task])

    asyncio.run(main())
    for number in range(1, 4):
        backend.deliver(task, "DONE")
        assert backend.dropped_events == number


async def test_results_in_an_event_of_an_engine_that_raised_are_not_believed() -> None:
    class Confused(ManualBackend):
        async def _submit(self, tasks: list[Any]) -> None:
            self.deliver(tasks[0], "DONE", return_value="done?")
            raise OSError("or not")

    tasks = [ComputeTask(function=noop) for _ in range(2)]
    backend = Confused()
    async with Session([backend]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=60)
        await backend.heard()
        assert session.get_statistics()["counts"] == {"FAILED": 2}
    assert backend.dropped_events == 1
    assert tasks[0].return_value is None


# ---------------------------------------------------------------------- engines with a graph


class Knowing(ManualBackend):
    native_dependencies = True


async def test_an_engine_that_knows_dependencies_gets_children_at_once() -> None:
    backend = Knowing()
    parent = ComputeTask(function=noop)
    child = ComputeTask(function=double, args=(parent,))
    async with Session([backend, ConcurrentExecutionBackend()]) as session:
        elsewhere = ComputeTask(function=double, args=(parent,), backend="concurrent")
        await session.submit_tasks([parent, child, elsewhere])
        assert backend.given == [parent, child]
        assert (child.state, elsewhere.state) == ("SUBMITTED", "WAITING")
        assert backend.inputs_of(child) == ((parent,), {})  # for the engine to resolve
        backend.deliver_burst([(parent, "DONE", {"return_value": 2}), (child, "DONE", None)])
        await session.wait_tasks([child, elsewhere])
        assert elsewhere.return_value == 4
        later = ComputeTask(function=double, args=(parent,))
        await session.submit_tasks([later])
        assert backend.inputs_of(later) == ((2,), {})
        backend.deliver(later, "DONE")
        await later


async def test_a_parent_with_retries_is_waited_for_here() -> None:
    """The engine would not know that its first failure is not its last word."""
    backend = Knowing()
    parent = ComputeTask(function=noop, retries=1)
    child = ComputeTask(function=double, args=(parent,))
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child])
        backend.deliver(parent, "FAILED", exception=OSError())
        await backend.handed(2)
        assert backend.given == [parent, parent]
        backend.deliver(parent, "DONE", return_value=1)
        await backend.handed(3)
        backend.deliver(child, "DONE")
        await child


async def test_a_failed_parent_of_a_knowing_engine() -> None:
    backend = Knowing()
    parent = ComputeTask(function=noop)
    child = ComputeTask(function=double, args=(parent,), retries=3)
    async with Session([backend]) as session:
        await session.submit_tasks([parent, child])
        cause = KeyError("x")
        backend.deliver(parent, "FAILED", exception=cause)
        backend.deliver(child, "FAILED", exception=DependencyError(child.uid, parent.uid, cause))
        await session.wait_tasks([child])
        assert len(backend.given) == 2
    assert isinstance(child.exception, DependencyError)


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
