"""What the fields of a task may hold, and in what words anything else is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from numbers import Number, Real
from typing import Any, TypeVar

from rhapsody.runtime.errors import TaskValidationError
from rhapsody.runtime.resources import Resources

__all__ = ["ARGUMENT", "CHECKS", "check_inputs", "check_prompt", "check_uid"]

T = TypeVar("T")

#: types of an executable's arguments; numbers of other packages are registered as such
ARGUMENT = (str, int, float, os.PathLike, bytes, Number)


def check_uid(uid: Any) -> str:
    """Return the uid, if it can be one."""
    if not isinstance(uid, str) or not uid or "/" in uid or "\0" in uid:
        raise TaskValidationError(f"uid must be a non-empty text without '/', not {uid!r}")
    return uid


def check_inputs(uid: str, args: Any, kwargs: Any) -> None:
    """Raise for what a function cannot be called with."""
    if not isinstance(args, (tuple, list)):
        raise TaskValidationError(f"task '{uid}': args must be a tuple or a list, not {args!r}")
    if not isinstance(kwargs, Mapping):
        raise TaskValidationError(f"task '{uid}': kwargs must be a dict, not {kwargs!r}")


def check_prompt(uid: str, prompt: Any) -> None:
    """Raise for what cannot be asked."""
    if not prompt or not isinstance(prompt, (str, list)):
        raise TaskValidationError(
            f"task '{uid}': prompt must be a non-empty text or list, not {prompt!r}"
        )
    for part in prompt if isinstance(prompt, list) else ():
        if not isinstance(part, (str, Mapping)):
            raise TaskValidationError(
                f"task '{uid}': prompt must be of texts or chat messages, found {part!r} in it"
            )


def _retries(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TaskValidationError(f"{what} must be a whole number of at least 0, not {value!r}")
    return value


def _timeout(value: Any, what: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise TaskValidationError(f"{what} must be seconds above 0, not {value!r}")
    return float(value)


def _of_type(kind: type[T], words: str) -> Callable[[Any, str], T]:
    def check(value: Any, what: str) -> T:
        if not isinstance(value, kind):
            raise TaskValidationError(f"{what} must be {words}, not {value!r}")
        return value

    return check


def _list_of(kinds: tuple[type, ...], words: str) -> Callable[[Any, str], list[Any]]:
    def check(value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise TaskValidationError(f"{what} must be a list of {words}, not {value!r}")
        for one in value:
            if not isinstance(one, kinds):
                raise TaskValidationError(f"{what} must be a list of {words}, found {one!r} in it")
        return value

    return check


def _number(least: float, most: float, words: str) -> Callable[[Any, str], Any]:
    def check(value: Any, what: str) -> Any:
        known = not isinstance(value, bool) and isinstance(value, Real)
        if not known or not least <= float(value) <= most:
            raise TaskValidationError(f"{what} must be {words}, not {value!r}")
        return value

    return check


def _whole(least: int, words: str) -> Callable[[Any, str], int]:
    def check(value: Any, what: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TaskValidationError(f"{what} must be {words}, not {value!r}")
        return value

    return check


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "retries": _retries,
    "timeout": _timeout,
    "resources": _of_type(Resources, "Resources(...)"),
    "task_backend_specific_kwargs": _of_type(dict, "a dict"),
    "capture_stdio": _of_type(bool, "True or False"),
    "input_files": _list_of((str, os.PathLike), "names"),
    "output_files": _list_of((str, os.PathLike), "names"),
    "model": _of_type(str, "a text"),
    "inference_endpoint": _of_type(str, "a text"),
    "system_prompt": _of_type(str, "a text"),
    "temperature": _number(0, float("inf"), "a number of at least 0"),
    "max_tokens": _whole(1, "a whole number of at least 1"),
    "top_p": _number(0, 1, "a number from 0 to 1"),
    "top_k": _whole(-1, "a whole number of at least -1 (all)"),
    "stop_sequences": _list_of((str,), "texts"),
}
