"""What a task runs: its arguments with parents' results in place, and its command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .texts import plain, word_of

__all__ = ["command_of", "inputs_of"]


def inputs_of(task: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return args and kwargs of a function task, the results of its parents among them."""
    if isinstance(task, dict):
        return task.get("args") or (), task.get("kwargs") or {}
    bound = task._bound
    return (task.args, task._kwargs) if bound is None else (bound["args"], bound["kwargs"])


def command_of(task: Any, *, shell: bool = False) -> list[str]:
    """Return the command line of an executable task.

    With `shell` the executable is a command line of its own, which `/bin/sh` reads; arguments are
    quoted, so that only the author's own text is code.
    """
    bound = None if isinstance(task, dict) else task._bound
    arguments = (task.get("arguments") or []) if bound is None else bound["arguments"]
    words = [word_of(argument) for argument in arguments]
    program = plain(task["executable"])
    if shell:
        return ["/bin/sh", "-c", " ".join([program, *map(shlex.quote, words)])]
    return [program, *words]
