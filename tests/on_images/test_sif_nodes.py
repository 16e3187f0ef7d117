"""`rhapsody launch --image` with the real image: on one node and two, and whoever is killed.

The host has no Dragon: what it has of it is hidden from the command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from on_dragon import machine, small
from on_dragon.command import Running
from on_dragon.nodes import Nodes, Sandbox

UP = 120.0  # seconds for a workflow to be up, with all cores busy
END = 60.0

pytestmark = pytest.mark.timeout(300)

LAUNCH = "import sys; sys.modules['dragon'] = None; from rhapsody.cli import main; main()"

# Runs functions and programs on every node, says in which image, and does what it is told.
WORKFLOW = """
import asyncio, os, sys
from dragon.infrastructure.policy import Policy
from dragon.native.machine import Node, System
from rhapsody import ComputeTask, Session
from rhapsody.backends import DragonExecutionBackend

def where(number):
    return os.environ["APPTAINER_CONTAINER"], os.getcwd(), os.path.exists("workflow.py")

async def main(what):
    hosts = sorted(Node(huid).hostname for huid in System().nodes)
    async with Session(backends=[DragonExecutionBackend()]) as session:
        found = [ComputeTask(function=where, args=(n,)) for n in range(8)]
        at = Policy.Placement.HOST_NAME
        names = [
            ComputeTask(
                executable="sh",
                arguments=["-c", "cat /proc/sys/kernel/hostname; command -v rhapsody"],
                task_backend_specific_kwargs={
                    "process_template": {"policy": Policy(placement=at, host_name=host)}
                },
            )
            for host in hosts
        ]
        await session.submit_tasks([*found, *names])
        await session.wait_tasks([*found, *names])
        print("places", *{task.return_value for task in found})
        print("nodes", *(word for task in names for word in task.stdout.split()))
        print("up", flush=True)
        if what == "wait":
            await asyncio.sleep(1000)
    print("ended", *sys.argv[2:], end="", flush=True)
    sys.exit(5)

if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1]))
    except KeyboardInterrupt:
        print("closed", flush=True)
        raise
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    machine.require()
    with Sandbox() as place:
        yield place


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Nodes]:
    machine.require()
    with Nodes(2) as place:
        yield place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sif")
    (folder / "workflow.py").write_text(WORKFLOW)
    return folder


def launched(
    place: Sandbox | Nodes, sif: Path, apptainer: Path, folder: Path, *words: str
) -> Running:
    options = ["--image", str(sif), "--small-machine"]
    if isinstance(place, Nodes):
        options += ["--hosts", ",".join(place.hosts)]
    line = ["env", "--default-signal=INT,TERM,HUP", sys.executable, "-c", LAUNCH, "launch"]
    library = small.idlewait()
    env = {
        "PATH": f"{os.environ['PATH']}:{apptainer.parent}",
        "APPTAINER_BIND": str(library.parent),
        "APPTAINERENV_LD_PRELOAD": str(library),
    }
    return place.start([*line, *options, "workflow.py", *words], env=env, cwd=folder)


def assert_nothing_is_left(place: Sandbox | Nodes, folder: Path) -> None:
    assert place.left(grace=20) == []
    assert list(folder.glob("rhapsody-launch-*")) == []


def test_one_node(sandbox: Sandbox, sif: Path, apptainer: Path, folder: Path) -> None:
    result = launched(sandbox, sif, apptainer, folder, "end", "a b", "").wait(UP + END)
    assert result.code == 5, result
    assert result.stdout.startswith(f"places {(str(sif), str(folder), True)}\n"), result
    assert result.stdout.endswith("\nup\nended a b ")
    assert_nothing_is_left(sandbox, folder)


# Asks as any user of the host could, and says what comes.
STRANGER = """
import socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("\\0" + sys.argv[1])
    connection.settimeout(30)
    try:
        connection.sendall(b'{"argv": ["ssh", "a", "dragon-backend"], "environ": {}}\\n')
        print(connection.recv(99))
    except (BrokenPipeError, ConnectionResetError):
        print(b"")
"""


def test_ctrl_c_and_a_stranger(sandbox: Sandbox, sif: Path, apptainer: Path, folder: Path) -> None:
    running = launched(sandbox, sif, apptainer, folder, "wait")
    running.wait_for("up", UP)
    lines = [line.split() for line in sandbox.processes().values()]
    name = next(words[words.index("--outside") + 1] for words in lines if "--outside" in words)
    line = [sys.executable, "-I", "-S", "-c", STRANGER, name]
    stranger = subprocess.run(["setpriv", "--reuid=65534", *line], capture_output=True, text=True)
    assert stranger.stdout == "b''\n", stranger.stderr
    running.signal(signal.SIGINT)
    running.wait_for("closed", END)
    result = running.wait(END)
    assert result.code == 130, result
    assert_nothing_is_left(sandbox, folder)


def test_two_nodes(two_nodes: Nodes, sif: Path, apptainer: Path, folder: Path) -> None:
    result = launched(two_nodes, sif, apptainer, folder, "end", "a b", "").wait(UP + END)
    assert result.code == 5, result
    places, nodes, *rest = result.stdout.splitlines()
    assert places == f"places {(str(sif), str(folder), True)}"
    inside = nodes.split()
    assert inside[1::2] == ["node1", "node2"]
    assert len(set(inside[2::2])) == 1
    assert not os.path.exists(inside[2])  # the image's own
    assert rest[-1] == "ended a b "
    assert_nothing_is_left(two_nodes, folder)


def test_two_nodes_let_the_workflow_close(
    two_nodes: Nodes, sif: Path, apptainer: Path, folder: Path
) -> None:
    running = launched(two_nodes, sif, apptainer, folder, "wait")
    running.wait_for("up", UP)
    running.signal(signal.SIGTERM)
    running.wait_for("closed", END)
    result = running.wait(END)
    assert result.code == 143, result
    assert_nothing_is_left(two_nodes, folder)


def test_a_runner_that_is_killed_leaves_nothing(
    sandbox: Sandbox, sif: Path, apptainer: Path, folder: Path
) -> None:
    running = launched(sandbox, sif, apptainer, folder, "wait")
    running.wait_for("up", UP)
    (runner,) = (pid for pid, line in sandbox.processes().items() if line.startswith("Apptainer"))
    os.kill(runner, signal.SIGKILL)
    assert running.wait(END).code == 137
    assert_nothing_is_left(sandbox, folder)


def test_a_caller_that_is_killed_and_no_node_keeps_anything(
    two_nodes: Nodes, sif: Path, apptainer: Path, folder: Path
) -> None:
    running = launched(two_nodes, sif, apptainer, folder, "wait")
    running.wait_for("up", UP)
    running.signal(signal.SIGKILL)
    assert running.wait(END).code == -signal.SIGKILL
    assert_nothing_is_left(two_nodes, folder)
