"""Dragon driven directly, as the head of a runtime does it: for the tests of the harness."""

from __future__ import annotations

import os
import socket
from collections import Counter
from typing import Any

_batch: Any = None


def nodes() -> list[tuple[str, int, int]]:
    """Name, number of CPUs and of GPUs of each node, as Dragon sees them, by name."""
    from dragon.native.machine import Node, System

    found = [Node(huid) for huid in System().nodes]
    return sorted((node.hostname, node.num_cpus, len(node.gpus or ())) for node in found)


def open_batch() -> None:
    """Make the Batch that the others use."""
    from dragon.workflows.batch import Batch

    from rhapsody.backends.execution.dragon.runtime import init_local_services

    init_local_services()
    global _batch
    _batch = Batch(results_ddict_managers_per_pool=1)  # a process each


def close_batch() -> None:
    """End it."""
    _batch.join()
    _batch.destroy()


def here(_: int) -> str:
    """A task: where it ran."""
    return socket.gethostname()


def hosts_of_functions(count: int) -> dict[str, int]:
    """Run so many functions; how many ran on each host."""
    tasks = [_batch.function(here, number) for number in range(count)]
    return Counter(task.get() for task in tasks)


def run_hostname(folder: str, host: str | None = None) -> tuple[int, str]:
    """Run ``hostname`` as a process, on a host; its exit code and what it wrote."""
    out = os.path.join(folder, f"out-{host}")
    task = _batch.options(stdout=out).process(_hostname(host))
    code = task.get()
    with open(out) as file:
        return code, file.read().strip()


def run_job(folder: str, ranks: int) -> tuple[list[int], list[str]]:
    """Run ``hostname`` as a job; exit codes, and what the ranks wrote."""
    out = os.path.join(folder, "out-job")
    task = _batch.options(pmi=None, stdout=out).job([(ranks, _hostname(None))])
    codes = task.get()
    with open(out) as file:
        return codes, sorted(file.read().split())


def _hostname(host: str | None) -> Any:
    from dragon.infrastructure.policy import Policy
    from dragon.native.process import ProcessTemplate

    if host is None:
        return ProcessTemplate("/bin/hostname", args=())
    place = Policy(placement=Policy.Placement.HOST_NAME, host_name=host)
    return ProcessTemplate("/bin/hostname", args=(), policy=place)
