"""`rhapsody launch` without Dragon: its command, its errors, and the supervisor over a stand-in.

A real launcher cannot be made to hang on demand; `tests/on_dragon` has the real one.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fifos import Fifo, readable
from proc import command_line
from processes import descendants_of, driver_of, gone
from rhapsody.launch.dragon.command import build_command, path_with_launcher
from rhapsody.launch.dragon.output import LauncherOutput
from rhapsody.launch.dragon.shared_memory import SegmentTracker, check_shared_memory
from rhapsody.runtime.errors import ResourceError

DRAGON = "/opt/bin/dragon"
SLURM = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "4"}


# ---------------------------------------------------------------------- the line


def words(
    nodes: int | None = None, hosts: tuple[str, ...] = (), environ: dict[str, str] | None = None
) -> str:
    command = build_command(DRAGON, nodes, hosts, environ or {})
    assert command.argv[0] == DRAGON
    assert command.remote == ("--wlm" in command.argv)
    return " ".join(command.argv[1:])


def test_one_node_is_always_told_to_be_one() -> None:
    assert words() == "-s"
    assert words(1) == "-s"
    assert words(1, environ=SLURM) == "-s"


def test_an_allocation_gives_what_was_asked_for_or_all_of_it(tmp_path: Path) -> None:
    assert words(environ=SLURM) == "-N 4 --wlm slurm"
    assert words(3, environ=SLURM) == "-N 3 --wlm slurm"
    (tmp_path / "nodes").write_text("a\na\nb\nb\n")  # two slots on each
    pbs = {"PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_JOBID": "9.server"}
    assert words(environ=pbs) == "-N 2 --wlm pbs+pals"
    assert words(1, environ=pbs) == "-s"


def test_hosts_are_reached_by_ssh_over_tcp() -> None:
    assert words(hosts=("a", "b.cluster")) == "--wlm ssh --hostlist a,b.cluster -t tcp"
    assert words(1, ("10.0.0.1", "10.0.0.2")) == "--wlm ssh --hostlist 10.0.0.1 -t tcp"
    assert words(2, ("a", "b"), SLURM) == "--wlm ssh --hostlist a,b -t tcp"


@pytest.mark.parametrize(
    ("nodes", "hosts", "environ", "said"),
    [
        (3, (), {}, "found no allocation"),
        (5, (), SLURM, "--nodes 5: the Slurm job 77 has 4 nodes"),
        (2, (), {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}, "has 1 node;"),
        (3, ("a", "b"), {}, "--hosts has 2 nodes"),
        (None, (), {"PBS_NODEFILE": "/nowhere/nodes"}, "cannot read PBS_NODEFILE /nowhere"),
    ],
)
def test_what_is_not_there_is_refused(
    nodes: int | None, hosts: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    with pytest.raises(ResourceError, match=re.escape(said)):
        words(nodes, hosts, environ)


@pytest.mark.parametrize("hosts", [("-oProxyCommand=x",), ("a", ""), ("a b",), ("a", "a")])
def test_hosts_that_ssh_would_misread_are_refused(hosts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="--hosts"):
        words(None, hosts)


def test_shared_memory_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"there is none.*4,272 MiB.*--shm-size"):
        check_shared_memory(str(tmp_path / "none"))


# ---------------------------------------------------------------------- the command


def command(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run `rhapsody launch`; `before` is Python that its process runs first."""
    program = f"import sys\n{before}\nfrom rhapsody.cli import main\nmain(sys.argv[1:])"
    words = [sys.executable, "-c", program, "launch", *arguments]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PBS_"))}
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environ)


NO_DRAGON = "import importlib.util as u; u.find_spec = lambda name: None"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["w.py"], "Dragon is the one there is: rhapsody launch --dragon w.py"),
        (["--dragon", "w.py"], "Dragon is not installed"),
        (["--dragon", "missing.py"], "missing.py"),
        (["--dragon", "--nodes", "0", "w.py"], "--nodes"),
    ],
)
def test_what_cannot_be_launched_is_refused_in_words(arguments: list[str], said: str) -> None:
    Path("w.py").touch()
    done = command(*arguments, before=NO_DRAGON)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_missing_dragon_is_said_with_the_line_that_installs_it() -> None:
    Path("w.py").touch()
    said = command("--dragon", "w.py", before=NO_DRAGON).stderr
    assert "pip install 'rhapsody-py[dragon]'" in said
    assert len(said.splitlines()) == 1


# ---------------------------------------------------------------------- its output


def sorted_output(*pieces: bytes, over: Callable[[], bool] = lambda: True) -> tuple[bytes, bytes]:
    output = LauncherOutput(over)
    parts = [output.split(piece) for piece in pieces]
    return b"".join(a for a, _ in parts) + output.flush(), b"".join(b for _, b in parts)


SAID = b"one\nno end+++ head proc exited, code -9\nwarning: left\n"


def test_dragons_lines_are_taken_out_wherever_the_pieces_end() -> None:
    for cut in range(len(SAID) + 1):
        assert sorted_output(SAID[:cut], SAID[cut:]) == (b"one\nno end", b"warning: left\n")
    assert sorted_output(*(SAID[n : n + 1] for n in range(len(SAID)))) == (
        b"one\nno end",
        b"warning: left\n",
    )


def test_a_workflow_may_print_the_same_words() -> None:
    assert sorted_output(SAID, over=lambda: False) == (SAID, b"")
    answers = iter([False, True])
    assert sorted_output(b"old " + SAID, SAID, over=lambda: next(answers)) == (
        b"old " + SAID + b"one\nno end",
        b"warning: left\n",
    )


def test_no_byte_waits_that_cannot_be_dragons() -> None:
    output = LauncherOutput(lambda: True)
    assert output.split(b"progress 1%") == (b"progress 1%", b"")
    assert output.split(b"+++ head of the list") == (b"+++ head of the list", b"")
    assert output.split(b"+++ head proc") == (b"", b"")
    assert output.split(b"essing") == (b"+++ head processing", b"")


def test_only_the_memory_of_the_run_is_removed() -> None:
    """Mapped by its processes, new since its start, and Dragon's by name."""
    folder, mark = Path("/dev/shm"), f"{os.getpid()}x"
    names = {name: folder / f"{name}{mark}" for name in ("DDold", "DDmine", "DDother", "psm_mine")}
    try:
        names["DDold"].write_bytes(b"x" * 4096)
        segments = SegmentTracker()
        maps = []
        for name in ("DDmine", "DDother", "psm_mine"):
            names[name].write_bytes(b"x" * 4096)
        for name in ("DDold", "DDmine", "psm_mine"):
            with names[name].open("r+b") as file:
                maps.append(mmap.mmap(file.fileno(), 4096))
        segments.record([os.getpid()])
        for one in maps:
            one.close()
        assert segments.unlink() == [names["DDmine"].name]
        assert [name for name in names if names[name].exists()] == ["DDold", "DDother", "psm_mine"]
    finally:
        for path in names.values():
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- supervision

# What Dragon's launcher does that matters here: it starts the workflow's runner, prints when that
# has ended, and ends with its code; or it does what WISH says.
STAND_IN = """
import os, signal, subprocess, sys, time
wish = os.environ.get("WISH", "")
if "deaf" in wish:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
else:
    signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    runner = subprocess.Popen([sys.executable, *sys.argv[1:]])
    if "agent" in wish:
        subprocess.Popen(["setsid", "sh", "-c", f"exec 9>'{os.environ['ROSTER']}'; sleep 1000; :"])
    code = runner.wait()
    if "silent" not in wish:
        print(f"+++ head proc exited, code {code}", flush=True)
    if "hang" in wish:
        time.sleep(1000)
    print("warning: 2 leftover files")
    sys.exit(code if "zero" not in wish else 0)
except KeyboardInterrupt:
    print("told", flush=True)
    sys.exit(1)
"""

# argv: the stand-in, whether there are several nodes, and the workflow's words.
DRIVER = """
import os, signal, sys
from rhapsody.launch import supervisor
from rhapsody.launch.dragon.command import LauncherCommand
for name in ("WORKFLOW_GRACE", "LAUNCHER_GRACE", "LAUNCHER_EXIT", "NODE_EXIT", "HEARTBEAT"):
    wanted = os.environ.get(name)
    if wanted:
        setattr(supervisor, f"{name}_SECONDS", float(wanted))
supervisor.MISSED_HEARTBEATS = 5
signal.signal(signal.SIGINT, signal.default_int_handler)
standin, remote, *words = sys.argv[1:]
command = LauncherCommand([sys.executable, standin], remote == "1")
folder = os.getcwd() if command.remote else None
socket = os.environ.get("HOST_SOCKET")
spec = supervisor.LaunchSpec(command, words, dict(os.environ), folder, socket)
sys.exit(supervisor.supervise(spec))
"""

# argv: the roster, then what to do.
WORKFLOW = """
import os, signal, sys, time
roster = open(sys.argv[1], "w")
os.set_inheritable(roster.fileno(), True)
def report(word):
    os.write(roster.fileno(), f"{word}\\n".encode())  # also in the midst of another report
what = sys.argv[2]
print("to stdout", end="", flush=True)
if what == "wait":
    try:
        report("up")
        time.sleep(1000)
    except KeyboardInterrupt:
        report("asked")
        sys.exit(9)
elif what == "stubborn":
    signal.signal(signal.SIGINT, lambda *_: report("asked"))
    report("up")
    while True:
        time.sleep(1000)
elif what == "code":
    sys.exit(int(sys.argv[3]))
elif what == "hard":
    os._exit(3)
elif what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "words":
    print("+++ head proc exited, code 0", flush=True)
    time.sleep(0.5)
    print(*sys.argv[3:], flush=True)
"""


@pytest.fixture
def roster(tmp_path: Path) -> Iterator[Fifo]:
    (tmp_path / "standin.py").write_text(STAND_IN)
    (tmp_path / "workflow.py").write_text(WORKFLOW)
    with Fifo(tmp_path / "roster") as roster:
        yield roster


Driver = asyncio.subprocess.Process


def launched(
    roster: Fifo,
    *what: str,
    several: bool = False,
    monkeypatch: pytest.MonkeyPatch,
    **environ: str,
) -> tuple[str, ...]:
    for name, value in {"ROSTER": str(roster.path), **environ}.items():
        monkeypatch.setenv(name, value)
    folder = roster.path.parent
    monkeypatch.setenv("TMPDIR", str(folder))
    words = (str(folder / "workflow.py"), str(roster.path), *what)
    return str(folder / "standin.py"), str(int(several)), *words


async def ended(driver: Driver, roster: Fifo) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; and nothing is left of it."""
    out, err = await asyncio.wait_for(driver.communicate(), 60)
    await roster.empty()
    assert list(roster.path.parent.glob("rhapsody-launch-*")) == []
    assert driver.returncode is not None
    return driver.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("what", "code"), [(["code", "0"], 0), (["code", "7"], 7), (["hard"], 3), (["kill"], 137)]
)
async def test_the_workflows_exit_code_is_ours(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch, what: list[str], code: int, several: bool
) -> None:
    # On several nodes Dragon's launcher says nothing, and ends with 0.
    wish = "silent zero" if several else ""
    words = launched(
        roster, *what, several=several, monkeypatch=monkeypatch, WISH=wish, HEARTBEAT="0.2"
    )
    async with driver_of(DRIVER, *words) as driver:
        got, out, err = await ended(driver, roster)
    assert got == code, err
    if not several:
        assert out == "to stdout"
        assert "+++" not in err
        assert "leftover" in err
    assert ("SIGKILL" in err) == (code == 137)


async def test_arguments_and_output_arrive_as_they_are(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--x", "a b", "", "$HOME", "-s", "é"]
    line = launched(roster, "words", *words, monkeypatch=monkeypatch, LAUNCHER_EXIT="1000")
    async with driver_of(DRIVER, *line) as driver:
        code, out, err = await ended(driver, roster)
    assert code == 0, err
    assert out == "to stdout+++ head proc exited, code 0\n" + " ".join(words) + "\n"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
async def test_a_signal_lets_the_workflow_close(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch, number: int, code: int, several: bool
) -> None:
    line = launched(
        roster,
        "wait",
        several=several,
        monkeypatch=monkeypatch,
        WORKFLOW_GRACE="1000",
        HEARTBEAT="0.1",
    )
    async with driver_of(DRIVER, *line) as driver:
        assert await roster.line() == "up"
        driver.send_signal(number)
        assert await roster.line() == "asked"
        got, out, err = await ended(driver, roster)
    assert got == code
    assert "told" not in out  # the launcher ended by itself
    assert signal.Signals(number).name in err


@pytest.mark.parametrize("end", [False, True])
async def test_in_an_image_the_process_outside_has_the_say(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch, end: bool
) -> None:
    """By stdin: the numbers of signals, and its end. A signal is the runner's copy of one."""
    line = launched(
        roster, "wait", monkeypatch=monkeypatch, WORKFLOW_GRACE="1000", HOST_SOCKET="none"
    )
    async with driver_of(DRIVER, *line) as driver:
        assert await roster.line() == "up"
        driver.send_signal(signal.SIGTERM)
        assert driver.stdin is not None
        if end:
            driver.stdin.close()
        else:
            driver.stdin.write(bytes([signal.SIGINT]))
            await driver.stdin.drain()
            assert await roster.line() == "asked"
            assert await asyncio.wait_for(driver.wait(), 60) == 130
        got, _, err = await ended(driver, roster)
    assert got == (1 if end else 130)
    assert "SIGTERM" not in err
    assert ("killing" in err) == end


@pytest.mark.parametrize("wish", ["", "deaf agent"])
async def test_a_workflow_that_goes_on_and_then_a_launcher_that_may_too(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    line = launched(
        roster,
        "stubborn",
        monkeypatch=monkeypatch,
        WORKFLOW_GRACE="0.2",
        LAUNCHER_GRACE="1",
        WISH=wish,
    )
    async with driver_of(DRIVER, *line) as driver:
        assert await roster.line() == "up"
        driver.send_signal(signal.SIGINT)
        got, out, err = await ended(driver, roster)
    assert got == 130
    assert ("told" in out) == (wish == "")
    assert ("killing" in err) == (wish != "")


async def test_a_second_signal_ends_all_at_once(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = launched(
        roster,
        "stubborn",
        monkeypatch=monkeypatch,
        WORKFLOW_GRACE="1000",
        LAUNCHER_GRACE="1000",
        WISH="deaf agent",
    )
    async with driver_of(DRIVER, *line) as driver:
        assert await roster.line() == "up"
        driver.send_signal(signal.SIGINT)
        assert await roster.line() == "asked"
        driver.send_signal(signal.SIGTERM)
        got, _, _ = await ended(driver, roster)
    assert got == 130


@pytest.mark.parametrize("wish", ["hang", "hang silent", "hang silent deaf agent"])
async def test_a_launcher_that_stays_after_the_workflow_is_ended(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    for several in (False, True):
        line = launched(
            roster,
            "hard",
            several=several,
            monkeypatch=monkeypatch,
            WISH=wish,
            LAUNCHER_EXIT="0.3",
            LAUNCHER_GRACE="0.3",
            NODE_EXIT="0.3",
            HEARTBEAT="0.1",
        )
        async with driver_of(DRIVER, *line) as driver:
            got, _, err = await ended(driver, roster)
        assert got == 3
        assert "still runs" in err


async def test_a_workflow_on_another_host_without_a_heartbeat(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node is lost: here, its runner is stopped, and with it the heartbeat."""
    line = launched(
        roster,
        "wait",
        several=True,
        monkeypatch=monkeypatch,
        HEARTBEAT="0.1",
        LAUNCHER_GRACE="0.5",
        NODE_EXIT="0.5",
    )
    async with driver_of(DRIVER, *line) as driver:
        assert await roster.line() == "up"
        (runner,) = [
            pid for pid in descendants_of(driver.pid) if _runs(pid, "workflow_runner.py", 1)
        ]
        os.kill(runner, signal.SIGSTOP)
        got, _, err = await ended(driver, roster)
    assert got == 1
    assert "no heartbeat" in err


async def test_an_end_that_nobody_reported_is_no_success(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = launched(
        roster, "wait", several=True, monkeypatch=monkeypatch, WISH="silent zero", HEARTBEAT="0.1"
    )
    async with driver_of(DRIVER, *line) as driver:
        assert await roster.line() == "up"
        (runner,) = [
            pid for pid in descendants_of(driver.pid) if _runs(pid, "workflow_runner.py", 1)
        ]
        os.kill(runner, signal.SIGKILL)  # and its child with it
        got, _, err = await ended(driver, roster)
    assert got == 1
    assert "RHAPSODY_WORK_DIR" in err


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("victim", ["caller", "supervisor", "launcher"])
async def test_whoever_is_killed_all_the_others_go(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch, victim: str, several: bool
) -> None:
    line = launched(
        roster,
        "stubborn",
        several=several,
        monkeypatch=monkeypatch,
        WISH="agent deaf",
        NODE_EXIT="0.3",
        HEARTBEAT="0.1",
    )
    async with driver_of(DRIVER, *line) as driver:
        assert await roster.line() == "up"
        everybody = descendants_of(driver.pid)
        launcher = next(pid for pid in everybody if _runs(pid, "standin.py", 1))
        pid = {"caller": driver.pid, "supervisor": everybody[0], "launcher": launcher}[victim]
        os.kill(pid, signal.SIGKILL)
        got, _, err = await ended(driver, roster)
        for one in everybody:
            await gone(one)
    assert got == (-signal.SIGKILL if victim == "caller" else 137), err


async def test_output_that_nobody_reads_stops_nothing(
    roster: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed pipe is the workflow's no matter; a full one lets a second signal through."""
    flood = roster.path.parent / "flood.py"
    flood.write_text(
        "import sys\nwith open(sys.argv[1], 'w') as f: print('up', file=f, flush=True)\n"
        "for _ in range(3000): print('x' * 999)\nsys.exit(6)\n"
    )
    standin, several, *_ = launched(roster, monkeypatch=monkeypatch)
    async with driver_of(DRIVER, standin, several, str(flood), str(roster.path)) as driver:
        assert driver.stdout is not None
        driver.stdout._transport.close()  # type: ignore[attr-defined]
        assert await driver.wait() == 6
    reader, writer = os.pipe()
    words = [sys.executable, "-c", DRIVER, standin, several, str(flood), str(roster.path)]
    full = await asyncio.create_subprocess_exec(*words, stdout=writer)
    os.close(writer)
    try:
        assert await roster.line() == "up"
        await readable(reader)
        full.send_signal(signal.SIGINT)
        full.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(full.wait(), 30) in (130, 143, 6)
    finally:
        os.close(reader)


def _runs(pid: int, name: str, place: int) -> bool:
    words = command_line(pid)
    return len(words) > place and words[place].endswith(name.encode())


def test_dragon_finds_its_programs_beside_the_one_that_is_started(tmp_path: Path) -> None:
    for folder in ("ours", "player"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dragon").touch(mode=0o755)
    ours, player = str(tmp_path / "ours"), str(tmp_path / "player")

    def path_on(path: str) -> str:
        return path_with_launcher(f"{ours}/dragon", {"PATH": path})

    assert path_on("/bin") == f"{ours}:/bin"
    assert path_on("") == ours
    assert path_on(f"{player}:{ours}") == f"{ours}:{player}:{ours}"
    assert path_on(f"/bin:{ours}:{player}") == f"/bin:{ours}:{player}"
    assert path_with_launcher("dragon", {"PATH": "/bin"}) == "/bin"
