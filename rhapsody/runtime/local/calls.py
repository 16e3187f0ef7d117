"""A function call on its way to a thread or a process."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import CoroutineType
from typing import Any

__all__ = ["Call", "Event", "Report", "is_coroutine"]

#: a task, its state, and its results
Event = tuple[Any, str, "dict[str, Any] | None"]
#: takes events as `BaseExecutionBackend.deliver_burst` does
Report = Callable[[Sequence[Event]], None]


class Call:
    """What is called, for which task, and what is set around it."""

    __slots__ = ("alone", "args", "cores", "env", "function", "kwargs", "task", "uid")

    def __init__(
        self,
        task: Any,
        uid: str,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        cores: tuple[int, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.task = task
        self.uid = uid
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.cores = cores
        self.env = env
        self.alone = False  # it shall not travel with others


def is_coroutine(value: Any) -> bool:
    """Whether a call returned a coroutine, so that the function was an async one."""
    # Not asyncio's own test: before Python 3.12 it takes a generator for one.
    return type(value) is CoroutineType or (hasattr(value, "send") and isinstance(value, Coroutine))
