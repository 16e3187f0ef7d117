"""Composes the command line of Dragon's launcher for this machine, an allocation or some hosts.

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

from ..allocation import Allocation, find_allocation

__all__ = ["LauncherCommand", "build_command", "find_launcher", "path_with_launcher"]

# Values of Dragon's --wlm.
_WORKLOAD_MANAGERS = {"Slurm": "slurm", "PBS": "pbs+pals"}

# A name or an address; it goes to ssh, where a leading dash would begin an option.
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.:-]*[A-Za-z0-9_])?")


class LauncherCommand(NamedTuple):
    """A command line of Dragon's launcher that lacks only the script and its arguments."""

    argv: list[str]
    remote: bool  # whether the workflow may run on another host


def find_launcher(environ: Mapping[str, str]) -> str | None:
    """Return the path of the program `dragon`: beside this interpreter, else on the PATH.

    In this order, because a media player has the same name.
    """
    here = os.path.dirname(sys.executable)
    return shutil.which("dragon", path=here) or shutil.which("dragon", path=environ.get("PATH"))


def path_with_launcher(launcher: str, environ: Mapping[str, str]) -> str:
    """Return a PATH on which Dragon finds its other programs, which are beside its launcher.

    It is the PATH of `environ` if `dragon` is found there to be this launcher.
    """
    path, here = environ.get("PATH", ""), os.path.dirname(launcher)
    if not here or shutil.which("dragon", path=path) == launcher:
        return path
    return here + (os.pathsep + path if path else "")


def build_command(
    launcher: str, nodes: int | None, hosts: Sequence[str], environ: Mapping[str, str]
) -> LauncherCommand:
    """Compose the command for nodes among `hosts`, else of the allocation, else for this machine.

    Args:
        launcher: the path of the program.
        nodes: how many nodes to use; None for all that there are.
        hosts: names of hosts to reach by ssh, or nothing.
        environ: describes the allocation, if there is one.

    Raises:
        ResourceError: there are fewer nodes; the message says how many, and of what.
        ValueError: a host has a name that ssh could not take, or is named twice.
    """
    if hosts:
        return _over_ssh(launcher, nodes, hosts)
    allocation = find_allocation(environ)
    if nodes is None:
        nodes = allocation.nodes if allocation else 1
    _check_nodes(nodes, allocation)
    if allocation is None or nodes == 1:
        # Always -s: where srun or qstat is installed Dragon would use it without, and may refuse.
        return LauncherCommand([launcher, "-s"], remote=False)
    manager = _WORKLOAD_MANAGERS[allocation.manager]
    return LauncherCommand([launcher, "-N", str(nodes), "--wlm", manager], remote=True)


def _check_nodes(nodes: int, allocation: Allocation | None) -> None:
    if allocation is None and nodes > 1:
        raise ResourceError(
            f"--nodes {nodes}: found no allocation (neither SLURM_JOB_ID nor PBS_NODEFILE is set), "
            "so that this machine is all there is; start it inside a Slurm or PBS job, or name the "
            "machines to reach by ssh: --hosts a,b"
        )
    if allocation is not None and nodes > allocation.nodes:
        raise ResourceError(
            f"--nodes {nodes}: {allocation} has {_count(allocation.nodes)}; ask for {nodes} when "
            f"you submit the job, or give --nodes {allocation.nodes} or less"
        )


def _over_ssh(launcher: str, nodes: int | None, hosts: Sequence[str]) -> LauncherCommand:
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ValueError(f"--hosts: {host!r} is not the name of a host; give them as a,b,c")
    if len(set(hosts)) < len(hosts):
        raise ValueError("--hosts: a host is named twice; each is one node")
    if nodes is not None and nodes > len(hosts):
        raise ResourceError(
            f"--nodes {nodes}: --hosts has {_count(len(hosts))}; name {nodes}, or leave --nodes out"
        )
    names = ",".join(hosts[:nodes])
    # Without -t tcp Dragon takes its own agent for fast fabrics, which does not start elsewhere.
    argv = [launcher, "--wlm", "ssh", "--hostlist", names, "-t", "tcp"]
    return LauncherCommand(argv, remote=True)


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"
