"""The V3 backend in a program that nobody started under Dragon: its own runtime, and its ends."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from . import small
from .nodes import Sandbox

WORKFLOW = """
import asyncio, sys
from rhapsody import ComputeTask, Session
from rhapsody.backends import (
    ConcurrentExecutionBackend, DaskExecutionBackend, DragonExecutionBackend
)

def square(number):
    return number * number

def spin():
    import time
    while True:
        time.sleep(0.01)

async def main(wanted):
    dragon = DragonExecutionBackend(num_nodes=2 if wanted == "nodes" else None)
    async with Session(backends=[dragon]) as session:
        await dragon
        if wanted == "three":
            session.add_backend(ConcurrentExecutionBackend())
            session.add_backend(DaskExecutionBackend({"n_workers": 1, "processes": False}))
        one = ComputeTask(function=square, args=(3,), backend="dragon")
        tasks = [one]
        if wanted == "three":
            tasks.append(ComputeTask(function=square, args=(one,), backend="dask"))
            tasks.append(ComputeTask(
                executable="echo", arguments=[tasks[-1]], backend="concurrent"))
        if wanted == "long":
            tasks += [ComputeTask(executable="sleep", arguments=["600"])]
        await session.submit_tasks(tasks)
        if wanted == "long":
            while tasks[-1].state != "RUNNING":
                await asyncio.sleep(0.05)
            print("running", flush=True)
        await session.wait_tasks(tasks)
        print([task.return_value if task.return_value is not None else task.stdout
               for task in tasks], flush=True)
    sys.exit(3)

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
"""


def _line(folder: Path, wanted: str) -> list[str]:
    (folder / "workflow.py").write_text(WORKFLOW)
    return [sys.executable, "workflow.py", wanted]


def test_a_plain_program_has_a_runtime_of_its_own(tmp_path: Path) -> None:
    with Sandbox() as place:
        result = place.run(_line(tmp_path, "one"), env=small.environment(4), cwd=tmp_path)
        assert (result.code, result.stdout) == (3, "[9]\n"), result
        assert place.left() == []


def test_three_engines_in_one_session(tmp_path: Path) -> None:
    with Sandbox() as place:
        result = place.run(_line(tmp_path, "three"), env=small.environment(4), cwd=tmp_path)
        assert (result.code, result.stdout) == (3, "[9, 81, '81\\n']\n"), result
        assert place.left() == []


def test_ctrl_c_ends_program_and_runtime(tmp_path: Path) -> None:
    with Sandbox() as place:
        command = place.start(_line(tmp_path, "long"), env=small.environment(4), cwd=tmp_path)
        command.wait_for("running")
        command.signal(signal.SIGINT, group=True)
        result = command.wait()
        assert result.code == -signal.SIGINT, result
        assert "KeyboardInterrupt" in result.stderr
        assert place.left() == []


def test_a_killed_program_leaves_no_process(tmp_path: Path) -> None:
    with Sandbox() as place:
        command = place.start(_line(tmp_path, "long"), env=small.environment(4), cwd=tmp_path)
        command.wait_for("running")
        command.signal(signal.SIGKILL)
        command.wait()
        left = place.left(15.0)
        assert [one for one in left if not one.startswith("/dev/shm/")] == []


def test_several_nodes_need_a_launcher(tmp_path: Path) -> None:
    with Sandbox() as place:
        result = place.run(_line(tmp_path, "nodes"), env=small.environment(4), cwd=tmp_path)
        assert result.code == 1
        assert "rhapsody launch --dragon --nodes 2 workflow.py" in result.stderr
        assert place.left() == []


def test_too_little_shared_memory_is_said_at_once(tmp_path: Path) -> None:
    with Sandbox(shm="512m") as place:
        result = place.run(_line(tmp_path, "one"), env=small.environment(4), cwd=tmp_path)
        assert result.code == 1
        assert "/dev/shm: 512 MiB are free, and Dragon needs 4,272 MiB" in result.stderr
        assert place.left() == []


def test_the_program_of_the_documentation(tmp_path: Path) -> None:
    page = Path(__file__).parents[2].joinpath("docs", "dragon.md").read_text()
    program = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "workflow.py").write_text(program)
    with Sandbox() as place:
        command = [sys.executable, "workflow.py"]
        result = place.run(command, env=small.environment(4), cwd=tmp_path)
        assert (result.code, result.stdout) == (0, "['DONE', 'DONE', 'DONE']\n"), result
        assert place.left() == []
