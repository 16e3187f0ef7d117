"""The other commands: backends, doctor, bench, and their help."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import ENTRY_POINT, ESCAPE, command
from rhapsody.backends.descriptors import BUILT_IN
from rhapsody.backends.discovery import install_hint
from rhapsody.cli import doctor
from rhapsody.cli.bench import WORKLOADS


def test_backends_lists_each_with_what_installs_it(tmp_path: Path) -> None:
    done = command("backends", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^concurrent +installed *$", done.stdout, re.MULTILINE)
    rows = json.loads(command("backends", "--json").stdout)
    by_name = {row["name"]: row for row in rows}
    assert {"concurrent", "noop"} <= set(by_name)
    assert by_name["noop"] == {"name": "noop", "installed": True, "install": None}
    for row in rows:
        if not row["installed"]:
            assert "pip install" in row["install"]
            assert row["install"] in done.stdout, "a line that breaks can not be pasted"
    assert ESCAPE not in done.stdout


def findings(*, env: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    done = command("doctor", "--json", env=env, **options)
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["problems"] else 0)
    return {finding["check"]: finding for finding in found["findings"]}


def test_doctor_prints_every_check_and_its_verdict(tmp_path: Path) -> None:
    done = command("doctor", cwd=tmp_path)
    found = findings()
    for finding in found.values():
        assert re.search(rf"^{finding['check']} +{finding['status']} ", done.stdout, re.MULTILINE)
    problems = sum(finding["status"] == "problem" for finding in found.values())
    assert done.stdout.splitlines()[-1].startswith(f"{problems or 'no'} problem")
    assert ESCAPE not in done.stdout


def test_doctor_says_what_limits_the_cores() -> None:
    core = min(os.sched_getaffinity(0))
    cores = findings(before=f"import os; os.sched_setaffinity(0, {{{core}}})")["cores"]
    assert cores["data"]["granted"] == [core]
    if (os.cpu_count() or 1) > 1:
        assert "affinity mask" in cores["found"]
    slurm = findings(env={"SLURM_CPUS_ON_NODE": "1"})["cores"]
    assert slurm["data"]["granted"] == [core]
    assert slurm["data"]["limits"]["slurm"] == 1


def test_doctor_sees_a_binding_that_wastes_the_allocation() -> None:
    core = min(os.sched_getaffinity(0))
    cores = findings(
        env={"SLURM_CPUS_ON_NODE": "64"}, before=f"import os; os.sched_setaffinity(0, {{{core}}})"
    )["cores"]
    assert cores["status"] == "problem"
    assert "srun" in cores["remedy"]


def test_doctor_asks_for_more_open_files() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {}))"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = findings(before=limit.format(64, hard))
    assert files["open files"]["status"] == "problem"
    assert files["open files"]["data"]["soft"] == 64
    assert "ulimit -n" in files["open files"]["remedy"]
    files = findings(before=limit.format(64, 64))
    assert "administrator" in files["open files"]["remedy"]


def test_doctor_sees_the_gpus_that_were_granted() -> None:
    assert findings(env={"CUDA_VISIBLE_DEVICES": "2,3"})["gpus"]["data"]["visible"] == ["2", "3"]


def test_doctor_misses_only_engines_that_backends_lists_a_line_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    finding = doctor.check_engines()
    assert finding.status == "note"
    named = finding.found.rpartition("not installed: ")[2].split(", ")
    engines = {backend.engine.distribution for backend in BUILT_IN.values() if backend.engine}
    assert set(named) == {"cloudpickle", *engines}
    assert all(install_hint(name) for name, backend in BUILT_IN.items() if backend.engine)


def test_doctor_writes_in_the_work_dir(tmp_path: Path) -> None:
    found = findings(env={"RHAPSODY_WORK_DIR": str(tmp_path / "later")})["work dir"]
    assert (found["status"], found["data"]["path"]) == ("ok", str(tmp_path / "later"))
    (tmp_path / "file").write_text("")
    found = findings(env={"RHAPSODY_WORK_DIR": str(tmp_path / "file")})["work dir"]
    assert found["status"] == "problem"
    assert "RHAPSODY_WORK_DIR" in found["remedy"]


def tool(folder: Path, name: str, body: str = "exit 0") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_scheduler(tmp_path: Path) -> None:
    def found(**environ: str) -> tuple[str, str]:
        finding = doctor.check_scheduler({"PATH": str(tmp_path), **environ})
        return finding.status, finding.found

    assert found()[0] == "ok"
    assert "none" in found()[1]
    status, text = found(SLURM_JOB_ID="17")
    assert status == "problem"
    assert "`srun` is not on PATH" in text
    assert found(SLURM_JOB_ID="17", SLURM_JOB_NUM_NODES="1") == ("ok", "Slurm, in job 17")
    tool(tmp_path, "sbatch")
    tool(tmp_path, "srun")
    assert found() == ("ok", "Slurm, not in a job: tasks run on this node alone")
    assert found(SLURM_JOB_ID="17", SLURM_JOB_NUM_NODES="4") == ("ok", "Slurm, in job 17")
    assert found(FLUX_URI="local:///x")[0] == "problem"


# What each says to `mpiexec --version`; written from their outputs, the first lines.
@pytest.mark.parametrize(
    ("said", "flavour"),
    [
        ("HYDRA build details:\n    Version:   4.2.3\n", "MPICH"),
        ("mpiexec (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/\n", "Open MPI"),
        ("mpiexec (Open MPI) 5.0.6\n", "Open MPI"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.14 Build 20240911\n", "Intel MPI"),
        ("something else\n", "unknown MPI"),
    ],
)
def test_mpi_flavours(
    said: str, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    tool(tmp_path, "mpiexec", f"cat <<'END'\n{said}END")
    environ = {
        "PATH": str(tmp_path),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    finding = doctor.check_mpi(environ)
    assert (finding.status, finding.data["flavour"]) == ("ok", flavour)
    if flavour == "Open MPI" and os.geteuid() == 0:
        refused = doctor.check_mpi({"PATH": str(tmp_path)})
        assert refused.status == "problem"
        assert "OMPI_ALLOW_RUN_AS_ROOT=1" in refused.remedy


def test_an_mpiexec_that_does_not_run_is_a_problem_and_none_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    missing = doctor.check_mpi({"PATH": str(tmp_path)})
    assert missing.status == "note"
    assert "pip install" in missing.remedy
    tool(tmp_path, "mpiexec", "echo 'libmpi.so.40: not found' >&2; exit 127")
    broken = doctor.check_mpi({"PATH": str(tmp_path)})
    assert broken.status == "problem"
    assert "libmpi.so.40" in broken.found


def test_small_shared_memory_is_a_problem(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "none").status == "problem"
    found = doctor.check_shared_memory(tmp_path)
    assert found.data["total"] >= found.data["free"]
    assert (found.status == "problem") is (found.data["free"] < doctor.SHARED_MEMORY_WANTED)


def test_bench_measures_every_workload() -> None:
    done = command("bench", "--repeat", "2", "--scale", "0.001", "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert [one["workload"] for one in measured] == [workload.name for workload in WORKLOADS]
    for one in measured:
        assert one["ours_seconds"] > 0
        assert one["raw_seconds"] > 0
        assert len(one["ratios"]) == 2
        assert one["ratios"] == sorted(one["ratios"])
    table = command("bench", "--repeat", "1", "--scale", "0.001").stdout
    for workload in WORKLOADS:
        assert workload.title in table
    assert ESCAPE not in table


def test_a_benchmark_whose_tasks_fail_is_no_measurement(tmp_path: Path) -> None:
    tool(tmp_path, "true", "exit 1")
    done = command("bench", "--scale", "0.001", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert "not every task" in done.stderr or "non-zero exit status" in done.stderr


@pytest.mark.parametrize("name", ["", "run", "backends", "doctor", "bench"])
def test_help(name: str) -> None:
    arguments = [name] if name else []
    done = command(*arguments, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: python -m rhapsody")
    assert command(*arguments, "-h").stdout == done.stdout


def test_version() -> None:
    import rhapsody

    assert command("--version", program=ENTRY_POINT).stdout.split()[-1] == rhapsody.__version__


def test_the_library_does_not_bring_the_command_line() -> None:
    script = "import sys, rhapsody; print({'click', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
