"""A task on its way through Dask, and what it asks of the cluster in Dask's terms."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rhapsody.runtime.errors import TaskValidationError
from rhapsody.runtime.task import Task, kind_of

__all__ = [
    "DASK_KEYS",
    "PROGRAM_KEYS",
    "DaskTask",
    "Ending",
    "check_options",
    "describe",
    "describe_all",
    "fits",
    "wanted",
]

#: options of executables; the others are Dask's own, and for every task
PROGRAM_KEYS = frozenset({"cwd", "env", "env_replace", "shell", "stdin"})
DASK_KEYS = frozenset({"resources", "priority", "retries", "workers", "allow_other_workers", "key"})


class DaskTask:
    """What the backend keeps of a task from its submit until its owner has heard of its end."""

    __slots__ = (
        "call", "captured", "children", "failure", "future", "held", "key", "options", "parents",
        "runner", "seconds", "stopping", "task", "timer", "uid", "wants", "wave", "worker",
    )  # fmt: skip

    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        self.task = task
        self.uid: str = task["uid"]
        self.options = options
        self.key = ""
        self.runner: Callable[..., Any] | None = None
        self.call: Any = None  # what the runner gets; let go of when Dask has it
        self.future: Any = None
        self.wants: dict[str, float] = {}
        self.captured = False
        self.parents: list[DaskTask] = []  # those whose results Dask hands over itself
        self.children: list[DaskTask] = []
        self.wave = 0  # above those of its parents: they are given to Dask first
        self.worker: str | None = None  # the address of the last one that started it
        self.seconds = 0.0  # that it computed
        self.failure: BaseException | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.stopping = False  # its workers have been told to stop it,
        self.held: tuple[str, str, float, int] | None = None  # and this came meanwhile

    def is_stopping(self) -> bool:
        """Whether it, or one that it depends on, is being stopped."""
        seen = {self}
        queue = [self]
        while queue:
            flight = queue.pop()
            if flight.stopping:
                return True
            queue += [parent for parent in flight.parents if parent not in seen]
            seen.update(flight.parents)
        return False

    def group(self) -> tuple[Any, ...]:
        """Tasks with equal ones can travel in one graph."""
        options = self.options
        if not options and not self.wants:
            return self.wave, self.runner.__name__ if self.runner else ""
        rest = [
            (name, repr(value)) for name, value in options.items() if name in DASK_KEYS - {"key"}
        ]
        return (
            self.wave,
            self.runner.__name__ if self.runner else "",
            repr(self.wants),
            *sorted(rest),
        )

    def dask_options(self) -> dict[str, Any]:
        """Keyword arguments of `Client.map`."""
        names = ("priority", "retries", "workers", "allow_other_workers")
        found = {name: self.options[name] for name in names if self.options.get(name) is not None}
        if isinstance(found.get("workers"), (int, tuple)):  # `Client.map` takes neither
            found["workers"] = _names_of(found["workers"])
        return found

    def stop_timer(self) -> None:
        """A worker has taken it after all."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def descent(flights: Iterable[DaskTask]) -> list[DaskTask]:
    """Return these flights and all that depend on them, each once, parents first."""
    found: dict[DaskTask, None] = dict.fromkeys(flights)
    queue = list(found)
    while queue:
        for child in queue.pop().children:
            if child not in found:
                found[child] = None
                queue.append(child)
    return sorted(found, key=lambda flight: flight.wave)


#: a flight, its terminal state, and the result fields
Ending = tuple[DaskTask, str, "dict[str, Any] | None"]

# ---------------------------------------------------------------------- options

_NUMBER = (int, float)
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "resources": ((Mapping,), "a dict of numbers, such as {'GPU': 1}"),
    "priority": (_NUMBER, "a number; higher runs earlier"),
    "retries": ((int,), "how many more times to run it"),
    "workers": (
        (str, int, list, tuple, set),
        "an address or name of a worker, or a list of them",
    ),
    "allow_other_workers": ((bool,), "True or False"),
    "key": ((str,), "a text that UTF-8 can hold"),
    "cwd": ((str, os.PathLike), "the path of a folder"),
    "env": ((Mapping,), "a dict of texts"),
    "env_replace": ((bool,), "True or False"),
    "shell": ((bool,), "True or False"),
    "stdin": ((str, bytes, Path), "a text or bytes, or the pathlib.Path of a file"),
}


def _is_text(value: object) -> bool:
    """Whether it can be a key, or stand in a message: anything else breaks the connection."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a file name that is no UTF-8
        return False
    return True


def _names_of(workers: Any) -> list[Any]:
    return [workers] if isinstance(workers, (str, int)) else list(workers)


def _are_workers(value: Any) -> bool:
    # Those of a `LocalCluster` are named by whole numbers.
    return all(type(name) is int or _is_text(name) for name in _names_of(value))


#: what else must hold of a value that is of the right type
_SENSIBLE: dict[str, Callable[[Any], bool]] = {
    "retries": lambda value: value >= 0,
    "workers": _are_workers,
    "key": _is_text,
}


def check_options(task: Task, options: Mapping[str, Any]) -> None:
    """Refuse options of wrong types, or for the wrong kind of task.

    Raises:
        TaskValidationError: says which, and what is accepted.
    """
    uid = task["uid"]
    for name, value in options.items():
        kinds, words = _KINDS[name]
        sensible = _SENSIBLE.get(name)
        if value is not None and not (
            isinstance(value, kinds) and (sensible is None or sensible(value))
        ):
            raise TaskValidationError(f"task '{uid}': {name} must be {words}, not {value!r}")
    for name, value in (options.get("resources") or {}).items():
        if not isinstance(name, str) or not isinstance(value, _NUMBER) or value < 0:
            raise TaskValidationError(
                f"task '{uid}': resources must map names to numbers, not {name!r}: {value!r}"
            )
    for name, value in (options.get("env") or {}).items():
        if not isinstance(name, str) or not isinstance(value, str) or "=" in name:
            raise TaskValidationError(
                f"task '{uid}': env must map texts to texts, not {name!r}: {value!r}"
            )
    if options.get("allow_other_workers") and options.get("workers") is None:
        raise TaskValidationError(f"task '{uid}': allow_other_workers needs workers")
    if kind_of(task) == "function":
        _check_function(uid, task.get("resources"), options)


def _check_function(uid: str, need: Any, options: Mapping[str, Any]) -> None:
    if wrong := PROGRAM_KEYS & options.keys():
        raise TaskValidationError(
            f"task '{uid}': {', '.join(sorted(wrong))} in task_backend_specific_kwargs are for"
            f" executables; a function takes {', '.join(sorted(DASK_KEYS))}"
        )
    if need is None:
        return
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


# ---------------------------------------------------------------------- resources


def wanted(task: Task, options: Mapping[str, Any]) -> dict[str, float]:
    """What a task asks of one worker: Dask's own resources, else `Resources` in its terms.

    `CPU` (where it is more than the one that a worker's thread stands for), `GPU`, and `MEMORY` in
    bytes: the names that Dask's documentation uses.
    """
    own = options.get("resources")
    if own is not None:
        return dict(own)
    need = task.get("resources")
    if need is None:
        return {}
    asked = {"CPU": need.cores if need.cores > 1 else 0, "GPU": need.gpus, "MEMORY": need.memory}
    return {name: value for name, value in asked.items() if value}


def fits(wants: Mapping[str, float], offer: Mapping[str, float]) -> bool:
    """Whether a worker with this offer can take it."""
    return all(offer.get(name, 0) >= amount for name, amount in wants.items())


def describe(offer: Mapping[str, float]) -> str:
    """Return `CPU=2, GPU=1`, or `nothing`."""
    return ", ".join(f"{name}={amount:g}" for name, amount in sorted(offer.items())) or "nothing"


def describe_all(offers: Iterable[Mapping[str, float]]) -> str:
    """Return what the different kinds of workers advertise, `; ` between them."""
    return "; ".join(map(describe, offers)) or "nothing"
