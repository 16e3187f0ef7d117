"""Options of tasks on Dask (`task_backend_specific_kwargs`), and what Dask cannot run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rhapsody.backends import options as common
from rhapsody.backends.options import EXECUTABLE_OPTIONS, Option, is_number, option, option_table
from rhapsody.runtime.errors import TaskValidationError
from rhapsody.runtime.resources import Resources
from rhapsody.runtime.task import Task, kind_of
from rhapsody.runtime.text import describe_value

__all__ = ["DASK_OPTIONS", "OPTIONS", "check_options", "worker_names"]


def _is_text(value: object) -> bool:
    """Whether it can be a key or be sent in a message; anything else breaks the connection."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a file name that is not UTF-8
        return False
    return True


def worker_names(workers: Any) -> list[str | int]:
    """Return the option `workers` as a list."""
    return [workers] if isinstance(workers, (str, int)) else list(workers)


def _are_workers(value: object) -> bool:
    if not isinstance(value, (str, int, list, tuple, set)):
        return False
    # Those of a `LocalCluster` are named by int.
    return all(type(name) is int or _is_text(name) for name in worker_names(value))


def _resources_fault(value: object) -> str | None:
    if not isinstance(value, Mapping):
        expected = "a dict of numbers, such as {'GPU': 1}"
        return f"resources must be {expected}, not {describe_value(value)}"
    for name, amount in value.items():
        if not isinstance(name, str):
            return f"resources must map str to numbers; a name in it is {describe_value(name)}"
        if not is_number(amount) or not amount >= 0:
            return (
                f"resources[{name!r}] must be a number of at least 0, not {describe_value(amount)}"
            )
    return None


#: options that Dask itself has, for functions and executables
DASK_OPTIONS: Mapping[str, Option] = option_table(
    Option("resources", _resources_fault),
    option(
        "priority",
        lambda value: is_number(value) and not math.isnan(value),
        "a number; higher runs earlier",
    ),
    option(
        "retries",
        lambda value: is_number(value) and isinstance(value, int) and value >= 0,
        "an int of at least 0: how many more times to run it",
    ),
    option("workers", _are_workers, "an address or name of a worker, or a list of them"),
    common.flag("allow_other_workers"),
    option("key", _is_text, "a non-empty str that UTF-8 can encode"),
)
OPTIONS: Mapping[str, Option] = {**DASK_OPTIONS, **EXECUTABLE_OPTIONS}


def check_options(task: Task, options: Mapping[str, Any]) -> None:
    """Refuse options and resources that Dask cannot give a task.

    Raises:
        TaskValidationError: says which, and what is accepted.
    """
    common.check_options(task, options, OPTIONS)
    if options.get("allow_other_workers") and options.get("workers") is None:
        raise TaskValidationError(f"task '{task['uid']}': allow_other_workers needs workers")
    need: Resources | None = task.get("resources")
    if need is not None and kind_of(task) == "function":
        _check_function(task["uid"], need)


def _check_function(uid: str, need: Resources) -> None:
    if need.ranks > 1:
        raise TaskValidationError(
            f"task '{uid}': Dask runs a function as one rank, not {need.ranks}; make it an"
            " executable, or use a backend with MPI functions"
        )
    if need.env or need.cwd:
        raise TaskValidationError(
            f"task '{uid}': env and cwd belong to a process, and a Dask worker runs functions on"
            " its threads; set them for the workers, or make it an executable"
        )
