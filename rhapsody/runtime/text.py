"""Convert users' objects to text: never raising for messages, to plain `str` for processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["argument_str", "describe_error", "environment_fault", "plain_str", "safe_str"]


def safe_str(value: Any) -> str:
    """Return `str(value)`; of a value whose `__str__` raises, a text that says so."""
    try:
        return str(value)
    except Exception as error:  # the author's code
        return f"<{type(value).__name__} whose str raises {type(error).__name__}>"


def describe_error(error: BaseException) -> str:
    """Return an error's type and message, never raising."""
    return f"{type(error).__name__}: {safe_str(error)}"


def plain_str(text: str | bytes | os.PathLike[Any]) -> str:
    """Return a string or path as exactly `str`, and not as a subclass such as a member of an enum.

    A subclass cannot be marshalled, and may not exist where it is unpickled.
    """
    return str.__str__(os.fsdecode(text))


def argument_str(value: object) -> str:
    """Return a value as an argument of a command line, as `subprocess` would pass it."""
    # A str enum stands for its value there, and its str() is its name.
    return plain_str(value if isinstance(value, (str, bytes, os.PathLike)) else str(value))


def environment_fault(env: Any) -> str | None:
    """Return what is wrong with environment variables, None where they are well."""
    if not isinstance(env, Mapping):
        return f"env must be a dict of str, not {env!r}"
    for name, value in env.items():
        if (
            not isinstance(name, str)
            or not isinstance(value, str)
            or not name
            or "=" in name
            or "\0" in name + value
        ):
            return f"env must map str to str, not {name!r}: {value!r}"
    return None
