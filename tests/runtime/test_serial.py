"""What crosses to another process and back, and what is said of that which cannot."""

from __future__ import annotations

import pickle
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rhapsody.api import errors
from rhapsody.api.errors import SerializationError
from rhapsody.runtime.serialization import dumps, loads, pack_exception, unpack_exception


class Demanding(Exception):
    """Its class wants arguments that `args` has not, which pickle's own way cannot rebuild."""

    def __init__(self, host: str, *, port: int) -> None:
        super().__init__(f"{host}:{port}")
        self.host = host
        self.port = port


class Refuser:
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


class Trap:
    """Pickles, and cannot be unpickled."""

    def __reduce__(self) -> Any:
        return _spring, ()


def _spring() -> None:
    raise OSError("no such library here")


class NoWords:
    def __repr__(self) -> str:
        raise ValueError("no words")

    def __reduce__(self) -> Any:
        raise TypeError("nor a pickle")


def across(error: BaseException) -> BaseException:
    return unpack_exception(pack_exception(error))


@pytest.mark.parametrize("value", [None, 3, "text", b"\0\xff", [1, {"a": (2.5,)}], Path("/x"), {1}])
def test_values_cross(value: Any) -> None:
    assert loads(dumps(value)) == value


def test_lambdas_closures_and_local_classes_cross() -> None:
    base = 10

    class Local:
        def twice(self, x: int) -> int:
            return 2 * x + base

    assert loads(dumps(lambda x: x + base))(1) == 11
    assert loads(dumps(Local())).twice(1) == 12


@settings(deadline=None)  # it is no test of speed
@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.binary() | st.floats(allow_nan=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_plain_value_crosses(value: Any) -> None:
    assert loads(dumps(value)) == value


@pytest.mark.parametrize("value", [threading.Lock(), (str(n) for n in range(2)), Refuser()])
def test_what_cannot_be_pickled_is_named(value: Any) -> None:
    with pytest.raises(SerializationError, match="cannot pickle the argument 3") as caught:
        dumps([value], "argument 3")
    assert type(value).__name__ in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_value_without_words_is_named_by_its_class() -> None:
    with pytest.raises(SerializationError, match="NoWords whose repr raises ValueError"):
        dumps(NoWords())


def test_a_long_repr_is_cut() -> None:
    with pytest.raises(SerializationError) as caught:
        dumps(["x" * 100_000, Refuser()])
    assert len(str(caught.value)) < 400


def test_what_cannot_be_unpickled_says_why() -> None:
    with pytest.raises(SerializationError, match=r"result of task 7.*no such library here"):
        loads(dumps(Trap()), "result of task 7")
    with pytest.raises(SerializationError, match="cannot unpickle"):
        loads(b"nothing of the kind")


# ---------------------------------------------------------------------- exceptions


def test_an_exception_keeps_its_class_its_attributes_and_its_traceback() -> None:
    def deep() -> None:
        raise Demanding("node7", port=22)

    with pytest.raises(Demanding) as caught:
        deep()
    copy = across(caught.value)
    assert type(copy) is Demanding
    assert (copy.host, copy.port, str(copy)) == ("node7", 22, "node7:22")
    shown = "".join(traceback.format_exception(copy))
    assert "in deep" in shown
    assert 'raise Demanding("node7", port=22)' in shown


def test_the_cause_of_an_exception_is_told_in_its_traceback() -> None:
    def wrapped() -> None:
        try:
            raise KeyError("the root")
        except KeyError as root:
            raise ValueError("what it led to") from root

    with pytest.raises(ValueError) as caught:
        wrapped()
    assert "KeyError: 'the root'" in "".join(traceback.format_exception(across(caught.value)))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("plain"),
        KeyError(3),
        FileNotFoundError(2, "No such file", "/there"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(5),
        ImportError("no module", name="there", path="/x"),
        SyntaxError("bad", ("file.py", 3, 4, "text")),
        errors.TaskExecutionError("t", "went wrong", 3),
        errors.TaskTimeoutError("t", 2.0, stopped=False),
        errors.WorkerLostError("gone", backend="b", host="h", transient=True),
        errors.TaskValidationError("no", {"t": "why"}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_reads_as_before(error: BaseException) -> None:
    copy = across(error)
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (FileNotFoundError(2, "No such file", "/there", None, "/then"), ["filename", "filename2"]),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), ["object", "start", "reason"]),
        (ImportError("no module", name="there", path="/x"), ["name", "path"]),
        (SystemExit(3), ["code"]),
        (StopIteration(5), ["value"]),
        (SyntaxError("bad", ("file.py", 3, 4, "text")), ["filename", "lineno", "text"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_fields_of_a_built_in_exception_cross(error: BaseException, names: list[str]) -> None:
    copy = across(error)
    assert [getattr(copy, name) for name in names] == [getattr(error, name) for name in names]
    assert getattr(copy, names[0]) is not None


if sys.version_info >= (3, 11):
    from builtins import ExceptionGroup

    def test_a_group_keeps_its_exceptions() -> None:
        group = ExceptionGroup("both", [ValueError("a"), Demanding("h", port=1)])
        copy = across(group)
        assert type(copy) is ExceptionGroup
        first, second = copy.exceptions
        assert (type(first), first.args) == (ValueError, ("a",))
        assert isinstance(second, Demanding)
        assert second.port == 1


def test_of_an_exception_that_crossed_pickle_makes_another_copy() -> None:
    copy = across(ValueError("once"))
    again = pickle.loads(pickle.dumps(copy))
    assert (type(again), again.args) == (ValueError, ("once",))


def test_attributes_that_cannot_cross_are_left_out() -> None:
    error = ValueError("held a lock", threading.Lock())
    error.kept = 5  # type: ignore[attr-defined]
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    error.trap = Trap()  # type: ignore[attr-defined]
    copy = across(error)
    assert type(copy) is ValueError
    assert vars(copy) == {"kept": 5}
    assert copy.args[0] == "held a lock"
    assert "lock" in copy.args[1]


def test_an_exception_of_a_class_that_cannot_cross_is_told_of() -> None:
    class Bound(Exception):
        lock = threading.Lock()

    copy = across(Bound("the words"))
    assert type(copy) is SerializationError
    assert "the words" in str(copy)
    assert "Bound" in str(copy)


def test_an_exception_that_cannot_be_rebuilt_is_told_of() -> None:
    class Picky(Exception):
        def __new__(cls, *args: Any) -> Picky:
            if args and args[0] == "again":
                raise RuntimeError("never twice")
            return super().__new__(cls, *args)

    error = Picky("once")
    error.args = ("again",)
    copy = across(error)
    assert type(copy) is SerializationError
    assert "never twice" in str(copy)
