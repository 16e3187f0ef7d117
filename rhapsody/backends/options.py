"""Options of tasks (`task_backend_specific_kwargs`): their checks, the same on every backend.

A backend picks from what is here, adds its engine's own, and gives the table to `check_options`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rhapsody.runtime.errors import TaskValidationError
from rhapsody.runtime.task import Task, kind_of
from rhapsody.runtime.text import describe_value, environment_fault

__all__ = [
    "EXECUTABLE_OPTIONS",
    "Option",
    "check_options",
    "flag",
    "is_number",
    "option",
    "option_table",
]


class Option(NamedTuple):
    """A key of `task_backend_specific_kwargs`."""

    name: str
    fault: Callable[[Any], str | None]  # what is wrong with a value; None where nothing is


def option(name: str, accepts: Callable[[Any], bool], expected: str) -> Option:
    """Return an option whose values are checked as a whole; `name must be expected` is the error.

    The value is not in the error, unless it is a number: it may be a secret.
    """

    def fault(value: Any) -> str | None:
        if accepts(value):
            return None
        return f"{name} must be {expected}, not {describe_value(value)}"

    return Option(name, fault)


def flag(name: str) -> Option:
    """Return an option that is on or off."""
    return option(name, lambda value: isinstance(value, bool), "True or False")


def is_number(value: object) -> bool:
    """Whether a value is an `int` or `float`; a `bool` is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def option_table(*options: Option) -> dict[str, Option]:
    """Return options by their names."""
    return {each.name: each for each in options}


#: options that mean the same on every backend that has them, and that only executables take
EXECUTABLE_OPTIONS: Mapping[str, Option] = option_table(
    option("cwd", lambda value: isinstance(value, (str, os.PathLike)), "the path of a folder"),
    Option("env", environment_fault),
    flag("env_replace"),
    flag("shell"),
    option(
        "stdin",
        lambda value: isinstance(value, (str, bytes, Path)),
        "a str or bytes to read, or the pathlib.Path of a file",
    ),
)


def check_options(task: Task, options: Mapping[str, Any], accepted: Mapping[str, Option]) -> None:
    """Refuse options of executables for a function, and values of a wrong type or out of range.

    None is accepted for each, and means that the option is not given. All names are in `accepted`:
    `BaseExecutionBackend.check` has refused others.

    Raises:
        TaskValidationError: says which option is wrong, and what is accepted.
    """
    uid = task["uid"]
    if kind_of(task) == "function" and (wrong := EXECUTABLE_OPTIONS.keys() & options.keys()):
        known = sorted(accepted.keys() - EXECUTABLE_OPTIONS.keys())
        raise TaskValidationError(
            f"task '{uid}': options for executables in task_backend_specific_kwargs:"
            f" {', '.join(sorted(wrong))}; accepted for a function: {', '.join(known) or 'none'}"
        )
    for name, value in options.items():
        if value is not None and (fault := accepted[name].fault(value)):
            raise TaskValidationError(f"task '{uid}': {fault}")
