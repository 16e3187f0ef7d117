"""Where tasks may stand among arguments: at the top, and one level into lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["OPEN", "inside", "swap"]

OPEN = (list, tuple, dict)


def inside(value: Any) -> Iterable[Any]:
    """What stands at the places of an argument."""
    if type(value) is dict:
        return value.values()
    return value if type(value) in OPEN else (value,)


def swap(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return an argument with what stands at its places changed."""
    if type(value) is list or type(value) is tuple:
        return type(value)(map(change, value))
    if type(value) is dict:
        return {name: change(inner) for name, inner in value.items()}
    return change(value)
