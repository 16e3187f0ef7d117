"""Arguments of a task: those among which tasks are looked for, and what is run with them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .task import Task
from .text import argument_str, plain_str

__all__ = [
    "CONTAINERS",
    "arguments_of",
    "command_of",
    "elements",
    "inputs_of",
    "map_elements",
    "shell_command",
]

#: Containers among arguments in which tasks are looked for, one level deep.
CONTAINERS = (list, tuple, dict)


def elements(value: Any) -> Iterable[Any]:
    """Return a container's elements (a dict's values), or the argument itself where it is none."""
    if type(value) is dict:
        return value.values()
    return value if type(value) in CONTAINERS else (value,)


def map_elements(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return an argument with `change` applied to its `elements`."""
    if type(value) is list or type(value) is tuple:
        return type(value)(map(change, value))
    if type(value) is dict:
        return {name: change(inner) for name, inner in value.items()}
    return change(value)


def inputs_of(task: Task) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return args and kwargs of a function task, with its parents' results in place."""
    if isinstance(task, dict):
        return task.get("args") or (), task.get("kwargs") or {}
    bound = task._bound
    return (task.args, task._kwargs) if bound is None else (bound.args, bound.kwargs)


def arguments_of(task: Task) -> Sequence[Any]:
    """Return the arguments of an executable task, with its parents' results in place."""
    if isinstance(task, dict) or task._bound is None:
        return task.get("arguments") or ()
    return task._bound.arguments


def command_of(task: Task, *, shell: bool = False) -> list[str]:
    """Return the command line of an executable task, with its parents' results in place.

    With `shell`, the executable is itself a command line, which `/bin/sh` reads; the arguments are
    quoted, so that the shell interprets nothing but what the author wrote as the executable.
    """
    words = [argument_str(argument) for argument in arguments_of(task)]
    program = plain_str(task["executable"])
    return shell_command([program, *words]) if shell else [program, *words]


def shell_command(words: Sequence[str]) -> list[str]:
    """Return how to have `/bin/sh` run the command line `words[0]`; the other words are quoted."""
    return ["/bin/sh", "-c", " ".join([words[0], *map(shlex.quote, words[1:])])]
