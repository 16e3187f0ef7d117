"""Calls of authors' functions: what is called for which task, and the call itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import CoroutineType
from typing import Any

from rhapsody.runtime.task import EventTuple, Task

__all__ = ["Call", "Report", "call_function", "strip_frames"]

#: takes events, from any thread, as `BaseExecutionBackend.deliver_burst` does
Report = Callable[[Sequence[EventTuple]], None]


class Call:
    """A function call of a task; with `cores` and `env` set around it, if any."""

    __slots__ = ("alone", "args", "cores", "env", "function", "kwargs", "task", "uid")

    def __init__(
        self,
        task: Task,
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
        self.alone = False  # it must not share a bundle with others


def call_function(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cores: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    watch: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]] | None = None,
) -> Any:
    """Call a function on this thread and return its value; an async one runs by `asyncio.run`.

    Args:
        function: the author's function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        cores: the thread's CPU affinity for the time of the call; unchanged where empty.
        env: environment variables of this process for the time of the call.
        watch: wraps the coroutine of an async function.

    Raises:
        BaseException: whatever the function raises; see `strip_frames`.
    """
    undo = _set_up(cores, env) if cores or env else None
    try:
        value = function(*args, **kwargs)
        # Not asyncio's own test: before Python 3.12 it takes a generator for a coroutine.
        if type(value) is CoroutineType or (
            hasattr(value, "send") and isinstance(value, Coroutine)
        ):
            value = asyncio.run(value if watch is None else watch(value))
        return value
    finally:
        if undo is not None:
            undo.close()


def strip_frames(error: BaseException) -> None:
    """Let the traceback of what `call_function` raised begin in the author's code.

    Of another error, drop the frame that caught it.
    """
    first = trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not call_function.__code__:
        trace = trace.tb_next
    found = trace or first
    error.__traceback__ = None if found is None else found.tb_next


def _set_up(cores: Sequence[int], env: Mapping[str, str] | None) -> contextlib.ExitStack:
    with contextlib.ExitStack() as undo:
        if cores and hasattr(os, "sched_setaffinity"):
            undo.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores)
        if env:
            undo.callback(_restore, {name: os.environ.get(name) for name in env})
            os.environ.update(env)
        return undo.pop_all()


def _restore(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
