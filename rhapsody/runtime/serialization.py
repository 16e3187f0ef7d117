"""What crosses to another process: functions, arguments, results, exceptions."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import cloudpickle

from .errors import SerializationError

__all__ = ["dumps", "loads", "pack_exception", "unpack_exception"]


class RemoteTraceback(Exception):  # noqa: N818 - it is shown as the cause, and is no error itself
    """The traceback of an exception in another process, as the cause of its copy in this one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text}"


def dumps(value: Any, what: str = "value") -> bytes:
    """Pickle anything, functions of `__main__`, lambdas and closures by value.

    Raises:
        SerializationError: it cannot be pickled; says what it is and why.
    """
    try:
        data: bytes = cloudpickle.dumps(value)
    except Exception as error:  # a user's __reduce__ may raise anything
        raise SerializationError(
            f"cannot pickle the {what} {_short(value)}: {_words(error)}"
        ) from error
    return data


def loads(data: bytes | bytearray, what: str = "value") -> Any:
    """Unpickle what a process of our own has pickled.

    Raises:
        SerializationError: it cannot be unpickled here.
    """
    try:
        return pickle.loads(data)
    except Exception as error:
        raise SerializationError(f"cannot unpickle the {what}: {_words(error)}") from error


def pack_exception(error: BaseException) -> bytes:
    """Pickle an exception with its traceback, so that its class need not cooperate.

    An exception is rebuilt from its class, `args` and attributes without a call of its `__init__`,
    which may want other arguments: of that of its built-in base only, which knows an OSError's
    file name, for example. What of it cannot be pickled is left out, at the worst the class
    itself: then a SerializationError tells of it.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    state = {k: v for k, v in vars(error).items() if _pickles(v)}
    _, given, *rest = _builtin_base(type(error)).__reduce__(error)
    fields = {k: v for k, v in (rest[0] or {}).items() if k not in vars(error)} if rest else {}
    fields = {k: v for k, v in fields.items() if _pickles(v)}
    try:
        return dumps((type(error), _crossing(given), _crossing(error.args), fields, state, text))
    except SerializationError:
        said = SerializationError(
            f"the task raised an exception that cannot be pickled: {_words(error)}"
        )
        return dumps((SerializationError, said.args, said.args, {}, {}, text))


def unpack_exception(data: bytes | bytearray) -> BaseException:
    """Return the exception that `pack_exception` has packed, its remote traceback as its cause."""
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
    """The class whose fields are not in `vars`: an OSError's, an ImportError's."""
    return next(base for base in cls.__mro__ if base.__module__ == "builtins")


class _Carried:
    """An exception in another one's arguments, as in a group: crosses by the same way."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return unpack_exception, (pack_exception(self.error),)


def _crossing(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg if _pickles(arg) else _carried(arg) for arg in args)


def _carried(arg: Any) -> Any:
    if isinstance(arg, BaseException):
        return _Carried(arg)
    if isinstance(arg, (list, tuple)) and all(isinstance(one, BaseException) for one in arg):
        return [_Carried(one) for one in arg]
    return _short(arg)


def _pickles(value: Any) -> bool:
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return True
    try:
        pickle.loads(cloudpickle.dumps(value))
    except Exception:  # whatever it is, it does not cross
        return False
    return True


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # a user's __repr__ may raise anything
        text = f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= 200 else text[:200] + "..."


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
