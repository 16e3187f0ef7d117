"""What the backend costs in the driver: bounds that hold on a busy machine.

How much it is, and beside Batch itself, `python -m benchmarks.dragon_bench` says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _least(workload: str) -> float:
    """Seconds, of the best of three runs of 10,000 functions on a stand-in for Dragon."""
    line = [sys.executable, "-m", "benchmarks.dragon_driver", workload, "10000"]
    found: list[float] = []
    for _ in range(3):
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        reading = json.loads(done.stdout)
        assert reading["result"] == 10_000
        found.append(reading["seconds"])
    return min(found)


def test_a_task_costs_the_driver_little() -> None:
    assert _least("cpu") < 45e-6


def test_the_loop_goes_on_meanwhile() -> None:
    assert _least("stall") < 0.25
