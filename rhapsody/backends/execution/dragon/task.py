"""From a task to what Dragon is given: a message for a worker, or the process templates of a job.

A job is a task that runs in processes of its own, one per rank.
"""

from __future__ import annotations

import itertools
import os
import pickle
from asyncio import Future, TimerHandle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rhapsody.backends.options import EXECUTABLE_OPTIONS
from rhapsody.runtime import serialization
from rhapsody.runtime.arguments import command_of, inputs_of
from rhapsody.runtime.resources import Resources
from rhapsody.runtime.task import Task, kind_of

from .node.messages import pack_task
from .resources import Placement, is_pinned

__all__ = [
    "TEMPLATE_KEYS",
    "DragonTask",
    "Outcome",
    "Planner",
    "Template",
    "host_of",
    "is_job",
    "templates_of",
]

#: keys of a process template; target, args and kwargs are the task's own
TEMPLATE_KEYS = frozenset({"cwd", "env", "stdin", "stdout", "stderr", "policy", "options"})

# A process template as a task's author gives it: values by `TEMPLATE_KEYS`.
Template = Mapping[str, Any]


class Outcome(NamedTuple):
    """How a task ended: its terminal state and result fields."""

    state: str
    fields: dict[str, Any]


@dataclass(slots=True, eq=False)
class DragonTask:
    """A task between its submit and its end."""

    task: Task
    number: int  # of this attempt: no other task of the backend has it
    uid: str = field(init=False)
    payload: bytes | None = None  # the message for a worker, or the call of a job's ranks
    templates: list[dict[str, Any]] = field(default_factory=list)  # of a job: one per rank
    rank_call: bytes | str | None = None  # the call as ranks get it, or a file that it is in
    pmi: str | None = None
    pinned: bool = False  # whether each rank has cores and GPUs to itself
    placements: list[Placement] = field(default_factory=list)  # that its ranks have now
    timeout: float | None = None  # seconds from its start

    executor: int | None = None  # the number of the one that has it
    handle: Any = None  # the executor's own object, once it was given to Dragon
    host: str | None = None
    timer: TimerHandle | None = None  # of its time limit
    rank_outcomes: dict[int, Outcome] = field(default_factory=dict)
    exit_codes: list[int] | None = None
    stop_result: Future[bool] | None = None  # while somebody waits for its stop: whether it was
    stopping_on_nodes: bool = False  # exit codes and lost workers may come from our signals
    timed_out: bool = False
    started: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.uid = self.task["uid"]

    @property
    def is_function(self) -> bool:
        """Whether it is a function, of one rank or several."""
        return kind_of(self.task) == "function"

    @property
    def is_job(self) -> bool:
        """Whether it runs in processes of its own."""
        return bool(self.templates)

    @property
    def is_mpi_job(self) -> bool:
        """Whether its ranks are one MPI_COMM_WORLD, by PMIx."""
        return self.pmi == "pmix" and self.ranks > 1

    @property
    def ranks(self) -> int:
        """How many processes it has of its own."""
        return len(self.templates)


class Planner:
    """Plans the tasks of one backend.

    Args:
        work_dir: returns the folder for output files, which all nodes have to see.
        cwd: the folder in which tasks run that name none; None for the current one.
        all_jobs: whether every task runs in processes of its own.
    """

    def __init__(self, work_dir: Callable[[], str], cwd: str | None, *, all_jobs: bool) -> None:
        self._work_dir = work_dir
        self._cwd = cwd
        self._all_jobs = all_jobs
        self._numbers = itertools.count(1)

    def next_number(self) -> int:
        """Return a number that no task has had."""
        return next(self._numbers)

    def plan(self, task: Task, pickled: dict[int, bytes]) -> DragonTask:
        """Return a task as executors take it; `pickled` keeps a burst's functions, by `id`.

        Raises:
            SerializationError: its function or arguments cannot be pickled.
        """
        planned = DragonTask(task, self.next_number())
        plain = not isinstance(task, dict) and task._options is None  # most: nothing to look up
        options = {} if plain else task.get("task_backend_specific_kwargs") or {}
        need: Resources | None = None if plain else task.get("resources")
        planned.timeout = options.get("timeout")
        call = _pack_call(task, pickled) if kind_of(task) == "function" else None
        if self._all_jobs or (not plain and is_job(task, options)):
            planned.payload = call
            planned.templates = self._templates(task, options, need or Resources())
            planned.pinned = is_pinned(need)
            planned.pmi = options.get("pmi", "pmix" if planned.ranks > 1 else None)
        else:
            executable = None if call is not None else _executable(task, options, need, self._cwd)
            planned.payload = pack_task(self._work_dir(), call, executable)
        return planned

    def _templates(
        self, task: Task, options: Mapping[str, Any], need: Resources
    ) -> list[dict[str, Any]]:
        """Return a template per rank, each with files of its own for what the rank prints."""
        env = {**(need.env or {}), **(options.get("env") or {})}
        cwd = options.get("cwd") or need.cwd or self._cwd
        base = os.path.join(self._work_dir(), task["uid"])
        templates: list[dict[str, Any]] = []
        for count, given in templates_of(options, need.ranks) or [(need.ranks, {})]:
            for rank in range(len(templates), len(templates) + count):
                template: dict[str, Any] = {"cwd": os.fspath(cwd or os.getcwd()), **given}
                template["env"] = {**env, **(given.get("env") or {})}
                template.setdefault("stdout", f"{base}.{rank}.stdout")
                template.setdefault("stderr", f"{base}.{rank}.stderr")
                templates.append(template)
        return templates


def is_job(task: Task, options: Mapping[str, Any]) -> bool:
    """Whether a task runs in processes that Dragon starts for it alone."""
    need: Resources | None = task.get("resources")
    asked = need is not None and (need.ranks > 1 or need.cores > 1 or need.gpus > 0)
    templates = "process_template" in options or "process_templates" in options
    return bool(asked or templates or options.get("isolated"))


def templates_of(options: Mapping[str, Any], ranks: int) -> list[tuple[int, Template]]:
    """Return the process templates among options, each with the number of its ranks.

    A single `process_template` is for all `ranks`.
    """
    if (one := options.get("process_template")) is not None:
        return [(ranks, one)]
    return list(options.get("process_templates") or ())


def host_of(template: Template) -> str | None:
    """Return the host that the policy of a process template names."""
    return getattr(template.get("policy"), "host_name", None) or None


_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})


def _pack_call(task: Task, pickled: dict[int, bytes]) -> bytes:
    """Pickle function and arguments; a function once per burst."""
    function = task["function"]
    args, kwargs = inputs_of(task)
    first = pickled.get(id(function))
    if first is None:
        blob = serialization.dumps(function, "function")
        first = pickled[id(function)] = len(blob).to_bytes(4, "big") + blob
    if not kwargs and _PLAIN.issuperset(map(type, args)):
        rest = pickle.dumps((tuple(args), {}), pickle.HIGHEST_PROTOCOL)
    else:
        rest = serialization.dumps((tuple(args), dict(kwargs)), "arguments")
    return first + rest


def _executable(
    task: Task, options: Mapping[str, Any], need: Resources | None, folder: str | None
) -> dict[str, Any]:
    """Return an executable as the local backend on a node takes it: a dict of plain values."""
    kept = {name: options[name] for name in EXECUTABLE_OPTIONS.keys() & options.keys()}
    env = {**((need and need.env) or {}), **(options.get("env") or {})}
    cwd = options.get("cwd") or (need and need.cwd) or folder or os.getcwd()
    kept.update(env=env, cwd=os.path.abspath(cwd))
    words = command_of(task)
    return {
        "uid": task["uid"],
        "executable": words[0],
        "arguments": words[1:],
        "capture_stdio": bool(task.get("capture_stdio")),
        "task_backend_specific_kwargs": kept,
    }
