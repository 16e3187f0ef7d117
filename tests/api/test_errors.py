"""The exception tree: one base, every error pickles, and each says what its reader needs."""

from __future__ import annotations

import copy
import inspect
import pickle

import cloudpickle
import pytest

import rhapsody
from rhapsody.api import errors
from rhapsody.api.errors import (
    BackendError,
    DependencyError,
    ResourceError,
    RhapsodyError,
    SerializationError,
    SessionError,
    TaskExecutionError,
    TaskTimeoutError,
    TaskValidationError,
    WorkerLostError,
)

EXAMPLES: list[RhapsodyError] = [
    RhapsodyError("something"),
    TaskValidationError("two are bad", {"a": "why a", "b": "why b"}),
    TaskExecutionError("task.1", "no such file\n", 2),
    TaskTimeoutError("task.1", 1.5, stopped=False),
    DependencyError("child", "parent", TaskExecutionError("parent", "oh", 3)),
    DependencyError("child", "parent"),
    SerializationError("a lock"),
    SessionError("closed"),
    ResourceError("too much"),
    BackendError("scheduler is gone", backend="dask", host="node3", transient=True),
    WorkerLostError("worker is gone", backend="pool", host="here", transient=True),
]


def test_there_is_an_example_of_every_error() -> None:
    assert {type(error).__name__ for error in EXAMPLES} == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_in_the_tree_and_where_users_look(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, RhapsodyError)
    assert getattr(rhapsody, name) is getattr(rhapsody.api, name) is cls
    assert f"{cls.__module__}.{cls.__qualname__}" == f"rhapsody.api.errors.{name}"
    assert inspect.getdoc(cls)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_pickles_with_what_it_knows(error: RhapsodyError, protocol: int) -> None:
    error.note = "an attribute that somebody set"  # type: ignore[attr-defined]
    for again in (
        pickle.loads(pickle.dumps(error, protocol)),
        cloudpickle.loads(cloudpickle.dumps(error)),
        copy.copy(error),
    ):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.args == error.args
        assert {k: repr(v) for k, v in vars(again).items()} == {
            k: repr(v) for k, v in vars(error).items()
        }


def test_a_subclass_that_wants_other_arguments_pickles_too() -> None:
    again = pickle.loads(pickle.dumps(Picky("gone", on="node7")))
    assert isinstance(again, Picky)
    assert (str(again), again.on, again.backend) == ("gone on node7", "node7", "picky")


class Picky(BackendError):
    def __init__(self, what: str, *, on: str) -> None:
        super().__init__(f"{what} on {on}", backend="picky")
        self.on = on


def test_what_an_execution_error_says() -> None:
    error = TaskExecutionError("task.7", "  no such file\n", 2)
    assert (error.uid, error.stderr, error.exit_code) == ("task.7", "  no such file\n", 2)
    assert str(error) == "Task 'task.7' failed with exit code 2: no such file"


def test_an_execution_error_shows_the_last_words_of_a_long_output() -> None:
    text = "x" * 100_000 + "the last words"
    error = TaskExecutionError("task.7", text, 1)
    assert error.stderr == text
    assert len(str(error)) < 3000
    assert str(error).endswith("the last words")


def test_an_execution_error_needs_no_output() -> None:
    assert "exit code None" in str(TaskExecutionError("t"))


def test_a_dependency_error_carries_its_cause() -> None:
    cause = ValueError("the first domino")
    error = DependencyError("child", "parent", cause)
    assert (error.uid, error.parent) == ("child", "parent")
    assert error.cause is error.__cause__ is cause
    for word in ("'child'", "'parent'", "ValueError: the first domino"):
        assert word in str(error)
    assert "it was canceled" in str(DependencyError("child", "parent"))


def test_the_cause_of_a_dependency_error_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(DependencyError("c", "p", TaskExecutionError("p", "oh", 3))))
    assert isinstance(again.cause, TaskExecutionError)
    assert again.cause.exit_code == 3


def test_a_backend_error_says_where_and_whether_a_retry_may_help() -> None:
    error = BackendError("gone", backend="dask", host="node3", transient=True)
    assert (error.backend, error.host, error.transient) == ("dask", "node3", True)
    plain = BackendError("gone")
    assert (plain.backend, plain.host, plain.transient) == (None, None, False)


def test_a_timeout_says_how_long_and_whether_the_task_is_stopped() -> None:
    stopped, runs = TaskTimeoutError("t", 2.5), TaskTimeoutError("t", 2.5, stopped=False)
    assert (stopped.stopped, runs.stopped) == (True, False)
    assert "2.5 s" in str(stopped)
    assert "still runs" in str(runs)
    assert "still runs" not in str(stopped)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (TaskValidationError, ValueError),
        (TaskTimeoutError, TimeoutError),
        (SerializationError, TypeError),
        (SessionError, RuntimeError),
        (WorkerLostError, BackendError),
    ],
)
def test_errors_are_also_what_python_calls_them(error: type, builtin: type) -> None:
    assert issubclass(error, builtin)
