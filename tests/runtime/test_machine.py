"""What the machine grants: read from folders that describe other machines, and from this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rhapsody.runtime.machine import hardware

V2 = "35 24 0:30 {shown} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "36 24 0:31 {shown} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"


def write(root: Path, path: str, text: str = "") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def limits(root: Path, environ: dict[str, str] | None = None) -> dict[str, int]:
    return hardware.core_limits(root=root, environ=environ or {})


def test_here_the_granted_cores_are_those_of_the_affinity_mask() -> None:
    granted = hardware.granted_cores(environ={})
    assert granted
    assert set(granted) <= os.sched_getaffinity(0)


def test_a_process_bound_to_one_core_is_granted_that_core() -> None:
    core = max(os.sched_getaffinity(0))
    script = (
        f"import os; os.sched_setaffinity(0, {{{core}}})\n"
        "from rhapsody.runtime.machine import hardware; print(hardware.granted_cores())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"({core},)\n", done.stderr


def test_a_v2_quota_is_rounded_up(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/job/step\n")
    write(tmp_path, "proc/self/mountinfo", V2.format(shown="/"))
    write(tmp_path, "sys/fs/cgroup/job/step/cpu.max", "150000 100000\n")
    assert limits(tmp_path)["cgroup"] == 2


def test_less_than_one_core_of_quota_is_one_core(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "proc/self/mountinfo", V2.format(shown="/"))
    write(tmp_path, "sys/fs/cgroup/cpu.max", "20000 100000\n")
    assert limits(tmp_path)["cgroup"] == 1
    assert len(hardware.granted_cores(root=tmp_path, environ={})) == 1


def test_a_group_above_may_be_the_one_that_limits(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/job/step/task\n")
    write(tmp_path, "proc/self/mountinfo", V2.format(shown="/"))
    write(tmp_path, "sys/fs/cgroup/job/step/task/cpu.max", "max 100000\n")
    write(tmp_path, "sys/fs/cgroup/job/cpu.max", "300000 100000\n")
    assert limits(tmp_path)["cgroup"] == 3


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "proc/self/mountinfo", V2.format(shown="/"))
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert "cgroup" not in limits(tmp_path)


@pytest.mark.parametrize(("quota", "expected"), [("400000", 4), ("-1", None)])
def test_v1_quota(tmp_path: Path, quota: str, expected: int | None) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/x\n2:cpu,cpuacct:/job\n0::/\n")
    write(tmp_path, "proc/self/mountinfo", V1.format(shown="/", name="cpu"))
    write(tmp_path, "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", quota)
    write(tmp_path, "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000")
    assert limits(tmp_path).get("cgroup") == expected


def test_a_container_sees_its_own_group_at_the_mount_point(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/docker/abc\n")
    write(tmp_path, "proc/self/mountinfo", V2.format(shown="/docker/abc"))
    write(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000")
    assert limits(tmp_path)["cgroup"] == 2


def test_a_group_outside_of_the_mount_asks_the_mount_point(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/../other\n")
    write(tmp_path, "proc/self/mountinfo", V2.format(shown="/docker/abc"))
    write(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000")
    assert limits(tmp_path)["cgroup"] == 2


@pytest.mark.parametrize(
    ("value", "expected"), [("1", 1), ("0", None), ("", None), ("2(x3)", None)]
)
def test_slurm(tmp_path: Path, value: str, expected: int | None) -> None:
    environ = {"SLURM_CPUS_ON_NODE": value}
    assert limits(tmp_path, environ).get("slurm") == expected


def test_slurm_limits_the_granted_cores(tmp_path: Path) -> None:
    assert hardware.granted_cores(root=tmp_path, environ={"SLURM_CPUS_ON_NODE": "1"}) == (
        min(os.sched_getaffinity(0)),
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2, 0"}, ("2", "0")),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, ("0",)),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, ("GPU-8932f937",)),
        ({"HIP_VISIBLE_DEVICES": "3"}, ("3",)),
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, ("0", "1")),
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, ("1",)),
    ],
)
def test_visible_gpus_of_the_environment(
    tmp_path: Path, environ: dict[str, str], expected: tuple[str, ...]
) -> None:
    write(tmp_path, "dev/nvidia0")
    assert hardware.visible_gpus(root=tmp_path, environ=environ) == expected


def test_nvidia_device_files(tmp_path: Path) -> None:
    for name in ("nvidia1", "nvidia5", "nvidiactl", "nvidia-uvm", "nvidia-caps/nvidia-cap1"):
        write(tmp_path, f"dev/{name}")
    assert hardware.visible_gpus(root=tmp_path, environ={}) == ("0", "1")


def test_nvidia_driver_without_device_files(tmp_path: Path) -> None:
    write(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information")
    assert hardware.visible_gpus(root=tmp_path, environ={}) == ("0",)


def test_amd_topology_counts_the_computing_nodes_that_this_process_can_open(
    tmp_path: Path,
) -> None:
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write(tmp_path, f"{nodes}/0/properties", "cpu_cores_count 64\nsimd_count 0\n")
    write(tmp_path, f"{nodes}/1/properties", "simd_count 440\ndrm_render_minor 128\n")
    write(tmp_path, f"{nodes}/2/properties", "simd_count 440\ndrm_render_minor 129\n")
    write(tmp_path, "dev/dri/renderD128")
    assert hardware.visible_gpus(root=tmp_path, environ={}) == ("0",)


def test_no_gpu(tmp_path: Path) -> None:
    assert hardware.visible_gpus(root=tmp_path, environ={}) == ()


def test_memory_of_the_whole_machine(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert hardware.total_memory(root=tmp_path) == physical
    assert 0 < hardware.total_memory() <= physical


def test_memory_limit_v2(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "proc/self/mountinfo", V2.format(shown="/"))
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", "1048576\n")
    assert hardware.total_memory(root=tmp_path) == 1 << 20


def test_memory_limit_v1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "9:memory:/job\n")
    write(tmp_path, "proc/self/mountinfo", V1.format(shown="/", name="memory"))
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    write(tmp_path, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", "2097152")
    assert hardware.total_memory(root=tmp_path) == 2 << 20


def test_shared_memory(tmp_path: Path) -> None:
    found = hardware.shared_memory(tmp_path)
    assert found is not None
    total, free = found
    assert 0 <= free <= total
    assert hardware.shared_memory(tmp_path / "none") is None


def executable(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_mpiexec_beside_this_python_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = executable(tmp_path / "bin/mpiexec")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/python"))
    assert hardware.find_mpiexec(str(tmp_path / "bin")) == on_path
    beside = executable(tmp_path / "venv/mpiexec")
    assert hardware.find_mpiexec(str(tmp_path / "bin")) == beside


def test_mpiexec_must_be_a_file_that_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/python"))
    (tmp_path / "a/mpiexec").mkdir(parents=True)
    write(tmp_path, "b/mpiexec")
    search = os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")])
    assert hardware.find_mpiexec(search) is None


def test_import_is_light() -> None:
    """The local backend reads this at its start, so it brings no machinery of its own."""
    heavy = "{'subprocess', 'asyncio', 'rich', 'click'}"
    script = (
        "import sys, rhapsody; before = set(sys.modules)\n"
        "import rhapsody.runtime.machine.hardware\n"
        f"print({heavy} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
