"""The command line that starts Dragon's launcher on what this machine or allocation has.

Read in dragonhpc 0.15.0, `launcher/launchargs.py` and `launcher/wlm/`: which workload managers it
knows, and by which variables it sees an allocation.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rhapsody.runtime.errors import ResourceError

from .shared_memory import SHARED_MEMORY, free_bytes

__all__ = [
    "POOL_SIZE",
    "Line",
    "check_shared_memory",
    "find_launcher",
    "line_for",
    "needed_bytes",
    "path_for",
]

#: the variable for the bytes of the pool that Dragon gives to the programs of a node
POOL_SIZE = "DRAGON_DEFAULT_SEG_SZ"
_POOL = 4 << 30  # its default
_OTHER_POOLS = 1 << 30  # the size of each of the two pools that Dragon makes for itself

# A name or an address; it goes to ssh, where a first dash would begin an option.
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.:-]*[A-Za-z0-9_])?")


class Line(NamedTuple):
    """Dragon's line without the program, and how many nodes it is for."""

    words: list[str]
    nodes: int


class _Allocation(NamedTuple):
    """What a workload manager has granted to this job."""

    wlm: str  # as Dragon's --wlm has it
    job: str
    nodes: int


def find_launcher(environ: Mapping[str, str]) -> str | None:
    """Return the path of the program `dragon`: beside this interpreter, else on the PATH.

    In this order, because another program, a media player, has the same name.
    """
    here = os.path.dirname(sys.executable)
    return shutil.which("dragon", path=here) or shutil.which("dragon", path=environ.get("PATH"))


def path_for(launcher: str, environ: Mapping[str, str]) -> str:
    """Return a PATH on which Dragon finds its other programs: as it is, if it finds this one."""
    path, here = environ.get("PATH", ""), os.path.dirname(launcher)
    if not here or shutil.which("dragon", path=path) == launcher:
        return path
    return here + (os.pathsep + path if path else "")


def line_for(
    launcher: str, nodes: int | None, hosts: Sequence[str], environ: Mapping[str, str]
) -> Line:
    """Compose the line for some nodes: of `hosts` by ssh, else of the allocation, else this one.

    `nodes` None stands for all of them.

    Raises:
        ResourceError: there are not so many; says how many there are, and of what.
        ValueError: a host has no name that ssh could take, or is named twice.
    """
    if hosts:
        return _over_ssh(launcher, nodes, hosts)
    granted = _allocation(environ)
    if nodes is None:
        nodes = granted.nodes if granted else 1
    if granted is None and nodes > 1:
        raise ResourceError(
            f"--nodes {nodes}: found no allocation (neither SLURM_JOB_ID nor PBS_NODEFILE is set), "
            "so that this machine is all there is; start it inside a Slurm or PBS job, or name the "
            "machines to reach by ssh: --hosts a,b"
        )
    if granted is not None and nodes > granted.nodes:
        raise ResourceError(
            f"--nodes {nodes}: {granted.job} has {_count(granted.nodes)}; ask for {nodes} when the "
            f"job is made, or take --nodes {granted.nodes} or less"
        )
    if granted is None or nodes == 1:
        # Always -s: where srun or qstat is installed the plain form takes to it, and may refuse.
        return Line([launcher, "-s"], 1)
    return Line([launcher, "-N", str(nodes), "--wlm", granted.wlm], nodes)


def _over_ssh(launcher: str, nodes: int | None, hosts: Sequence[str]) -> Line:
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ValueError(f"--hosts: {host!r} is no name of a host; names are as in a,b,c")
    if len(set(hosts)) < len(hosts):
        raise ValueError("--hosts: a host is named twice; each is one node")
    if nodes is not None and nodes > len(hosts):
        raise ResourceError(
            f"--nodes {nodes}: --hosts has {_count(len(hosts))}; name {nodes}, or leave --nodes out"
        )
    hosts = hosts[:nodes]
    # Without -t tcp Dragon takes its own agent for fast fabrics, which does not start elsewhere.
    words = ["--wlm", "ssh", "--hostlist", ",".join(hosts), "-t", "tcp"]
    return Line([launcher, *words], len(hosts))


def _allocation(environ: Mapping[str, str]) -> _Allocation | None:
    job = environ.get("SLURM_JOB_ID")
    if job:
        count = environ.get("SLURM_JOB_NUM_NODES", "")
        return _Allocation("slurm", f"the Slurm job {job}", int(count) if count.isdigit() else 1)
    path = environ.get("PBS_NODEFILE")
    if path:
        job = f"the PBS job {environ.get('PBS_JOBID', '')}".rstrip()
        try:
            with open(path) as file:
                nodes = {line.strip() for line in file} - {""}  # a line for each slot of a node
        except OSError as error:
            raise ResourceError(
                f"{job}: cannot read PBS_NODEFILE {path}: {error.strerror}"
            ) from None
        return _Allocation("pbs+pals", job, len(nodes) or 1)
    return None


def needed_bytes(environ: Mapping[str, str]) -> int:
    """Return how much of /dev/shm has to be free for Dragon to start.

    Dragon makes three pools, one after another, and none that is larger than what is free then,
    although little of it is ever written. A pool has a second file, for its blocks: of 64 MiB and
    3/256 of the pool's size (seen with 0.15.0). To that comes what the pools before it have
    written.

    Raises:
        ResourceError: the size that the environment gives is no number.
    """
    given = environ.get(POOL_SIZE) or str(_POOL)
    if not given.isdigit() or int(given) < 1:
        raise ResourceError(f"{POOL_SIZE} must be a number of bytes, not {given!r}")
    largest = max(int(given), _OTHER_POOLS)
    return largest + largest * 3 // 256 + (2 * 64 << 20)


def check_shared_memory(
    folder: str = SHARED_MEMORY, environ: Mapping[str, str] = os.environ
) -> None:
    """See that there is the shared memory that Dragon needs to start; with less it hangs.

    Raises:
        ResourceError: there is less; says how a container gets more.
    """
    free, needed = free_bytes(folder), needed_bytes(environ)
    if free is None or free < needed:
        found = "there is none" if free is None else f"{free / (1 << 20):,.0f} MiB are free"
        raise ResourceError(
            f"{folder}: {found}, and Dragon needs {needed >> 20:,} MiB; remove what other runs "
            "left there, give a container more (docker run --shm-size=6g; Kubernetes: an emptyDir "
            f"with medium: Memory on /dev/shm), or Dragon a smaller pool: {POOL_SIZE}={1 << 30}"
        )


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"
