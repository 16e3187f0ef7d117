"""Processes that Dragon starts: what they run, where they go, how they end. Calls may block."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import signal
from collections.abc import Iterable
from typing import Any, NamedTuple

from rhapsody.runtime.arguments import command_of

from .node.context import GRACE, RunContext
from .node.messages import spill
from .node.worker import run_rank
from .resources import Placement
from .task import DragonTask

__all__ = ["RankTarget", "end_processes", "host_policy", "placement_policy", "rank_target"]

# Bytes of a call above which it goes through a file: Dragon takes 128 KiB for all arguments of a
# process.
_LARGEST_ARGUMENT = 64 << 10


class RankTarget(NamedTuple):
    """What a process runs, as Dragon's `ProcessTemplate` and `Process` take it."""

    target: Any  # a function, or the path of an executable
    args: tuple[Any, ...]


def rank_target(context: RunContext, task: DragonTask, rank: int) -> RankTarget:
    """Return what a rank of a job runs. A large call is written to a file, once for all ranks."""
    if task.payload is None:
        name, *words = command_of(task.task)
        if "stdin" in task.templates[rank]:
            return RankTarget(name, tuple(words))
        # Dragon leaves a pipe open there; who reads from it would wait for good (0.15.0). It looks
        # for the executable here, not where it will run.
        path = os.path.abspath(shutil.which(name) or name)
        return RankTarget("/bin/sh", ("-c", 'exec "$0" "$@" </dev/null', path, *words))
    path = f"{task.templates[rank]['stdout']}.result"
    if task.rank_call is None:
        task.rank_call = spill(task.payload, f"{path}.call", _LARGEST_ARGUMENT)
    return RankTarget(run_rank, (context, task.number, rank, task.rank_call, path))


def host_policy(host: str) -> Any:
    """Return Dragon's policy for a process on a host."""
    policy = importlib.import_module("dragon.infrastructure.policy").Policy
    return policy(placement=policy.Placement.HOST_NAME, host_name=host)


def placement_policy(placement: Placement, given: Any) -> Any:
    """Return Dragon's policy for a rank; what a policy `given` by the task's author says is kept.

    A policy that names the host by its Dragon id is not changed.
    """
    if given is None:
        given = host_policy(placement.host)
    elif given.placement == type(given).Placement.HOST_ID:
        return given
    return dataclasses.replace(
        given,
        placement=type(given).Placement.HOST_NAME,
        host_name=placement.host,
        cpu_affinity=given.cpu_affinity or placement.cpus,
        gpu_affinity=given.gpu_affinity or placement.gpus,
    )


def end_processes(puids: Iterable[int]) -> None:
    """Send SIGTERM to processes of Dragon's, and SIGKILL after `GRACE`. Blocks until they end.

    Raises:
        TimeoutError: some have not ended.
    """
    process = importlib.import_module("dragon.globalservices.process")
    left = list(puids)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not left:
            return
        for puid in left:
            process.kill(puid, sig=number, hide_stderr=True)
        _, statuses = process.multi_join(left, timeout=GRACE, join_all=True)
        left = [puid for puid in left if statuses[str(puid)][0] != 0]
    if left:
        raise TimeoutError(f"{len(left)} processes do not end")
