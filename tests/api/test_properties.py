"""Properties: whatever engines report and authors ask for, in whatever order.

The state machine drives a session against an engine that says anything at any time, next to a
model of what must come of it. Time is the test's own: a timeout is a step, not a wait.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import os
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from functions import noop
from manual import ManualBackend
from rhapsody.api import (
    AITask,
    BackendError,
    BaseTask,
    ComputeTask,
    DependencyError,
    Resources,
    RhapsodyError,
    Session,
    SessionError,
    TaskTimeoutError,
    TaskValidationError,
)
from rhapsody.backends import BaseExecutionBackend, ConcurrentExecutionBackend

# The same examples in every run; more of them, and others, with EXAMPLES=5000 or so.
EXAMPLES = int(os.environ.get("EXAMPLES", "0"))
settings.register_profile(
    "tests",
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")

TERMINAL = ("DONE", "FAILED", "CANCELED")
ORDER = {"NEW": 0, "WAITING": 1, "SUBMITTED": 2, "RUNNING": 3, **dict.fromkeys(TERMINAL, 4)}


class TestsTime(asyncio.SelectorEventLoop):
    """A loop whose clock the test moves."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now


class Adversary(ManualBackend):
    """An engine that answers as it likes when it is told to stop a task."""

    answer = "confirm"

    def __init__(self) -> None:
        super().__init__("adversary")
        self.refuses = 0  # how many more submits it raises for
        self.reported = 0

    def deliver_burst(self, events: Any) -> None:
        events = list(events)
        self.reported += len(events)
        super().deliver_burst(events)

    async def _submit(self, tasks: list[Any]) -> None:
        if self.refuses:
            self.refuses -= 1
            raise OSError("the engine is full")
        await super()._submit(tasks)

    async def _cancel(self, task: Any) -> bool:
        self.asked_to_stop.append(task["uid"])
        if self.answer == "raise":
            raise OSError("the engine does not answer")
        if self.answer != "refuse":
            self.deliver(
                task, {"confirm": "CANCELED", "done": "DONE", "failed": "FAILED"}[self.answer]
            )
        return self.answer == "confirm"


class Model:
    """What must be true of one task."""

    def __init__(self, task: ComputeTask, parents: list[Model], timeout: float | None) -> None:
        self.task = task
        self.parents = parents
        self.children: list[Model] = []
        for parent in dict.fromkeys(parents):
            parent.children.append(self)
        self.retries = task.retries
        self.timeout = timeout
        self.expires: float | None = None
        self.state = "NEW"
        self.live = False  # with the engine, as far as the base class knows
        self.attempts = 0
        self.forgotten = False
        self.gave_up = False  # its future was canceled by its author
        self.future: asyncio.Future[Any] | None = None
        self.error: type[BaseException] | None = None
        self.value: Any = None


PLACES = st.integers(0, 40)
ANSWERS = st.sampled_from(["confirm", "refuse", "raise", "done", "failed"])


class Sessions(RuleBasedStateMachine):
    @initialize(number=st.integers(1, 4), data=st.data())
    def begin(self, number: int, data: st.DataObject) -> None:
        self.loop = TestsTime()
        self.engine = Adversary()
        self.session = Session([self.engine])
        self.models: dict[str, Model] = {}
        self.heard = 0
        self.strangers = 0
        self.engine.register_callback(self._hear)
        self.seen: dict[str, str] = {}
        self.run(self._start())
        self.submit(number, data, [])

    def _hear(self, task: Any, state: str) -> None:
        self.heard += 1

    async def _start(self) -> None:
        await self.engine

    def the(self, place: int) -> Model:
        """One of the tasks so far, the latest first."""
        models = list(self.models.values())
        return models[-1 - place % len(models)]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def all_of_it() -> Any:
            try:
                return await work
            finally:
                await self.engine.heard()

        return self.loop.run_until_complete(all_of_it())

    # ------------------------------------------------------------------ the model

    def dispatch(self, model: Model) -> None:
        """The session gives the task to the engine, which may refuse it."""
        model.attempts += 1
        if self.refusing:
            self.end(model, "FAILED", BackendError)
            return
        model.live = True

    def end(
        self, model: Model, state: str, error: type[BaseException] | None, stopped: bool = True
    ) -> None:
        """An attempt has ended."""
        model.live = False
        model.expires = None
        if state == "FAILED" and model.retries and error is not DependencyError and stopped:
            model.retries -= 1
            self.again.append(model)
            return
        model.state = state
        model.error = error
        for child in model.children:
            if child.state == "WAITING" and all(p.state in TERMINAL for p in child.parents):
                self.release(child)

    def release(self, model: Model) -> None:
        if any(parent.state != "DONE" for parent in model.parents):
            self.end(model, "FAILED", DependencyError)
        else:
            model.state = "SUBMITTED"
            self.again.append(model)

    def event(self, model: Model, state: str, value: Any = None) -> None:
        """The engine has said something of a task, and the base class has let it pass."""
        if not model.live:
            return
        if state == "RUNNING":
            if model.expires is None and model.timeout is not None:
                model.expires = self.loop.now + model.timeout
            model.state = "RUNNING"
        elif state in TERMINAL:
            if state == "DONE":
                model.value = value
            self.end(model, state, OSError if state == "FAILED" else None)

    def settle(self) -> None:
        """What is to be handed over, is: as often as engines that refuse and retries have it."""
        while self.again:
            ready, self.again = self.again, []
            self.refusing = self.refuse_next > 0
            self.refuse_next -= self.refusing
            for model in ready:
                self.dispatch(model)
        self.refusing = False

    again: list[Model] = []  # noqa: RUF012 - replaced, never changed
    refusing = False
    refuse_next = 0

    # ------------------------------------------------------------------ what happens

    @rule(number=st.integers(1, 4), data=st.data(), parents=st.lists(PLACES, max_size=3))
    def submit(self, number: int, data: st.DataObject, parents: list[int]) -> None:
        batch: list[Model] = []
        for _ in range(number):
            above = [self.the(place) for place in parents]
            linked: bool = data.draw(st.booleans(), "hangs on the one before")
            if batch and linked:
                above.append(batch[-1])
            timeout = data.draw(st.sampled_from([None, None, 10.0]), "timeout")
            split = data.draw(st.integers(0, len(above)), "as arguments")
            task = ComputeTask(
                function=noop,
                retries=data.draw(st.integers(0, 2), "retries"),
                timeout=timeout,
                args=tuple(model.task for model in above[:split]),
                after=[model.task for model in above[split:]],
            )
            batch.append(Model(task, above, timeout))
        self.models |= {model.task.uid: model for model in batch}
        self.again = []
        for model in batch:
            if not model.parents:
                model.state = "SUBMITTED"
                self.again.append(model)
        self.settle()
        for model in batch:
            if model.parents and model.state == "NEW":
                if all(parent.state in TERMINAL for parent in model.parents):
                    self.release(model)
                else:
                    model.state = "WAITING"
        self.settle()
        futures = self.run(self.session.submit_tasks([model.task for model in batch]))
        for model, future in zip(batch, futures, strict=True):
            model.future = future

    @rule(
        events=st.lists(
            st.tuples(
                PLACES,
                st.sampled_from(["RUNNING", "RUNNING", *TERMINAL, "WAITING", "DANCING"]),
                st.sampled_from(["task", "uid", "copy"]),
            ),
            min_size=1,
            max_size=6,
        )
    )
    def report(self, events: list[tuple[int, str, str]]) -> None:
        burst: list[tuple[Any, str, dict[str, Any] | None]] = []
        self.again = []
        for number, (place, state, manner) in enumerate(events):
            model = self.the(place)
            uid = model.task.uid
            copy = ComputeTask(function=noop, uid=uid)
            who: Any = {"task": model.task, "uid": uid, "copy": copy}[manner]
            fields: dict[str, dict[str, Any]] = {
                "DONE": {"return_value": number},
                "FAILED": {"exception": OSError(number)},
            }
            burst.append((who, state, fields.get(state)))
            self.event(model, state, number)
        self.settle()

        async def tell() -> None:
            self.engine.deliver_burst(burst)

        self.run(tell())

    @rule(state=st.sampled_from(["RUNNING", *TERMINAL]))
    def report_of_a_stranger(self, state: str) -> None:
        async def tell() -> None:
            self.engine.deliver("nobody", state)
            self.engine.deliver(ComputeTask(function=noop), state)

        self.run(tell())
        self.strangers += 2

    @rule(place=PLACES, answer=ANSWERS)
    def cancel(self, place: int, answer: str) -> None:
        model = self.the(place)
        if model.forgotten:
            with pytest.raises(SessionError):
                self.run(self.session.cancel(model.task))
            return
        self.again = []
        self.engine.answer = answer
        fails = answer == "raise" and model.live
        if model.state == "WAITING":
            self.end(model, "CANCELED", None)
        elif model.live and answer in ("confirm", "done", "failed"):
            model.retries = 0  # what the author wants stopped is not run again
            state = {"confirm": "CANCELED", "done": "DONE", "failed": "FAILED"}[answer]
            self.end(model, state, None)
        canceled = model.state == "CANCELED"
        was = model.task.state
        self.settle()
        if fails:
            with pytest.raises(OSError, match="does not answer"):
                self.run(self.session.cancel(model.task))
        else:
            stopped = self.run(self.session.cancel(model.task))
            assert stopped == (canceled and was not in TERMINAL)
            assert not stopped or model.task.state == "CANCELED"

    @rule(answer=ANSWERS, seconds=st.sampled_from([6.0, 11.0]))
    def time_passes(self, answer: str, seconds: float) -> None:
        self.engine.answer = answer
        self.loop.now += seconds
        self.again = []
        late = [m for m in self.models.values() if m.expires and m.expires <= self.loop.now]
        for model in late:
            if answer == "done":
                self.end(model, "DONE", None)
            elif answer == "failed":
                self.end(model, "FAILED", None)
            else:
                self.end(model, "FAILED", TaskTimeoutError, stopped=answer == "confirm")
        self.settle()

        async def wait() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        self.run(wait())

    @rule(place=PLACES)
    def give_up_on_the_future(self, place: int) -> None:
        model = self.the(place)
        assert model.future is not None
        if model.future.cancel():
            model.gave_up = True

    @rule(number=st.integers(1, 2))
    def the_engine_is_full(self, number: int) -> None:
        self.engine.refuses = self.refuse_next = number

    @rule(place=PLACES)
    def forget(self, place: int) -> None:
        model = self.the(place)
        if model.state in TERMINAL and not model.forgotten:
            self.session.forget([model.task])
            model.forgotten = True
        else:
            with pytest.raises(SessionError):
                self.session.forget([model.task])

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def tasks_are_what_the_model_says(self) -> None:
        for uid, model in self.models.items():
            task = model.task
            assert task.state == model.state, uid
            assert self.engine.given.count(task) <= model.attempts
            if model.state == "DONE":
                assert (task.return_value, task.exception) == (model.value, None)
            if model.error is not None:
                assert isinstance(task.exception, model.error)

    @invariant()
    def states_move_forward(self) -> None:
        for uid, model in self.models.items():
            old, new = self.seen.get(uid, "NEW"), model.task.state
            assert ORDER[old] < ORDER[new] or old == new
            self.seen[uid] = new

    @invariant()
    def futures_are_settled_when_tasks_are(self) -> None:
        for model in self.models.values():
            if model.future is not None and not model.gave_up:
                assert model.future.done() == (model.task.state in TERMINAL)
                if model.task.state == "DONE":
                    assert model.future.result() is model.task
                elif model.task.state == "FAILED":
                    assert model.future.exception() is not None

    @invariant()
    def children_run_when_their_parents_are_done(self) -> None:
        for model in self.models.values():
            if model.attempts:
                assert all(parent.state == "DONE" for parent in model.parents)

    @invariant()
    def every_event_is_heard_of_or_counted(self) -> None:
        assert self.engine.reported == self.heard + self.engine.dropped_events
        assert self.engine.dropped_events >= self.strangers

    @invariant()
    def statistics_agree(self) -> None:
        states = Counter(model.task.state for model in self.models.values())
        pending = sum(states.pop(state, 0) for state in ("NEW", "WAITING", "SUBMITTED"))
        expected = states + Counter({"PENDING": pending})
        assert self.session.get_statistics()["counts"] == expected

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        before = {uid: m.task.state for uid, m in self.models.items() if m.task.done()}
        self.run(self.session.close())
        for uid, model in self.models.items():
            assert model.task.state in TERMINAL
            assert model.task.state == before.get(uid, model.task.state)
            assert model.future is not None
            assert model.future.done()
        self.loop.close()


Sessions.TestCase.settings = settings(max_examples=EXAMPLES or 200, stateful_step_count=30)
test_any_history_of_a_session = Sessions.TestCase


# ---------------------------------------------------------------------- graphs


class Inline(BaseExecutionBackend):
    """Runs functions where it stands, and reports them in an order of the test's choice."""

    kinds = frozenset({"function"})

    def __init__(self, choose: Any) -> None:
        super().__init__("inline")
        self.choose = choose
        self.order: list[str] = []

    async def _submit(self, tasks: list[Any]) -> None:
        events: list[tuple[Any, str, dict[str, Any] | None]] = []
        for task in tasks:
            self.order.append(task.uid)
            args, kwargs = self.inputs_of(task)
            try:
                events.append((task, "DONE", {"return_value": task.function(*args, **kwargs)}))
            except ZeroDivisionError as error:
                events.append((task, "FAILED", {"exception": error}))
        self.choose.shuffle(events)
        self.deliver_burst(events)


def node(
    number: int, fails: bool, first: list[int], second: int = 0, *, third: dict[str, int]
) -> int:
    return number // (0 if fails else 1) + sum([*first, second, *third.values()])


def after_only(number: int, fails: bool) -> int:
    return number // (0 if fails else 1)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[int]], set[int], set[int], list[int]]:
    """Parents of each node, nodes that fail, nodes that are never submitted, and the order."""
    size = draw(st.integers(1, 9))
    numbers = st.integers(0, size - 1)
    likely_acyclic = draw(st.booleans())
    parents = []
    for number in range(size):
        allowed = st.integers(0, number - 1) if likely_acyclic and number else numbers
        empty = likely_acyclic and not number
        parents.append([] if empty else draw(st.lists(allowed, max_size=3)))
    fails = draw(st.sets(numbers, max_size=2))
    missing = draw(st.sets(numbers, max_size=1))
    return parents, fails, missing, draw(st.permutations(range(size)))


def on_cycles(parents: list[list[int]], present: set[int]) -> set[int]:
    """Nodes that reach themselves, by the slowest and simplest way."""
    reach = {n: {p for p in parents[n] if p in present} for n in present}
    for _ in present:
        reach = {n: above.union(*(reach[p] for p in above)) for n, above in reach.items()}
    return {n for n in present if n in reach[n]}


@given(graph=graphs(), manner=st.randoms(use_true_random=False))
def test_any_graph_of_tasks(graph: Any, manner: Any) -> None:
    parents, fails, missing, order = graph
    present = set(range(len(parents))) - missing
    tasks: list[ComputeTask] = []
    for number in range(len(parents)):
        tasks.append(ComputeTask(function=noop, uid=f"n{number}"))
    for number, task in enumerate(tasks):  # in a second step: a cycle cannot be made in one
        above = [tasks[p] for p in parents[number]]
        if manner.random() < 0.3:
            task.function, task.args = after_only, (number, number in fails)
            task.after = tuple(above)
        else:
            cut = manner.randint(0, len(above))
            third = {str(place): parent for place, parent in enumerate(above[cut + 1 :])}
            task.function = node
            task.args = (number, number in fails, above[:cut], *above[cut : cut + 1])
            task.kwargs = {"third": third}

    cycles = on_cycles(parents, present)
    refused = set(cycles)
    for _ in present:
        refused |= {n for n in present if any(p in refused or p in missing for p in parents[n])}
    expected: dict[int, int | None] = {}
    while len(expected) < len(present - refused):
        for n in present - refused - expected.keys():
            if all(p in expected for p in parents[n]):
                values = [expected[p] for p in parents[n]]
                whole = n not in fails and None not in values
                total = sum(v for v in values if v is not None)
                plain = tasks[n].function is after_only
                expected[n] = (n if plain else n + total) if whole else None

    backend = Inline(manner)

    async def run() -> None:
        async with Session([backend]) as session:
            batch = [tasks[n] for n in order if n in present]
            if refused:
                with pytest.raises(TaskValidationError) as caught:
                    await session.submit_tasks(batch)
                errors = caught.value.errors
                assert set(errors) == {f"n{n}" for n in refused}
                blamed = {uid for uid, words in errors.items() if "waits for itself" in words}
                assert blamed <= {f"n{n}" for n in cycles}
                assert bool(blamed) == bool(cycles)
            else:
                assert len(await session.submit_tasks(batch)) == len(batch)
            await session.wait_tasks([tasks[n] for n in expected], timeout=60)
            counts = session.get_statistics()["counts"]
            assert sum(counts.values()) == len(expected)

    asyncio.run(run())
    for n, value in expected.items():
        assert tasks[n].state == ("FAILED" if value is None else "DONE")
        if value is not None:
            assert tasks[n].return_value == value
        elif any(expected[p] is None for p in parents[n]):
            error = tasks[n].exception
            assert isinstance(error, DependencyError)
            assert isinstance(error.root, ZeroDivisionError)
        else:
            assert isinstance(tasks[n].exception, ZeroDivisionError)
    for n in refused:
        assert tasks[n].state == "NEW"
    # Each is run once, after its parents, and only if these are DONE.
    assert len(set(backend.order)) == len(backend.order)
    for place, uid in enumerate(backend.order):
        for p in parents[int(uid[1:])]:
            assert f"n{p}" in backend.order[:place]
            assert expected[p] is not None


@settings(max_examples=EXAMPLES or 15)
@given(
    values=st.lists(st.integers(-100, 100), max_size=60),
    picks=st.randoms(use_true_random=False),
)
def test_sums_of_sums_on_threads(values: list[int], picks: Any) -> None:
    """Tasks of tasks, on real threads: what comes out is what Python has."""
    expected: list[int] = []
    tasks: list[ComputeTask] = []
    for value in values:
        above = picks.sample(range(len(tasks)), picks.randint(0, min(3, len(tasks))))
        expected.append((value + sum(expected[n] for n in above)) % 997)
        tasks.append(ComputeTask(function=modular, args=(value, [tasks[n] for n in above])))

    async def run() -> None:
        async with Session([ConcurrentExecutionBackend()]) as session:
            await session.submit_tasks(picks.sample(tasks, len(tasks)))
            await session.wait_tasks(tasks, timeout=60)

    asyncio.run(run())
    assert [task.return_value for task in tasks] == expected


def modular(value: int, others: list[int]) -> int:
    return (value + sum(others)) % 997


# ---------------------------------------------------------------------- input


class Word(str, enum.Enum):
    HERE = "here"
    DOT = "."


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.one_of(st.text(max_size=3), st.integers(), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just(noop),
    st.just(object()),
    st.builds(ComputeTask, function=st.just(noop)),
    st.just(Resources()),
)
WORDS = st.one_of(
    st.text(max_size=3),
    st.text(alphabet="A=\0\udcff\ud800", max_size=3),
    st.sampled_from([Word.HERE, Word.DOT]),
    st.just(Path()),
)
# What the environment and the folder of a process may be, and what looks like it.
TEXTS = st.one_of(WORDS, st.dictionaries(WORDS, st.one_of(WORDS, st.integers()), max_size=2))
FIELDS = [
    "executable", "function", "arguments", "args", "kwargs", "uid", "backend", "input_files",
    "output_files", "capture_stdio", "resources", "retries", "timeout", "after",
    "task_backend_specific_kwargs", "ranks", "nonsense",
]  # fmt: skip
AI_FIELDS = ["prompt", "model", "inference_endpoint", "system_prompt", "temperature", "max_tokens"]


@settings(max_examples=EXAMPLES or 400)
@given(given=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=5))
def test_whatever_a_task_is_given_it_is_made_or_refused(given: dict[str, Any]) -> None:
    try:
        task = ComputeTask(**given)
    except TaskValidationError as error:
        assert str(error)  # noqa: PT017 - either way is good
    else:
        assert (task.executable is None) != (task.function is None)
        assert dict(task)["state"] == "NEW"
        assert repr(task)


@settings(max_examples=EXAMPLES or 200)
@given(given=st.dictionaries(st.sampled_from([*AI_FIELDS, *FIELDS[5:]]), JUNK, max_size=5))
def test_whatever_an_ai_task_is_given_it_is_made_or_refused(given: dict[str, Any]) -> None:
    try:
        task: BaseTask = AITask(**{"prompt": "x", **given})
    except TaskValidationError as error:
        assert str(error)  # noqa: PT017 - either way is good
    else:
        assert isinstance(task["prompt"], (str, list))


@settings(max_examples=EXAMPLES or 200)
@given(
    given=st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(Resources)]),
        st.one_of(JUNK, TEXTS),
        max_size=3,
    )
)
def test_whatever_resources_are_given_they_are_made_or_refused(given: dict[str, Any]) -> None:
    try:
        need = Resources(**given)
    except TaskValidationError as error:
        assert str(error)  # noqa: PT017 - either way is good
    else:
        assert need.cores >= 1
        assert need.memory >= 0
        assert need.walltime_seconds is None or need.walltime_seconds > 0
        assert need.cwd is None or type(need.cwd) is str
        for text in (text for item in (need.env or {}).items() for text in item):
            assert type(text) is str


@settings(max_examples=EXAMPLES or 25)
@given(
    needs=st.lists(st.dictionaries(st.sampled_from(["cwd", "env"]), TEXTS, min_size=1), max_size=4)
)
def test_whatever_a_process_is_given_it_runs_or_fails_alone(needs: list[dict[str, Any]]) -> None:
    tasks = []
    for need in needs:
        try:
            tasks.append(ComputeTask(executable="true", resources=Resources(**need)))
        except TaskValidationError:
            continue

    async def run() -> None:
        async with Session([ConcurrentExecutionBackend()]) as session:
            good = ComputeTask(executable="true")
            await session.submit_tasks([*tasks, good])
            await session.wait_tasks([*tasks, good], timeout=60)
            assert good.state == "DONE"

    asyncio.run(run())
    for task in tasks:
        assert task.state == "DONE" or isinstance(task.exception, RhapsodyError), task.exception


@settings(max_examples=EXAMPLES or 150)
@given(batch=st.lists(st.one_of(JUNK, st.dictionaries(st.sampled_from(FIELDS), JUNK)), max_size=6))
def test_whatever_is_submitted_runs_or_is_named(batch: list[Any]) -> None:
    async def run() -> None:
        backend = ManualBackend()
        async with Session([backend]) as session:
            good = ComputeTask(function=noop)
            try:
                await session.submit_tasks([*batch, good])
            except TaskValidationError as error:
                assert error.errors  # noqa: PT017 - either way is good
            assert good in backend.given
            backend.deliver_burst([(task, "DONE", None) for task in backend.given])
            await session.wait_tasks([good], timeout=60)
            await backend.heard()
            pending = session.get_statistics()["counts"]["PENDING"]
            waiting = [t for t in batch if isinstance(t, ComputeTask) and t.state == "WAITING"]
            assert pending <= len(waiting) + len(batch)

    asyncio.run(run())
