"""Convert users' objects to text: never raising for messages, to plain `str` for processes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "argument_str",
    "describe_error",
    "describe_value",
    "environment_fault",
    "plain_str",
    "safe_str",
]


def safe_str(value: Any) -> str:
    """Return `str(value)`; a message about its `__str__` where that raises."""
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
    return text if type(text) is str else str.__str__(os.fsdecode(text))


def argument_str(value: object) -> str:
    """Return a value as an argument of a command line, as `subprocess` would pass it."""
    # A str enum stands for its value there, and its str() is its name.
    return plain_str(value if isinstance(value, (str, bytes, os.PathLike)) else str(value))


def describe_value(value: object) -> str:
    """Return a number or None as it is, and only the type of anything else, for a message.

    A value that was refused may hold a password or token.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return safe_str(value)
    return f"this {type(value).__name__}"


def environment_fault(env: object) -> str | None:
    """Return what is wrong with environment variables, None where nothing is.

    Only names are in it, and of a name no more than what is before `=` or NUL.
    """
    if not isinstance(env, Mapping):
        return f"env must be a dict of str to str, not {describe_value(env)}"
    for name, value in env.items():
        if not isinstance(name, str):
            return f"env must be a dict of str to str; a name in it is {describe_value(name)}"
        if not name or "=" in name or "\0" in name:
            start = re.split("[=\0]", name)[0]
            return f"env names must be non-empty str without '=' and NUL; one begins with {start!r}"
        if not isinstance(value, str) or "\0" in value:
            return f"env[{name!r}] must be a str without NUL, not {describe_value(value)}"
    return None
