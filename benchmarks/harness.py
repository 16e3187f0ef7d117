"""Runs the sides of a figure, each as a whole process, interleaved, in the environment it needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Side

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"
_LIMIT = 900.0  # seconds for one side, once


class BenchmarkError(Exception):
    """Raised when a side fails, or computes something else than the others."""


@dataclass
class Readings:
    """What the repetitions of one side have measured, in their order."""

    side: Side
    tasks: int
    seconds: list[float] = field(default_factory=list)  # per task, or of the longest stall
    ratios: list[float] = field(default_factory=list)  # of the seconds, over those of the base
    cpu: list[float] = field(default_factory=list)  # seconds per task, of all its processes
    cpu_ratios: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)  # seconds; of latencies only
    bytes: list[float] = field(default_factory=list)  # per task; empty where it is not measured
    gc: list[float] = field(default_factory=list)  # seconds, of the longest pause; mostly empty


def measure(
    figure: Figure,
    *,
    repeat: int,
    quick: bool,
    with_peers: bool,
    say: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    peer: str | None = None,
) -> list[Readings]:
    """Measure all sides of a figure `repeat` times: A B C, C B A, A B C, ...

    `env` is for all sides, beside this process's own. `peer` is a Python that has what the peers
    require; where it is None, one is made for each.

    Raises:
        BenchmarkError: a side has failed, or the sides have not computed the same.
    """
    sides = [side for side in figure.sides if with_peers or not side.requirements]
    divisor = figure.quick_divisor if quick else 1
    readings = {side.name: Readings(side, max(1, side.tasks // divisor)) for side in sides}
    pythons = {
        side.name: peer if peer and side.requirements else _python_for(side.requirements, say)
        for side in sides
    }
    for repetition in range(repeat):
        for side in sides if repetition % 2 == 0 else reversed(sides):
            row = readings[side.name]
            found = _run(pythons[side.name], side, row.tasks, env or {})
            expected = figure.expected(row.tasks)
            if found["result"] != expected:
                raise BenchmarkError(
                    f"{figure.name}: {side.name} computed {found['result']}, not {expected}"
                )
            row.seconds.append(found["seconds"])
            row.bytes += [found["bytes"]] if "bytes" in found else []
            row.gc += [found["gc"]] if "gc" in found else []
            row.cpu += [found["cpu"]] if "cpu" in found else []
            row.p99 += [found["p99"]] if "p99" in found else []
        say(f"{figure.name}: repetition {repetition + 1} of {repeat}")
    for row in readings.values():
        base = readings[row.side.base or sides[0].name]
        row.ratios = [a / b for a, b in zip(row.seconds, base.seconds, strict=True)]
        if row.cpu and base.cpu and all(base.cpu):
            row.cpu_ratios = [a / b for a, b in zip(row.cpu, base.cpu, strict=True)]
    return list(readings.values())


def middle(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


# ---------------------------------------------------------------------- processes


def _run(python: str, side: Side, tasks: int, env: Mapping[str, str]) -> dict[str, Any]:
    """Run one side once, in a folder and a process group of its own."""
    command = [python, "-m", side.module, side.workload, str(tasks)]
    if side.under_dragon:
        command = [os.path.join(os.path.dirname(python), "dragon"), "-s", *command]
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            # Peers find the commands that come with them beside their Python.
            env={
                **os.environ,
                **env,
                "PYTHONPATH": os.pathsep.join(paths),
                "PATH": os.pathsep.join([os.path.dirname(python), os.environ["PATH"]]),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=os.setpgrp,  # in a session of its own Dragon's launcher hangs (0.15.0)
        )
        try:
            out, err = process.communicate(timeout=_LIMIT)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{side.name} took more than {_LIMIT:.0f} s") from None
        finally:
            # Whatever the side has left behind would be in the way of the next.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    readings = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode != 0 or not readings:
        raise BenchmarkError(f"{side.name} ended with {process.returncode}:\n{err[-2000:]}")
    reading: dict[str, Any] = json.loads(readings[-1])
    return reading


# ---------------------------------------------------------------------- environments


def _python_for(requirements: tuple[str, ...], say: Callable[[str], None]) -> str:
    """Return the Python of an environment with these packages, made when it is first needed."""
    if not requirements:
        return sys.executable
    version = ".".join(map(str, sys.version_info[:3]))
    digest = hashlib.sha256("\n".join((version, *requirements)).encode()).hexdigest()[:12]
    folder = CACHE / digest
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return str(python)
    say(f"making an environment with {', '.join(requirements)}")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *requirements],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchmarkError(f"pip cannot install {', '.join(requirements)}:\n{done.stderr}")
    # Marked last, so that one that was interrupted is made again.
    (folder / "complete").touch()
    return str(python)
