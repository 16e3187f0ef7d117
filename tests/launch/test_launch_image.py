"""`rhapsody launch --image`, over a stand-in for apptainer that runs its words where it is.

What runs inside is a stand-in too, which does what a test wants; `tests/on_images` has the real
ones. The process outside, and the programs that ask it for ssh and srun, are the product's.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fifos import PATIENCE, Fifo
from processes import descendants_of, driver_of, gone
from rhapsody.launch.apptainer import Image, enter_image

# The shell that began the tests may ignore Ctrl-C, and then a launch would too.
LAUNCH = """
import signal, sys
from rhapsody.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main(["launch", *sys.argv[1:]])
"""
SSH = ["ssh", "-oBatchMode=yes", "a", "cd /w && PATH=/x:/y  dragon-backend --ip-addr 1"]

# Stays above what it runs, as apptainer does, and has its life in its hand.
RUNNER = """
import ctypes, json, os, subprocess, sys
with open("line", "w") as file:
    json.dump(sys.argv[1:], file)
place = sys.argv.index("--pwd")
os.chdir(sys.argv[place + 1])
child = subprocess.Popen(
    sys.argv[place + 3:], preexec_fn=lambda: ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
)
sys.exit(child.wait())
"""

# In the place of rhapsody inside. argv: launch --outside NAME --dragon SCRIPT ROSTER WHAT...
INSIDE = """
import ctypes, json, os, subprocess, sys, time
die = lambda: ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # with the parent
name = sys.argv[3]
place = sys.argv.index(os.environ["ROSTER"])
what, *words = sys.argv[place + 1:]
roster = open(sys.argv[place], "w")
os.set_inheritable(roster.fileno(), True)
def report(*words):
    print(*words, file=roster, flush=True)
line = [sys.executable, "-m", "rhapsody.launch.host_shim", name, *words]
if what == "code":
    sys.exit(int(words[0]))
if what == "wait":
    report("up")
    numbers = os.read(0, 64)
    report("got", *numbers)
    sys.exit(9)
if what == "deaf":
    report("up")
    time.sleep(1000)
if what == "ask":
    done = subprocess.run(line, input=b"to it", capture_output=True)
    json.dump([done.returncode, done.stdout.decode(), done.stderr.decode()], sys.stdout)
if what.isdigit():
    asker = subprocess.Popen(line, pass_fds=[roster.fileno()], preexec_fn=die)
    os.read(0, 64)
    asker.send_signal(int(what))
    sys.exit(asker.wait())
"""

# In the place of ssh and srun outside: says what it was given, or waits for its end.
PROGRAM = """
import json, os, signal, sys, time
if "wait" in sys.argv[-1]:
    with open(os.environ["ROSTER"], "w") as roster:
        signal.signal(signal.SIGINT, lambda *_: (print("told", file=roster), sys.exit(4)))
        print("up", os.getpid(), file=roster, flush=True)
        time.sleep(1000)
names = [n for n in os.environ if n.startswith("APPTAINERENV_")]
told = [sys.argv[1:], {n: os.environ[n] for n in names}, sys.stdin.read()]
print("said", file=sys.stderr)
json.dump(told, sys.stdout)
sys.exit(3)
"""


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


@pytest.fixture
def roster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fifo]:
    """An image, a workflow, and the stand-ins first on the PATH; the current folder has them."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "apptainer": RUNNER,
        "rhapsody": INSIDE,
        "ssh": PROGRAM,
        "srun": PROGRAM,
    }.items():
        program(programs, name, text)
    (tmp_path / "r.sif").touch()
    (tmp_path / "w.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("ROSTER", str(tmp_path / "roster"))
    with Fifo(tmp_path / "roster") as roster:
        yield roster


def run(*words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `rhapsody launch --image r.sif` with more words."""
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, "--image", "r.sif", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **(env or {})},
    )


def asked(roster: Fifo, *words: str) -> tuple[int, str, str]:
    """What a stand-in inside got for these words: exit code, stdout, stderr."""
    done = run("w.py", str(roster.path), "ask", *words)
    assert done.returncode == 0, done.stderr
    code, out, err = json.loads(done.stdout)
    return code, out, err


# ---------------------------------------------------------------------- the line


def test_the_image_sees_the_folders_and_gets_the_command(roster: Fifo) -> None:
    scripts, work = Path("scripts").absolute(), Path("work").absolute()
    scripts.mkdir()
    script = scripts / "w.py"
    script.touch()
    options = ["--nodes", "2", "--hosts", "a,b", "--small-machine"]
    done = run(
        *options, str(script), str(roster.path), "code", "7", env={"RHAPSODY_WORK_DIR": "work"}
    )
    assert done.returncode == 7, done.stderr
    here = os.getcwd()
    line = json.loads(Path("line").read_text())
    binds = [f for folder in sorted([here, str(scripts), str(work)]) for f in ("--bind", folder)]
    assert line[:10] == ["exec", *binds, "--pwd", here, f"{here}/r.sif"]
    shell, option, _, image, *words = line[10:]
    assert (shell, option, image) == ("sh", "-c", f"{here}/r.sif")
    assert words[:2] == ["launch", "--outside"]
    assert words[3:] == [
        *("--dragon", "--nodes=2", "--hosts=a,b", "--small-machine"),
        *("--", str(script), str(roster.path), "code", "7"),
    ]


def test_the_hosts_python_is_not_the_images(roster: Fifo) -> None:
    Path("bin/rhapsody").write_text("#!/bin/sh\nenv\n")
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "VIRTUAL_ENV": "/v", "MINE": "1"}
    names = {line.partition("=")[0] for line in run("w.py", env=own).stdout.splitlines()}
    assert names >= {"MINE", "PATH"}
    assert not names & {"PYTHONPATH", "VIRTUAL_ENV"}


def test_what_is_not_there_is_said(roster: Fifo) -> None:
    for words, path, said in (
        (["w.py"], "/nowhere", "neither apptainer nor singularity is on the PATH"),
        (["--image", "none.sif", "w.py"], None, "none.sif"),
    ):
        done = run(*words, env={"PATH": path or os.environ["PATH"]})
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    os.unlink("bin/rhapsody")
    done = run("w.py", env={"PATH": f"{os.getcwd()}/bin:/usr/bin:/bin"})
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: {os.getcwd()}/r.sif has no program rhapsody on its PATH; make one as "
        "containers/README.md says\n"
    )


def test_a_folder_that_the_runner_would_misread_is_refused(roster: Fifo) -> None:
    os.mkdir("a,b")
    done = run("w.py", env={"RHAPSODY_WORK_DIR": "a,b"})
    assert done.returncode == 2
    assert "a,b can't be bound" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_image_without_dragon_is_named(roster: Fifo) -> None:
    before = "import importlib.util as u; u.find_spec = lambda name: None\n"
    done = subprocess.run(
        [sys.executable, "-c", before + LAUNCH, "--outside", "x", "--dragon", "w.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "APPTAINER_CONTAINER": "/i/r.sif"},
    )
    assert done.returncode == 2
    assert "/i/r.sif has no Dragon" in done.stderr
    assert len(done.stderr.splitlines()) == 1


IMAGE = Image("/usr/bin/apptainer", "/i/r.sif", ["/w"])


def entered() -> list[str]:
    binds = ["exec", "--bind", "/w", "--pwd", os.getcwd()]
    return ["/usr/bin/apptainer", "--silent", *binds, "/i/r.sif"]


def test_ssh_gets_one_word_that_enters_the_image() -> None:
    environ = {"APPTAINER_NV": "1", "APPTAINER_DOCKER_PASSWORD": "secret", "X": "1"}
    words, environ = enter_image(IMAGE, SSH, {"PATH": "/in"}, environ)
    assert words[:3] == SSH[:3]
    there = subprocess.run(["sh", "-c", f"printf '%s\\n' {words[3]}"], capture_output=True).stdout
    assert there.decode().splitlines() == [
        *("env", "APPTAINER_NV=1", *entered(), "/bin/sh", "-c", SSH[3])
    ]
    assert "APPTAINERENV_PATH" not in environ


def test_srun_and_mpiexec_get_the_image_before_the_command() -> None:
    options = ["--nodes=2", "--ntasks=2", "--cpu_bind=none", "--nodelist=a,b"]
    command = ["dragon-backend", "--ip-addr", "1.2.3.4:7575"]
    for program in ("srun", "mpiexec"):
        words, environ = enter_image(
            IMAGE, [program, *options, *command], {"PATH": "/in", "DRAGON_X": "1"}, {"PATH": "/out"}
        )
        assert words == [program, *options, *entered(), *command]
        assert environ == {
            "PATH": "/out",
            "APPTAINERENV_PATH": "/in",
            "APPTAINERENV_DRAGON_X": "1",
        }


# ---------------------------------------------------------------------- what runs outside


def test_a_program_outside_is_run_in_the_place_of_the_stand_in(roster: Fifo) -> None:
    code, out, err = asked(roster, "srun", "-N2", "dragon-backend", "--x", "a b")
    words, environ, stdin = json.loads(out)
    assert (code, err, stdin) == (3, "said\n", "to it")
    assert words[0] == "-N2"
    assert words[-4:] == [f"{os.getcwd()}/r.sif", "dragon-backend", "--x", "a b"]
    assert environ["APPTAINERENV_PATH"].startswith(f"{os.getcwd()}/bin:")


def test_a_program_that_is_missing_outside_is_named(roster: Fifo) -> None:
    os.unlink("bin/srun")
    for name in ("sh", "env"):
        os.symlink(shutil.which(name) or name, f"bin/{name}")
    done = run(
        *("w.py", str(roster.path), "ask", "srun", "dragon-backend"),
        env={"PATH": f"{os.getcwd()}/bin"},  # this machine may have one
    )
    assert json.loads(done.stdout) == [127, "", "srun: not found outside the image\n"]


# A stand-in that finds the answer there, and who gave it gone, when it goes on after its question.
LATE = """
import select, socket
from rhapsody.launch import host_shim

def ask(connection, *words, send=socket.send_fds):
    sent = send(connection, *words)
    gone = select.poll()
    gone.register(connection, 0)
    gone.poll()
    return sent

socket.send_fds = ask
host_shim.main()
"""


@pytest.mark.parametrize(("answer", "code"), [(b"7\n", 7), (b"", 255)])
def test_an_answer_that_is_there_at_once(roster: Fifo, answer: bytes, code: int) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name := f"\0{roster.path}")
        listener.listen()
        listener.settimeout(PATIENCE)
        words = [sys.executable, "-c", LATE, name[1:], "srun", "dragon-backend"]
        asker = subprocess.Popen(words, stderr=subprocess.PIPE)
        connection, _ = listener.accept()
        with connection:
            _, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            connection.sendall(answer)
        for stream in streams:
            os.close(stream)
        assert asker.communicate(timeout=PATIENCE)[1] == b""
        assert asker.returncode == code


def test_what_is_not_dragons_is_the_next_one_on_the_path(roster: Fifo) -> None:
    program(Path("bin"), "here", "print('first')")
    os.mkdir("later")
    program(Path("later"), "here", "import sys; print(sys.argv[1:])")
    line = [sys.executable, "-m", "rhapsody.launch.host_shim", "none", "here", "dragon-backends"]
    for folders, code, said in (("bin:later", 0, "['dragon-backends']\n"), ("bin", 1, "")):
        path = ":".join(os.path.abspath(one) for one in folders.split(":"))
        done = subprocess.run(
            line, capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        assert (done.returncode, done.stdout) == (code, said), done.stderr
    assert "here: not found in the image" in done.stderr


async def inside(roster: Fifo, driver: asyncio.subprocess.Process, code: int) -> str:
    """Its end with this code, and that of all that it started; returns its stderr."""
    _, err = await asyncio.wait_for(driver.communicate(), PATIENCE)
    await roster.empty()
    assert driver.returncode == code, err.decode()
    return err.decode()


def line(roster: Fifo, *words: str) -> list[str]:
    return ["--image", "r.sif", "w.py", str(roster.path), *words]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_goes_in_once(roster: Fifo, number: signal.Signals, group: bool) -> None:
    async with driver_of(LAUNCH, *line(roster, "wait"), start_new_session=True) as driver:
        assert await roster.line() == "up"
        (os.killpg if group else os.kill)(driver.pid, number)
        assert await roster.line() == f"got {number:d}"
        await inside(roster, driver, 9)


async def test_a_third_signal_needs_nobody_inside(roster: Fifo) -> None:
    async with driver_of(LAUNCH, *line(roster, "deaf")) as driver:
        assert await roster.line() == "up"
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # equal ones may become one
            driver.send_signal(number)
        await asyncio.wait_for(driver.wait(), PATIENCE)
        assert driver.returncode in (143, 129, 130)
        await roster.empty()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 4), (signal.SIGKILL, 256 - 9)])
async def test_a_stand_in_passes_signals_on_and_takes_its_program_with_it(
    roster: Fifo, number: signal.Signals, code: int
) -> None:
    words = line(roster, str(int(number)), "srun", "dragon-backend", "wait")
    async with driver_of(LAUNCH, *words) as driver:
        up, pid = (await roster.line()).split()
        assert up == "up"
        driver.send_signal(signal.SIGTERM)  # so that it goes on
        if number == signal.SIGINT:
            assert await roster.line() == "told"
        await gone(int(pid))
        await inside(roster, driver, code)


@pytest.mark.parametrize("victim", ["outside", "runner"])
async def test_whoever_is_killed_the_others_go(roster: Fifo, victim: str) -> None:
    words = line(roster, "0", "srun", "dragon-backend", "wait")
    async with driver_of(LAUNCH, *words) as driver:
        _, pid = (await roster.line()).split()
        everybody = descendants_of(driver.pid)
        os.kill(driver.pid if victim == "outside" else everybody[0], signal.SIGKILL)
        code = await asyncio.wait_for(driver.wait(), PATIENCE)
        assert code == (-signal.SIGKILL if victim == "outside" else 137)
        await gone(int(pid))
