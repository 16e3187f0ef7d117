"""Checks of the values that authors give to a task's fields; each raises TaskValidationError.

A check is called with a value and with what names it in the error (`task 't': retries`); it
returns the value as the task keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from numbers import Number, Real
from typing import Any, TypeVar

from rhapsody.runtime.errors import TaskValidationError

__all__ = [
    "ARGUMENT",
    "Check",
    "check_inputs",
    "check_prompt",
    "check_timeout",
    "check_uid",
    "instance_of",
    "integer",
    "list_of",
    "number",
]

T = TypeVar("T")
Check = Callable[[Any, str], T]

#: types of an executable's arguments; the number types of other packages are registered as Number
ARGUMENT = (str, int, float, os.PathLike, bytes, Number)


def check_uid(uid: Any) -> str:
    """Return a uid: a str that can be a part of a file name."""
    if not isinstance(uid, str) or not uid or "/" in uid or "\0" in uid:
        raise TaskValidationError(f"uid must be a non-empty str without '/', not {uid!r}")
    return uid


def check_inputs(args: Any, kwargs: Any, uid: str) -> None:
    """Raise for args and kwargs that no function can be called with."""
    if not isinstance(args, (tuple, list)):
        raise TaskValidationError(f"task '{uid}': args must be a tuple or a list, not {args!r}")
    if not isinstance(kwargs, Mapping):
        raise TaskValidationError(f"task '{uid}': kwargs must be a dict, not {kwargs!r}")


def check_prompt(prompt: Any, what: str) -> str | list[Any]:
    """Return a prompt: a str, or a list of str and chat messages."""
    if not prompt or not isinstance(prompt, (str, list)):
        raise TaskValidationError(f"{what} must be a non-empty str or list, not {prompt!r}")
    for part in prompt if isinstance(prompt, list) else ():
        if not isinstance(part, (str, Mapping)):
            raise TaskValidationError(
                f"{what} must be of str or chat messages, found {part!r} in it"
            )
    return prompt


def check_timeout(value: Any, what: str) -> float:
    """Return a timeout in seconds."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise TaskValidationError(f"{what} must be seconds above 0, not {value!r}")
    return float(value)


def instance_of(kind: type[T], words: str) -> Check[T]:
    """Make a check for instances of a type."""

    def check(value: Any, what: str) -> T:
        if not isinstance(value, kind):
            raise TaskValidationError(f"{what} must be {words}, not {value!r}")
        return value

    return check


def list_of(kinds: tuple[type, ...], words: str) -> Check[list[Any]]:
    """Make a check for lists whose elements are instances of these types."""

    def check(value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise TaskValidationError(f"{what} must be a list of {words}, not {value!r}")
        for element in value:
            if not isinstance(element, kinds):
                raise TaskValidationError(
                    f"{what} must be a list of {words}, found {element!r} in it"
                )
        return value

    return check


def integer(least: int, note: str = "") -> Check[int]:
    """Make a check for an int of at least so much."""

    def check(value: Any, what: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TaskValidationError(
                f"{what} must be an int of at least {least}{note}, not {value!r}"
            )
        return value

    return check


def number(least: float, most: float, words: str) -> Check[float]:
    """Make a check for a number in a range."""

    def check(value: Any, what: str) -> float:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not least <= float(value) <= most:
            raise TaskValidationError(f"{what} must be {words}, not {value!r}")
        return value  # type: ignore[no-any-return]  # of the author's type, say a NumPy one

    return check
