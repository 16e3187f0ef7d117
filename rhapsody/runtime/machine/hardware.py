"""What this process may use of the machine that it runs on: cores, GPUs, memory, ``mpiexec``.

Pure readings of the kernel's files and of the environment, made anew at every call. ``root``
stands for ``/`` and ``environ`` for ``os.environ``, so that another machine can be described in
a folder. Standard library only: the local backend reads this at its start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path

# cgroup v1 writes "no limit" as the largest multiple of a page in 63 bits; nothing has an EiB.
_NO_LIMIT = 1 << 60


def granted_cores(
    *, root: str | Path = "/", environ: Mapping[str, str] | None = None
) -> tuple[int, ...]:
    """The ids of the cores that this process may use, ascending; at least one.

    They are the affinity mask, cut to the smallest count in :func:`core_limits`. Ids are those
    of the kernel and need not start at 0.
    """
    return _affinity()[: min(core_limits(root=root, environ=environ).values())]


def core_limits(
    *, root: str | Path = "/", environ: Mapping[str, str] | None = None
) -> dict[str, int]:
    """How many cores each authority grants, each at least 1; the smallest is what counts.

    Keys: ``machine`` (cores online) and ``affinity`` (the process's mask) always; ``cgroup``
    (CPU quota of this control group and of those above it, rounded up) and ``slurm``
    (``SLURM_CPUS_ON_NODE``) where they exist.
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
    """The GPUs that this process may use, as a child's ``*_VISIBLE_DEVICES`` would name them.

    ``CUDA_VISIBLE_DEVICES`` or ``HIP_VISIBLE_DEVICES``, where set, is the answer (indices or
    UUIDs). ``ROCR_VISIBLE_DEVICES`` filters below those two, which then count from 0 among what
    it left. Without any: the NVIDIA device files, then AMD's KFD topology, counted from 0.
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
    """Bytes of memory that this process may use: the control group's limit or all there is."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory.limit_in_bytes"):
        for folder in _cgroup_folders(Path(root), "memory"):
            limit = _integer(_read(folder / name))
            if limit is not None and 0 < limit < _NO_LIMIT:
                limits.append(limit)
    return min(limits)


def shared_memory(path: str | Path = "/dev/shm") -> tuple[int, int] | None:  # noqa: S108 - no file is made
    """``(total, free)`` bytes of the shared-memory file system, or None where there is none."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def find_mpiexec(env_path: str | None = None) -> str | None:
    """The absolute path of ``mpiexec``, or None: beside this Python first, then on ``env_path``.

    Beside Python comes first because an environment's own MPI is the one that its packages were
    linked with. ``env_path`` defaults to ``PATH``.
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
    """Cores' worth of CPU time that each control group allows, of those that limit it."""
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
    """The folders that hold this process's limits for ``controller``, from its own group upwards.

    Both versions, as a hybrid machine mounts both. A group's path counts from the hierarchy's
    root, a mount may show only a part of it (containers do), and a group that the mount does
    not show leaves the mount's own folder to ask.
    """
    own: dict[bool, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own[True] = path
        elif controller in controllers.split(","):
            own[False] = path
    for is_v2, shown, mount in _cgroup_mounts(root, controller):
        if is_v2 not in own:
            continue
        inside = os.path.relpath(own[is_v2], shown)
        folder = mount if inside.startswith("..") else mount / inside
        yield from (at for at in (folder, *folder.parents) if at == mount or mount in at.parents)


def _cgroup_mounts(root: Path, controller: str) -> Iterator[tuple[bool, str, Path]]:
    """``(is version 2, path within the hierarchy, mount point)`` of each mount for it."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(maxsplit=2)
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            mount = fields[4].replace("\\040", " ").lstrip("/")
            yield kind == "cgroup2", fields[3], root / mount


def _device_list(value: str) -> tuple[str, ...]:
    """The devices in a ``*_VISIBLE_DEVICES`` value, which ends at the first invalid one."""
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
    """KFD nodes that compute and whose device file is here (a container sees all the nodes)."""
    count = 0
    for properties in root.glob("sys/class/kfd/kfd/topology/nodes/*/properties"):
        lines = (line.split() for line in _read(properties).splitlines())
        found = {line[0]: line[1] for line in lines if len(line) == 2}
        render = root / f"dev/dri/renderD{found.get('drm_render_minor')}"
        count += found.get("simd_count", "0") != "0" and render.exists()
    return count


def _read(path: Path) -> str:
    """The text of a kernel file, empty where it is missing or closed to us."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _integer(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
