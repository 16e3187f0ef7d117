"""From a task to what Dragon is given: a pickled order for a worker, or the ranks of a job."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rhapsody.backends.options import EXECUTABLE_OPTIONS
from rhapsody.runtime import serialization
from rhapsody.runtime.arguments import command_of, inputs_of
from rhapsody.runtime.resources import Resources
from rhapsody.runtime.task import Task, kind_of

__all__ = [
    "TEMPLATE_KEYS",
    "DragonTask",
    "Nodes",
    "Place",
    "Planner",
    "host_of",
    "is_job",
    "templates_of",
    "wants_places",
]

#: keys of a process template; target, args and kwargs are the task's own
TEMPLATE_KEYS = frozenset({"cwd", "env", "stdin", "stdout", "stderr", "policy", "options"})


class Nodes:
    """What the nodes of a runtime have, by host name.

    Args:
        cores: how many ranks at once: for Dragon's Batch half of what the kernel counts, since it
            takes every core for two hardware threads.
        gpus: names of GPUs.
        cpus: ids of the CPUs that are granted to us there, hardware threads of a core together.
        without_pmix: the nodes on which Dragon finds no libpmix.so.

    Attributes:
        cpus: for each core that a rank can have to itself, the ids of its CPUs. Fewer than `cores`
            where fewer CPUs are granted.
    """

    def __init__(
        self,
        cores: Mapping[str, int],
        gpus: Mapping[str, Sequence[int]],
        cpus: Mapping[str, Sequence[int]],
        without_pmix: Iterable[str] = (),
    ) -> None:
        self.cores = dict(cores)
        self.gpus = {host: list(found) for host, found in gpus.items()}
        self.cpus = {host: _in_parts(cpus[host], number) for host, number in cores.items()}
        self.without_pmix = sorted(without_pmix)

    def room(self, host: str, need: Resources) -> int:
        """How many ranks a node has room for when it is empty."""
        pinned = wants_places(need)
        room = (len(self.cpus[host]) if pinned else self.cores[host]) // need.cores_per_rank
        if need.gpus_per_rank:
            room = min(room, len(self.gpus.get(host, ())) // need.gpus_per_rank)
        return room

    def describe(self) -> str:
        """Return `2 nodes: a (4 cores, 1 GPU), b (4 cores)`."""
        said = []
        for host, cores in self.cores.items():
            gpus = len(self.gpus.get(host, ()))
            more = f", {gpus} GPU{'s' * (gpus > 1)}" if gpus else ""
            said.append(f"{host} ({cores} core{'s' * (cores > 1)}{more})")
        return f"{len(said)} node{'s' * (len(said) > 1)}: {', '.join(said)}"


def _in_parts(cpus: Sequence[int], parts: int) -> list[list[int]]:
    """Split CPUs into so many cores of equal size, or into fewer of one CPU each.

    >>> _in_parts([0, 4, 1, 5, 2], 2)
    [[0, 4], [1, 5]]
    """
    size = max(1, len(cpus) // parts)
    return [list(cpus[at : at + size]) for at in range(0, len(cpus), size)][:parts]


class Place(NamedTuple):
    """Where a rank runs, and what it has there."""

    host: str
    cores: list[list[int]]  # each with its CPUs
    gpus: list[int]
    pinned: bool

    @property
    def cpus(self) -> list[int]:
        """The CPUs that it is bound to; none where it may use all of the node."""
        return sorted(cpu for core in self.cores for cpu in core) if self.pinned else []


class DragonTask:
    """A task between its submit and its end."""

    __slots__ = (
        "begun", "call", "codes", "crew", "data", "ended", "handle", "host", "jobs", "number",
        "overdue", "pinned", "places", "pmi", "rank_ends", "started", "stopping", "task", "timer",
        "uid",
    )  # fmt: skip

    def __init__(self, task: Task, number: int) -> None:
        self.task = task
        self.uid: str = task["uid"]
        self.number = number
        self.data: bytes | None = None  # the order for a worker, or the call of ranks
        self.call: bytes | str | None = None  # as the ranks get it: or a file that it is in
        self.jobs: list[tuple[int, dict[str, Any]]] = []  # or the templates of a job
        self.pmi: str | None = None
        self.pinned = False  # whether each rank has cores and GPUs to itself
        self.places: list[Place] = []  # that its ranks have now
        self.crew: Any = None  # the one that has it
        self.handle: Any = None  # Batch's own task
        self.begun = False
        self.started = 0.0
        self.ended = False
        self.host: str | None = None
        self.rank_ends: dict[int, Any] = {}
        self.codes: list[int] | None = None
        self.stopping: Any = None  # a future: whether it was stopped
        self.timer: Any = None
        self.overdue: float | None = None  # its time limit, which is over

    @property
    def is_function(self) -> bool:
        """Whether it is a function, of one rank or several."""
        return kind_of(self.task) == "function"

    @property
    def is_mpi_job(self) -> bool:
        """Whether its ranks are one MPI_COMM_WORLD, by PMIx."""
        return self.pmi == "pmix" and self.ranks() > 1

    def ranks(self) -> int:
        """How many processes a job has."""
        return sum(count for count, _ in self.jobs)


class Planner:
    """Plans the tasks of one backend.

    Args:
        work_dir: returns the folder for output files, which all nodes have to see.
        cwd: the folder in which tasks run that name none; None for the current one.
        all_jobs: whether every task runs in processes of its own.
    """

    def __init__(
        self, work_dir: Callable[[], str], cwd: str | None = None, *, all_jobs: bool = False
    ) -> None:
        self._work_dir = work_dir
        self._cwd = cwd
        self._all_jobs = all_jobs
        self._numbers = itertools.count(1)

    def number(self) -> int:
        """A number that no flight has had."""
        return next(self._numbers)

    def plan(self, task: Task, pickled: dict[int, bytes]) -> DragonTask:
        """Return a task's flight; `pickled` keeps the functions of this burst, by identity.

        Raises:
            SerializationError: its function or arguments cannot be pickled.
        """
        flight = DragonTask(task, self.number())
        plain = not isinstance(task, dict) and task._options is None  # most: nothing to look up
        options = {} if plain else task.get("task_backend_specific_kwargs") or {}
        need: Resources | None = None if plain else task.get("resources")
        call = _call(task, pickled) if kind_of(task) == "function" else None
        if self._all_jobs or (not plain and is_job(task, options)):
            flight.data = call
            flight.jobs = self._templates(task, options, need or Resources())
            flight.pinned = wants_places(need)
            flight.pmi = options.get("pmi", "pmix" if flight.ranks() > 1 else None)
        else:
            program = None if call is not None else _program(task, options, need, self._cwd)
            # A TaskMessage once unpickled there; making one here takes longer than pickling it.
            flight.data = pickle.dumps((self._work_dir(), call, program), pickle.HIGHEST_PROTOCOL)
        return flight

    def _templates(
        self, task: Task, options: Mapping[str, Any], need: Resources
    ) -> list[tuple[int, dict[str, Any]]]:
        """One template per rank, each with files of its own for what it prints."""
        given = templates_of(options, need.ranks) or [(need.ranks, {})]
        env = {**(need.env or {}), **(options.get("env") or {})}
        cwd = options.get("cwd") or need.cwd or self._cwd
        base = os.path.join(self._work_dir(), task["uid"])
        jobs: list[tuple[int, dict[str, Any]]] = []
        for count, template in given:
            for _ in range(count):
                rank = len(jobs)
                one: dict[str, Any] = {"cwd": os.fspath(cwd or os.getcwd()), **template}
                one["env"] = {**env, **(template.get("env") or {})}
                one.setdefault("stdout", f"{base}.{rank}.stdout")
                one.setdefault("stderr", f"{base}.{rank}.stderr")
                jobs.append((1, one))
        return jobs


def is_job(task: Task, options: Mapping[str, Any]) -> bool:
    """Whether a task runs in processes that Dragon starts for it alone."""
    need: Resources | None = task.get("resources")
    asked = need is not None and (need.ranks > 1 or need.cores > 1 or need.gpus > 0)
    templates = "process_template" in options or "process_templates" in options
    return bool(asked or templates or options.get("isolated"))


def wants_places(need: Resources | None) -> bool:
    """Whether a task's ranks shall have cores and GPUs to themselves."""
    return need is not None and (need.cores_per_rank > 1 or need.gpus_per_rank > 0)


def templates_of(options: Mapping[str, Any], ranks: int = 1) -> list[tuple[int, Mapping[str, Any]]]:
    """The process templates among options, with how many ranks each is for: `ranks` for one."""
    if (one := options.get("process_template")) is not None:
        return [(ranks, one)]
    return list(options.get("process_templates") or ())


def host_of(template: Mapping[str, Any]) -> str | None:
    """The host that the policy of a process template names."""
    return getattr(template.get("policy"), "host_name", None) or None


_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})


def _call(task: Task, pickled: dict[int, bytes]) -> bytes:
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


def _program(
    task: Task, options: Mapping[str, Any], need: Resources | None, folder: str | None
) -> dict[str, Any]:
    """An executable as the local backend on a node takes it: a plain dict of plain values."""
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
