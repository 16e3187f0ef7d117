"""A task as backends see it, and the event that reports its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

__all__ = ["BoundInputs", "Event", "EventTuple", "Fields", "Task", "TaskObject", "kind_of"]

#: Result fields of a task by name, with `started` and `ended`: seconds of `time.monotonic()` in
#: this process.
Fields = Mapping[str, Any]


class BoundInputs(NamedTuple):
    """Inputs of a task in which the results of its parents have replaced the parents."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: list[Any]


class TaskObject(Protocol):
    """A task of `rhapsody.api`, as far as backends use it; other fields are `task["name"]`."""

    uid: str
    function: Callable[..., Any] | None  # None: it is no function
    args: tuple[Any, ...]
    _kwargs: Mapping[str, Any]
    _options: dict[str, Any] | None  # None: no field is set that few tasks set
    _bound: BoundInputs | None  # None: it has no parents

    @property
    def kind(self) -> str:
        """`"function"`, `"executable"` or `"ai"`."""

    def __getitem__(self, name: str, /) -> Any: ...
    def __setitem__(self, name: str, value: Any, /) -> None: ...
    def get(self, name: str, default: Any = None, /) -> Any:
        """Return a field."""

    def update(self, fields: Mapping[str, Any], /) -> None:
        """Set fields."""


#: A task of `rhapsody.api`, or the plain dict of another framework with the same fields.
Task = TaskObject | dict[str, Any]


class Event(NamedTuple):
    """Reports the state of a task (or of its uid), with its results once it has ended."""

    task: Task | str
    state: str
    fields: Fields | None = None


#: The fields of an `Event` as a plain tuple, for the pools, which report two for each function: it
#: takes 30 ns to make, and an `Event` 220 (Python 3.11, one core of a virtual machine).
EventTuple = tuple[Task, str, Fields | None]


def kind_of(task: Task) -> str:
    """Return `"function"`, `"executable"` or `"ai"`."""
    if not isinstance(task, dict):
        return task.kind
    if task.get("function") is not None:
        return "function"
    return "ai" if task.get("prompt") else "executable"
