"""Which cores, GPUs, memory and `mpiexec` of this machine the process may use.

Every call reads the kernel's files and the environment anew. `root` stands for `/` and `environ`
for `os.environ`, so that a folder can describe another machine. Standard library only: the local
backend imports this when it starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Space",
    "core_limits",
    "find_mpiexec",
    "granted_cores",
    "shared_memory",
    "total_memory",
    "visible_gpus",
]

# cgroup v1 writes "no limit" as the largest multiple of a page in 63 bits; no machine has 1 EiB.
_NO_LIMIT = 1 << 60


def granted_cores(
    *, root: str | Path = "/", environ: Mapping[str, str] | None = None
) -> tuple[int, ...]:
    """Return the ids of the cores that this process may use, ascending; at least one.

    They are the first ids of the affinity mask, as many as the smallest of `core_limits`. The
    kernel numbers them; they need not start at 0.
    """
    return _affinity()[: min(core_limits(root=root, environ=environ).values())]


def core_limits(
    *, root: str | Path = "/", environ: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Return how many cores each limit allows, each at least 1; the smallest one holds.

    Keys: `machine` (cores online) and `affinity` (the process's mask) always; `cgroup` (the
    smallest CPU quota of this control group and its ancestors, rounded up) and `slurm`
    (`SLURM_CPUS_ON_NODE`) where they exist.
    """
    environ = os.environ if environ is None else environ
    limits = {"machine": os.cpu_count() or 1, "affinity": len(_affinity())}
    quotas = list(_cpu_quotas(Path(root)))
    if quotas:
        limits["cgroup"] = max(1, ceil(min(quotas)))
    slurm = _integer(environ.get("SLURM_CPUS_ON_NODE"))
    if slurm is not None and slurm > 0:
        limits["slurm"] = slurm
    return limits


def visible_gpus(
    *, root: str | Path = "/", environ: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Return the GPUs that this process may use, as a child's `*_VISIBLE_DEVICES` names them.

    `CUDA_VISIBLE_DEVICES` or `HIP_VISIBLE_DEVICES`, where set, is the answer (indices or UUIDs).
    `ROCR_VISIBLE_DEVICES` filters below those two, which then count from 0 among what it left.
    Without any of them: the NVIDIA device files, else AMD's KFD topology, counted from 0.
    """
    environ = os.environ if environ is None else environ
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if variable in environ:
            return _device_list(environ[variable])
    if "ROCR_VISIBLE_DEVICES" in environ:
        count = len(_device_list(environ["ROCR_VISIBLE_DEVICES"]))
    else:
        count = _nvidia_gpus(Path(root)) or _amd_gpus(Path(root))
    return tuple(str(index) for index in range(count))


def total_memory(*, root: str | Path = "/") -> int:
    """Return the bytes of memory that this process may use: the control group's limit or all."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory.limit_in_bytes"):
        for folder in _cgroup_folders(Path(root), "memory"):
            limit = _integer(_read(folder / name))
            if limit is not None and 0 < limit < _NO_LIMIT:
                limits.append(limit)
    return min(limits)


class Space(NamedTuple):
    """Bytes of a file system."""

    total: int
    free: int


def shared_memory(path: str | Path = "/dev/shm") -> Space | None:  # noqa: S108 - no file is made
    """Return the size of the shared-memory file system; None where there is none."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def find_mpiexec(env_path: str | None = None) -> str | None:
    """Return the absolute path of `mpiexec`, beside this Python or on `env_path`; else None.

    Beside Python comes first because an environment's own MPI is the one that its packages were
    linked with. `env_path` defaults to `PATH`.
    """
    path = os.environ.get("PATH", os.defpath) if env_path is None else env_path
    for folder in (os.path.dirname(sys.executable), *path.split(os.pathsep)):
        candidate = os.path.join(folder or os.curdir, "mpiexec")
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return os.path.abspath(candidate)
    return None


def _affinity() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quota, in cores, of each control group that has one."""
    for folder in _cgroup_folders(root, "cpu"):
        v2 = _read(folder / "cpu.max").split()  # "max 100000" or "150000 100000"
        quota, period = v2 if len(v2) == 2 else ("", "")
        if not v2:
            quota = _read(folder / "cpu.cfs_quota_us")  # -1: no limit
            period = _read(folder / "cpu.cfs_period_us")
        allowed, every = _integer(quota), _integer(period)
        if allowed is not None and allowed > 0 and every:
            yield allowed / every


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups for `controller`, from its own upwards.

    Of both versions, since a hybrid machine mounts both. A group's path counts from the root of
    the hierarchy; a mount may show only a part of that (in containers), and where it does not show
    the group, the mount's own folder stands for it.
    """
    own: dict[bool, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own[True] = path
        elif controller in controllers.split(","):
            own[False] = path
    for mount in _cgroup_mounts(root, controller):
        if mount.is_v2 not in own:
            continue
        top = mount.point
        inside = os.path.relpath(own[mount.is_v2], mount.shown)
        folder = top if inside.startswith("..") else top / inside
        yield from (at for at in (folder, *folder.parents) if at == top or top in at.parents)


class _CgroupMount(NamedTuple):
    is_v2: bool
    shown: str  # the group at the mount point, as a path in the hierarchy
    point: Path


def _cgroup_mounts(root: Path, controller: str) -> Iterator[_CgroupMount]:
    """Yield the mounts of the hierarchies that have `controller`."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(maxsplit=2)
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            mount = fields[4].replace("\\040", " ").lstrip("/")
            yield _CgroupMount(kind == "cgroup2", fields[3], root / mount)


def _device_list(value: str) -> tuple[str, ...]:
    """Return the devices in a `*_VISIBLE_DEVICES` value, which ends at the first invalid one."""
    devices: list[str] = []
    for name in value.split(","):
        name = name.strip()
        if not name.isdigit() and not name.upper().startswith(("GPU-", "MIG-")):
            break
        devices.append(name)
    return tuple(devices)


def _nvidia_gpus(root: Path) -> int:
    devices = [at for at in root.glob("dev/nvidia[0-9]*") if at.name[6:].isdigit()]
    return len(devices) or len(list(root.glob("proc/driver/nvidia/gpus/*")))


def _amd_gpus(root: Path) -> int:
    """Count KFD nodes that compute and have a device file here (a container sees all nodes)."""
    count = 0
    for properties in root.glob("sys/class/kfd/kfd/topology/nodes/*/properties"):
        lines = (line.split() for line in _read(properties).splitlines())
        found = {line[0]: line[1] for line in lines if len(line) == 2}
        render = root / f"dev/dri/renderD{found.get('drm_render_minor')}"
        count += found.get("simd_count", "0") != "0" and render.exists()
    return count


def _read(path: Path) -> str:
    """Return the text of a kernel file; empty where it is missing or may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _integer(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
