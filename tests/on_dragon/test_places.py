"""The harness itself: places, what is left in them, and their ends. No Dragon in here."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from . import machine
from .nodes import Nodes, Sandbox

SHM = "16m"

LEAVES = "(sleep 1000 >/dev/null 2>&1 &); touch /dev/shm/rest"


def test_a_command_has_the_shared_memory_of_its_place(sandbox: Sandbox) -> None:
    size = sandbox.run(["df", "--output=size", "-BM", "/dev/shm"]).stdout.split()[-1]
    assert size == "8192M"
    with Sandbox(SHM) as other:
        other.run(["touch", "/dev/shm/there"])
        assert sandbox.left() == []
        assert other.left() == ["/dev/shm/there"]


def test_exit_codes_output_folder_and_environment(sandbox: Sandbox, tmp_path: Path) -> None:
    script = "pwd; echo $WORD >&2; exit 7"
    result = sandbox.run(["sh", "-c", script], env={"WORD": "a b"}, cwd=tmp_path)
    assert (result.code, result.stdout, result.stderr) == (7, f"{tmp_path}\n", "a b\n")
    assert sandbox.run(["sh", "-c", "kill -TERM $$"]).code == -signal.SIGTERM


def test_signals_reach_the_command_and_its_group(sandbox: Sandbox) -> None:
    script = "trap 'echo caught; exit 3' INT TERM; echo up; sleep 1000 >&- 2>&- & wait"
    for number, group in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        command = sandbox.start(["sh", "-c", script])
        assert command.wait_for("up") == "up"
        command.signal(number, group=group)
        assert command.wait_for("caught") == "caught"
        assert command.wait(10).code == 3
    sandbox.kill_all()
    assert sandbox.left() == []


def test_what_is_left_is_told_and_taken_away() -> None:
    with Sandbox(SHM) as place:
        assert place.run(["sh", "-c", LEAVES]).code == 0
        assert place.left(grace=0) == ["sleep 1000", "/dev/shm/rest"]
        place.kill_all()
        assert place.left(grace=0) == ["/dev/shm/rest"]


def test_a_process_that_ends_a_little_later_is_not_left() -> None:
    with Sandbox(SHM) as place:
        place.run(["sh", "-c", "(sleep 0.3 >/dev/null 2>&1 &)"])
        assert place.left() == []


def test_a_command_that_overstays_is_killed_and_what_it_wrote_is_told() -> None:
    with Sandbox(SHM) as place:
        with pytest.raises(TimeoutError, match=r"(?s)after 0.5 s.*last words"):
            place.run(["sh", "-c", f"{LEAVES}; echo last words; sleep 1000"], timeout=0.5)
        assert place.left(grace=0) == ["/dev/shm/rest"]


@pytest.mark.multinode
def test_a_place_ends_with_its_maker_even_if_that_is_killed(tmp_path: Path) -> None:
    """Its processes are gone, and no file stays, though nobody could clean up."""
    script = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        from on_dragon.nodes import Nodes
        nodes = Nodes(2, "16m")
        nodes.start(["ssh", "node2", "echo up; exec sleep 1000"]).wait_for("up")
        print(*nodes.processes(), flush=True)
        sys.stdin.read()
    """
    tests = str(Path(__file__).parents[1])
    maker = subprocess.Popen(
        [sys.executable, "-c", script, tests],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with maker:
        assert maker.stdout is not None
        pids = [int(word) for word in maker.stdout.readline().split()]
        assert len(pids) == 2, "the ssh on the front end, and what it runs on node2"
        handles = [os.pidfd_open(pid) for pid in pids]
        maker.kill()
    for handle in handles:
        # The namespace's first process sees the end of its pipe.
        assert _ends(handle, 10)
        os.close(handle)
    assert list(tmp_path.iterdir()) == []


def test_nodes_have_names_ids_and_a_network_of_their_own(two_nodes: Nodes) -> None:
    script = "hostname; cat /proc/sys/kernel/random/boot_id; getent hosts node1 frontend"
    said = [two_nodes.run(["ssh", "-o", "BatchMode=yes", h, script]) for h in two_nodes.hosts]
    assert [result.stdout.split()[0] for result in said] == ["node1", "node2"]
    assert len({result.stdout.split()[1] for result in said}) == 2
    assert all("10.77.0.1" in result.stdout for result in said)
    listen = "import socket; s = socket.create_server(('0.0.0.0', 7777)); print('up', flush=True); \
s.accept()[0].sendall(b'hello')"
    server = two_nodes.start(["ssh", "node2", f'{sys.executable} -c "{listen}"'])
    server.wait_for("up")
    ask = "import socket; print(socket.create_connection(('node2', 7777)).recv(9))"
    assert "hello" in two_nodes.run(["ssh", "node1", f'{sys.executable} -c "{ask}"']).stdout
    assert server.wait().code == 0


def test_variables_and_exit_codes_go_by_ssh(two_nodes: Nodes) -> None:
    result = two_nodes.run(["ssh", "root@node1", "echo $WORD; exit 9"], env={"WORD": "a b"})
    assert (result.code, result.stdout) == (9, "a b\n")
    assert two_nodes.run(["ssh", "node3", "true"]).code == 255


@pytest.mark.multinode
def test_a_killed_node_is_gone_and_the_other_is_not() -> None:
    with Nodes(2, SHM) as nodes:
        command = nodes.start(["ssh", "node2", "echo up; exec sleep 1000"])
        command.wait_for("up")
        nodes.run(["ssh", "node1", "touch /dev/shm/rest"])
        assert nodes.alive("node2")
        nodes.kill("node2")
        assert not nodes.alive("node2")
        assert command.wait(10).code != 0
        lost = nodes.run(["ssh", "node2", "true"])
        assert (lost.code, lost.stderr.endswith("No route to host\n")) == (255, True)
        assert nodes.left() == ["node1: /dev/shm/rest"]


@pytest.mark.multinode
def test_kill_all_reaches_every_node() -> None:
    with Nodes(2, SHM) as nodes:
        for host in nodes.hosts:
            nodes.run(["ssh", host, "sleep 1000 >/dev/null 2>&1 &"])
        assert nodes.left(grace=0) == [f"{host}: sleep 1000" for host in nodes.hosts]
        nodes.kill_all()
        assert nodes.left(grace=0) == []
        assert nodes.run(["ssh", "node1", "true"]).code == 0


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="run this as root"):
        Sandbox(SHM)
    monkeypatch.undo()
    monkeypatch.setattr(machine, "which", lambda command: None if command == "ip" else "/bin/true")
    with pytest.raises(RuntimeError, match=r"apt-get install .* iproute2$"):
        Nodes(2, SHM)


def _ends(handle: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
