"""Pickles functions, arguments, results and exceptions for other processes."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import cloudpickle

from .errors import SerializationError
from .text import describe_error

__all__ = ["dumps", "loads", "pack_exception", "unpack_exception"]


class RemoteTraceback(Exception):  # noqa: N818 - it is shown as the cause, and is no error itself
    """The traceback of an exception in another process, as the cause of its copy in this one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text}"


def dumps(value: Any, what: str = "value") -> bytes:
    """Pickle a value; functions of `__main__`, lambdas and closures are pickled by value.

    Raises:
        SerializationError: it cannot be pickled; the message names the value and the cause.
    """
    try:
        data: bytes = cloudpickle.dumps(value)
    except Exception as error:  # a user's __reduce__ may raise anything
        raise SerializationError(
            f"cannot pickle the {what} {_short(value)}: {describe_error(error)}"
        ) from error
    return data


def loads(data: bytes | bytearray, what: str = "value") -> Any:
    """Unpickle a value from a process of RHAPSODY.

    Raises:
        SerializationError: it cannot be unpickled here.
    """
    try:
        return pickle.loads(data)
    except Exception as error:
        raise SerializationError(f"cannot unpickle the {what}: {describe_error(error)}") from error


def pack_exception(error: BaseException) -> bytes:
    """Pickle an exception with its traceback, whatever its class is.

    It will be rebuilt from its class, `args` and attributes without calling the `__init__` of the
    class, which may take other arguments; only that of its built-in base is called, which sets an
    OSError's file name, for example. Attributes that cannot be pickled are left out; where the
    class cannot be pickled, a SerializationError that describes the exception takes its place.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    state = {k: v for k, v in vars(error).items() if _can_pickle(v)}
    _, given, *rest = _builtin_base(type(error)).__reduce__(error)
    fields = {k: v for k, v in (rest[0] or {}).items() if k not in vars(error)} if rest else {}
    fields = {k: v for k, v in fields.items() if _can_pickle(v)}
    try:
        return dumps(
            (type(error), _picklable_args(given), _picklable_args(error.args), fields, state, text)
        )
    except SerializationError:
        substitute = SerializationError(
            f"the task raised an exception that cannot be pickled: {describe_error(error)}"
        )
        return dumps((SerializationError, substitute.args, substitute.args, {}, {}, text))


def unpack_exception(data: bytes | bytearray) -> BaseException:
    """Rebuild an exception from `pack_exception`, with its remote traceback as its cause."""
    try:
        cls, given, args, fields, state, text = loads(data, "exception of the task")
        error: BaseException = cls.__new__(cls, *given)
        base = _builtin_base(cls)
        base.__init__(error, *given)
        for name, value in fields.items():
            base.__setattr__(error, name, value)
        error.args = args
        error.__dict__.update(state)
    except Exception as failure:
        return SerializationError(f"the task raised an exception that cannot be rebuilt: {failure}")
    error.__cause__ = RemoteTraceback(text)
    return error


def _builtin_base(cls: type[BaseException]) -> Any:
    """The built-in class, whose fields (an OSError's, an ImportError's) are not in `vars`."""
    return next(base for base in cls.__mro__ if base.__module__ == "builtins")


class _PackedException:
    """An exception among another one's arguments, as in a group: pickled in the same way."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return unpack_exception, (pack_exception(self.error),)


def _picklable_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg if _can_pickle(arg) else _picklable(arg) for arg in args)


def _picklable(arg: Any) -> Any:
    if isinstance(arg, BaseException):
        return _PackedException(arg)
    if isinstance(arg, (list, tuple)) and all(isinstance(one, BaseException) for one in arg):
        return [_PackedException(one) for one in arg]
    return _short(arg)


def _can_pickle(value: Any) -> bool:
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return True
    try:
        pickle.loads(cloudpickle.dumps(value))
    except Exception:  # an author's class may raise anything
        return False
    return True


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # a user's __repr__ may raise anything
        text = f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= 200 else text[:200] + "..."
