"""The patches for small machines, on a stand-in for Dragon; the real one has tests/on_dragon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import rhapsody.launch.dragon
from rhapsody.launch.dragon import idle_patches

SMALL = Path(rhapsody.launch.dragon.__file__).parent / "_sitecustomize"
READ = "from dragon.workflows.batch import facts; print(facts.manager_work_queue_poll_timeout)"


def dragon_of_version(version: str, folder: Path) -> None:
    module = folder / "dragon" / "workflows" / "batch" / "facts.py"
    module.parent.mkdir(parents=True)
    module.write_text("manager_work_queue_poll_timeout = 0.05\n")
    metadata = folder / f"dragonhpc-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: dragonhpc\nVersion: {version}\n")


def run(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


def test_the_folder_on_the_path_applies_the_patches(tmp_path: Path) -> None:
    dragon_of_version(f"{idle_patches.VERSION}.3", tmp_path)
    assert run(READ, tmp_path).stdout == "0.05\n"
    assert run(READ, SMALL, tmp_path).stdout == "0.005\n"


def test_another_version_is_left_alone_with_a_warning(tmp_path: Path) -> None:
    dragon_of_version("0.99.1", tmp_path)
    done = run(READ, SMALL, tmp_path)
    assert done.stdout == "0.05\n"
    assert "this is 0.99.1: not applied" in done.stderr


def test_the_sitecustomize_that_is_hidden_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.hidden = 'ran'\n")
    assert run("print(hidden)", SMALL, tmp_path).stdout == "ran\n"


def test_a_second_time_is_no_harm() -> None:
    program = """if True:
        import sys
        before = list(sys.meta_path)
        from rhapsody.launch.dragon import idle_patches
        idle_patches.install()
        once = list(sys.meta_path)
        idle_patches.install()
        print(len(once) - len(before), sys.meta_path == once)
    """
    assert run(program).stdout == "1 True\n"


def test_programs_that_know_nothing_of_dragon_are_as_they_were() -> None:
    done = run("import json; print(json.dumps([1]))", SMALL)
    assert (done.stdout, done.stderr) == ("[1]\n", "")
