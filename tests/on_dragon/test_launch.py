"""`rhapsody launch --dragon` on the real Dragon: exit codes, signals, and whoever is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import small
from .command import Result, Running
from .nodes import Nodes, Sandbox

Place = Sandbox | Nodes

# Has tasks that run, says so, and does what its argument says.
WORKFLOW = """
import asyncio, os, socket, sys, time
from rhapsody import ComputeTask, Session
from rhapsody.backends import DragonExecutionBackend

def nap(seconds):
    time.sleep(seconds)

async def main(what):
    backend = DragonExecutionBackend()
    async with Session(backends=[backend]) as session:
        first = ComputeTask(function=nap, args=(0,))
        await session.submit_tasks([first])
        await first
        naps = [ComputeTask(function=nap, args=(what != "end" and 1000,)) for _ in range(4)]
        await session.submit_tasks(naps)
        print("up", len(backend.topology()), socket.gethostname(), flush=True)
        try:
            if what == "wait":
                await asyncio.sleep(1000)
            if what == "hard":
                os._exit(3)
            if what == "killed":
                os.kill(os.getpid(), 9)
        except asyncio.CancelledError:
            print("asked", flush=True)
            raise
        await session.wait_tasks(naps)

if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1]))
    except KeyboardInterrupt:
        print("closed", flush=True)
        sys.exit(9)
    print("ended", *sys.argv[2:], end="", flush=True)
    sys.exit(5)
"""
RAISES = "import dragon\npritn('a typo')\n"
UP = 90.0  # seconds for a workflow to be up, with all cores busy
END = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "workflow.py").write_text(WORKFLOW)
    (folder / "raises.py").write_text(RAISES)
    return folder


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest, folder: Path) -> Iterator[None]:
    """No process, no shared memory on any node, no folder of the run."""
    names = [name for name in ("sandbox", "two_nodes") if name in request.fixturenames]
    if not names:
        yield
        return
    place: Place = request.getfixturevalue(names[0])
    try:
        yield
        assert place.left(grace=20) == []
        assert list(folder.glob("rhapsody-launch-*")) == []
        assert list((folder / "tmp").glob("rhapsody-launch-*")) == []
    finally:
        place.kill_all()


def launched(place: Place, folder: Path, *words: str) -> Running:
    hosts = ["--hosts", ",".join(place.hosts)] if isinstance(place, Nodes) else []
    # env: whoever started the tests may ignore Ctrl-C, and then a launch would too.
    line = ["env", "--default-signal=INT,TERM,HUP", sys.executable, "-m", "rhapsody", "launch"]
    (folder / "tmp").mkdir(exist_ok=True)
    env = {**small.environment(4), "TMPDIR": str(folder / "tmp")}
    return place.start([*line, "--dragon", *hosts, "workflow.py", *words], env=env, cwd=folder)


def run(place: Place, folder: Path, *words: str) -> Result:
    return launched(place, folder, *words).wait(UP + END)


def test_output_arguments_and_exit_code(sandbox: Sandbox, folder: Path) -> None:
    result = run(sandbox, folder, "end", "--nodes", "a b", "-s", "")
    assert result.code == 5, result
    assert result.stdout.startswith("up 1 ")
    assert result.stdout.endswith("\nended --nodes a b -s ")  # and not a byte of ours or Dragon's
    assert result.stderr == ""


def test_an_exception_is_shown_also_on_a_small_machine(sandbox: Sandbox, folder: Path) -> None:
    line = [sys.executable, "-m", "rhapsody", "launch", "--dragon", "--small-machine", "raises.py"]
    result = sandbox.run(line, timeout=END, cwd=folder)
    assert result.code == 1, result
    assert result.stderr.startswith("rhapsody: --small-machine: ")
    assert "NameError: name 'pritn' is not defined" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("what", "code"), [("hard", 3), ("killed", 137)])
def test_a_workflow_that_dies(sandbox: Sandbox, folder: Path, what: str, code: int) -> None:
    result = run(sandbox, folder, what)
    assert result.code == code, result
    assert "+++" not in result.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_workflow_close(
    sandbox: Sandbox, folder: Path, number: int, code: int
) -> None:
    running = launched(sandbox, folder, "wait")
    running.wait_for("up", UP)
    running.signal(number)
    running.wait_for("closed", END)
    result = running.wait(END)
    assert result.code == code, result
    assert "killing" not in result.stderr, result


def test_a_second_ctrl_c_ends_all_of_this_run_and_nothing_else(
    sandbox: Sandbox, folder: Path
) -> None:
    other = "DD012def0M"  # a pool as another run of the same user has it
    sandbox.run(["touch", f"/dev/shm/{other}"])
    running = launched(sandbox, folder, "wait")
    running.wait_for("up", UP)
    running.signal(signal.SIGINT)
    running.wait_for("asked", END)
    running.signal(signal.SIGINT)
    assert running.wait(10).code == 130
    assert sandbox.left() == [f"/dev/shm/{other}"]
    sandbox.run(["rm", f"/dev/shm/{other}"])


def test_ctrl_c_while_dragon_starts(sandbox: Sandbox, folder: Path) -> None:
    running = launched(sandbox, folder, "wait")
    while not any("dragon -s" in line for line in sandbox.processes().values()):
        assert running.running()
        os.sched_yield()
    running.signal(signal.SIGINT)
    assert running.wait(END).code == 130


@pytest.mark.parametrize("victim", ["caller", "launcher", "workflow_runner.py"])
def test_whoever_is_killed_all_the_others_go(sandbox: Sandbox, folder: Path, victim: str) -> None:
    running = launched(sandbox, folder, "wait")
    running.wait_for("up", UP)
    if victim == "caller":
        running.signal(signal.SIGKILL)
    else:
        # argv: interpreter, program, arguments; the launcher's has all the others' names.
        words = {"launcher": "/dragon", "workflow_runner.py": "/workflow_runner.py"}
        (pid,) = [
            pid
            for pid, line in sandbox.processes().items()
            if line.split()[1].endswith(words[victim])
        ]
        os.kill(pid, signal.SIGKILL)
    assert running.wait(END).code == (-signal.SIGKILL if victim == "caller" else 137)


def test_too_little_shared_memory_is_said(sandbox: Sandbox, folder: Path) -> None:
    with Sandbox("512m") as place:
        result = run(place, folder, "end")
    assert result.code == 2
    assert "512 MiB are free, and Dragon needs 4,272 MiB" in result.stderr
    assert "--shm-size" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("what", "code"), [("end", 5), ("hard", 3)])
def test_two_nodes_pass_the_exit_code(two_nodes: Nodes, folder: Path, what: str, code: int) -> None:
    result = run(two_nodes, folder, what)
    assert result.code == code, result
    assert "up 2 node" in result.stdout


def test_two_nodes_let_the_workflow_close(two_nodes: Nodes, folder: Path) -> None:
    running = launched(two_nodes, folder, "wait")
    running.wait_for("up", UP)
    running.signal(signal.SIGTERM)
    running.wait_for("closed", END)
    assert running.wait(END).code == 143


def test_a_caller_that_is_killed_and_no_node_keeps_anything(two_nodes: Nodes, folder: Path) -> None:
    running = launched(two_nodes, folder, "wait")
    running.wait_for("up", UP)
    running.signal(signal.SIGKILL)
    assert running.wait(END).code == -signal.SIGKILL


@pytest.mark.multinode
def test_a_node_that_dies_and_a_workflow_that_leaves(folder: Path) -> None:
    """Dragon's launcher hangs then; ours gives it 15 s, tells it, and ends it 10 s later."""
    with Nodes(2) as nodes:
        running = launched(nodes, folder, "wait")
        head = running.wait_for("up", UP).split()[-1]
        nodes.kill(next(host for host in nodes.hosts if host != head))
        running.signal(signal.SIGTERM)
        result = running.wait(END)
        assert result.code == 143, result
        assert nodes.left(grace=20) == []
    assert list(folder.glob("rhapsody-launch-*")) == []
