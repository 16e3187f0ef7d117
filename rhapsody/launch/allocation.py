"""Reads from the environment which job of Slurm or PBS this is, and how many nodes it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from rhapsody.runtime.errors import ResourceError

__all__ = ["Allocation", "find_allocation"]


class Allocation(NamedTuple):
    """A job of a workload manager; its `str` names the job, for messages."""

    manager: Literal["Slurm", "PBS"]
    job_id: str  # may be empty
    nodes: int

    def __str__(self) -> str:
        return f"the {self.manager} job {self.job_id}".rstrip()


def find_allocation(environ: Mapping[str, str]) -> Allocation | None:
    """Return the allocation that the environment describes; None outside of a job.

    Raises:
        ResourceError: the node file of a PBS job cannot be read.
    """
    job_id = environ.get("SLURM_JOB_ID")
    if job_id:
        count = environ.get("SLURM_JOB_NUM_NODES", "")
        return Allocation("Slurm", job_id, int(count) if count.isdigit() else 1)
    path = environ.get("PBS_NODEFILE")
    if not path:
        return None
    allocation = Allocation("PBS", environ.get("PBS_JOBID", ""), 1)
    try:
        with open(path) as file:
            hosts = {line.strip() for line in file} - {""}  # a line for each slot of a node
    except OSError as error:
        raise ResourceError(
            f"{allocation}: cannot read PBS_NODEFILE {path}: {error.strerror}"
        ) from None
    return allocation._replace(nodes=len(hosts) or 1)
