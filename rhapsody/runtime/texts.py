"""Texts for another process: nothing but text, of whatever class an author's own are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["fault_of_env", "plain", "word_of"]


def plain(text: str | bytes | os.PathLike[Any]) -> str:
    """Return a text or path as a `str` and no subclass of it, such as a member of an enum."""
    return str.__str__(os.fsdecode(text))


def word_of(value: object) -> str:
    """Return the word of a command line that a value stands for."""
    # An enum's text is what it is, as everywhere in Python's subprocess; its str() is its name.
    return plain(value if isinstance(value, (str, bytes, os.PathLike)) else str(value))


def fault_of_env(env: Any) -> str | None:
    """Return what is wrong with environment variables, None where they are well."""
    if not isinstance(env, Mapping):
        return f"env must be a dict of texts, not {env!r}"
    for name, value in env.items():
        if (
            not isinstance(name, str)
            or not isinstance(value, str)
            or not name
            or "=" in name
            or "\0" in name + value
        ):
            return f"env must map texts to texts, not {name!r}: {value!r}"
    return None
