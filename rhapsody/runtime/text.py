"""Text of what is an author's own: its `__str__` may raise anything, and ours must not for it."""

from __future__ import annotations

from typing import Any

__all__ = ["said", "text_of"]


def text_of(value: Any) -> str:
    """Return `str(value)`, or what can be said of a value whose `__str__` raises."""
    try:
        return str(value)
    except Exception as error:  # the author's code
        return f"<{type(value).__name__} whose str raises {type(error).__name__}>"


def said(error: BaseException) -> str:
    """Return an error's kind and words."""
    return f"{type(error).__name__}: {text_of(error)}"
