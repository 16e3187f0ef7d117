"""The command `rhapsody`, run as a user runs it: in processes, in pipes, and on a terminal."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rhapsody.backends.descriptors import BUILT_IN
from rhapsody.backends.discovery import install_hint
from rhapsody.cli import doctor
from rhapsody.cli.bench import WORKLOADS

MODULE = [sys.executable, "-m", "rhapsody"]
ENTRY_POINT = [str(Path(sys.executable).parent / "rhapsody")]

# A Python process becomes the command that its arguments say.
BECOME = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"

HEADER = """\
import asyncio, os, sys
import rhapsody
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend
"""


def command(
    *arguments: str | Path,
    program: list[str] = MODULE,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    before: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run the command; ``before`` is Python that its process runs before."""
    first = [sys.executable, "-c", f"{before}\n{BECOME}"] if before else []
    return subprocess.run(
        [*first, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=60,
    )


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Write a workflow script: the header, then a body."""

    def write(body: str, name: str = "workflow.py", header: str = HEADER) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(header + textwrap.dedent(body))
        return path

    return write


WORK = """
    async def main():
        async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
            tasks = [ComputeTask(function=pow, args=(2, n)) for n in range(3)]
            tasks.append(ComputeTask(executable="false"))
            await session.submit_tasks(tasks{which})
            await session.wait_tasks(tasks{which})
            print(sum(task.return_value for task in tasks[:3]))

    asyncio.run(main())
"""


# --- run: what it prints, and its exit code ----------------------------------------------------


@pytest.mark.parametrize("program", [MODULE, ENTRY_POINT], ids=["module", "entry-point"])
def test_run_prints_a_summary_and_leaves_stdout_to_the_script(
    script: Callable[..., Path], program: list[str]
) -> None:
    done = command("run", script(WORK.format(which="[:3]")), program=program)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    assert re.search(r"rhapsody: 3 tasks in \d+\.\d\d s: 3 DONE\n", done.stderr)
    assert re.search(r"on average a task waited [\d.]+ m?s, ran [\d.]+ m?s\n", done.stderr)
    assert re.search(r"^concurrent +3 *$", done.stderr, re.MULTILINE)


def test_a_script_that_handles_its_failed_tasks_succeeds_and_the_failures_are_counted(
    script: Callable[..., Path],
) -> None:
    done = command("run", script(WORK.format(which="")))
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    assert re.search(r"4 tasks in .*: 3 DONE, 1 FAILED\n", done.stderr)


def test_each_session_and_backend_has_its_row(script: Callable[..., Path]) -> None:
    path = script("""
        async def main(uid):
            backends = [NoopExecutionBackend("a"), NoopExecutionBackend("b")]
            async with Session(backends=backends, uid=uid) as session:
                tasks = [ComputeTask(function=print, backend=name) for name in "aab"]
                await session.submit_tasks(tasks)
                await session.wait_tasks(tasks)

        asyncio.run(main("first"))
        asyncio.run(main("second"))
    """)
    done = command("run", path)
    assert done.returncode == 0, done.stderr
    assert "6 tasks" in done.stderr
    rows = [line.split() for line in done.stderr.splitlines()[-4:]]
    assert rows == [
        ["first", "a", "2"],
        ["first", "b", "1"],
        ["second", "a", "2"],
        ["second", "b", "1"],
    ]


def test_nothing_of_ours_in_the_output_of_a_script_without_a_session(
    script: Callable[..., Path],
) -> None:
    done = command("run", script("print('hello')\n", header=""))
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


@pytest.mark.parametrize(
    ("statement", "code", "said"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(0)", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('no input')", 1, "no input\n"),
    ],
)
def test_the_exit_code_is_the_scripts_own(
    script: Callable[..., Path], statement: str, code: int, said: str
) -> None:
    done = command("run", script(f"import sys\n{statement}\n", header=""))
    assert (done.returncode, done.stderr) == (code, said)


def test_an_uncaught_exception_shows_the_users_frames_alone(script: Callable[..., Path]) -> None:
    path = script("""
        async def main():
            async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
                [future] = await session.submit_tasks([ComputeTask(function=int, args=("x",))])
                await future

        asyncio.run(main())
    """)
    done = command("run", path)
    assert done.returncode == 1
    assert "1 FAILED" in done.stderr
    trace = done.stderr[done.stderr.index("Traceback") :]
    assert trace.splitlines()[1].startswith(f'  File "{path}", line ')
    assert "ValueError: invalid literal for int() with base 10: 'x'" in trace.splitlines()[-1]
    assert f"rhapsody{os.sep}cli" not in trace
    assert "runpy" not in trace


def test_the_scripts_own_excepthook_is_asked(script: Callable[..., Path]) -> None:
    path = script(
        """\
        import sys
        sys.excepthook = lambda kind, error, frames: print("hook", kind.__name__, frames.tb_lineno)
        raise KeyError(1)
    """,
        header="",
    )
    done = command("run", path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "hook KeyError 3\n", "")


def test_a_syntax_error_is_shown_where_it_is(script: Callable[..., Path]) -> None:
    path = script("def f(:\n    pass\n", header="")
    done = command("run", path)
    assert done.returncode == 1
    assert done.stderr.startswith(f'  File "{path}", line 1\n    def f(:\n')
    assert "SyntaxError" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "missing.py"], "'missing.py' does not exist"),
        (["run", "."], "is a directory"),
        (["run"], "Missing argument 'SCRIPT'"),
        (["run", "--wrok-dir", "x", "y.py"], "No such option"),
        (["run", "--log-level", "loud", "y.py"], "'loud' is not one of"),
        (["rnu"], "No such command 'rnu'"),
        (["bench", "--scale", "nan"], "nan is not a number"),
        (["bench", "--scale", "inf"], "not in the range"),
    ],
)
def test_wrong_use_is_explained(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_level_of_the_environment_that_is_none_is_a_wrong_use(
    script: Callable[..., Path],
) -> None:
    path = script("print('ran')")
    done = command("run", path, env={"RHAPSODY_LOG_LEVEL": "garbage"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "RHAPSODY_LOG_LEVEL must be" in done.stderr
    assert "Traceback" not in done.stderr
    for level in ("", "10"):
        done = command("run", path, env={"RHAPSODY_LOG_LEVEL": level})
        assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


# --- run: the script finds what it would find under Python ---------------------------------------


def test_the_script_has_its_arguments_name_and_neighbours(
    script: Callable[..., Path], tmp_path: Path
) -> None:
    script("value = 42\n", name="neighbour.py", header="")
    path = script(
        """\
        import sys, neighbour
        print(sys.argv[1:], __name__, __file__, sys.path[0], neighbour.value)
        print(sys.modules["__main__"].__dict__ is globals())
    """,
        header="",
    )
    link = tmp_path / "elsewhere" / "link.py"
    link.parent.mkdir()
    link.symlink_to(path)
    for given, shown in ((path, path), (link, link), ("workflow.py", path)):
        for program in (MODULE, ENTRY_POINT):
            arguments = ("--help", "-x", "--", "a b")
            done = command("run", given, *arguments, program=program, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            said = f"{list(arguments)} __main__ {shown} {tmp_path} 42\nTrue\n"
            assert done.stdout == said


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_functions_of_the_script_reach_other_processes(
    script: Callable[..., Path], method: str
) -> None:
    path = script("""
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        def double(x):
            return 2 * x

        async def main(method):
            pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method))
            async with Session(backends=[await ConcurrentExecutionBackend(pool)]) as session:
                print(await session.map(double, [1, 2]))

        if __name__ == "__main__":
            asyncio.run(main(sys.argv[1]))
    """)
    done = command("run", path, method)
    assert (done.returncode, done.stdout) == (0, "[2, 4]\n"), done.stderr


def test_the_work_dir_is_made_and_sessions_write_in_it(
    script: Callable[..., Path], tmp_path: Path
) -> None:
    path = script("""
        async def main():
            async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
                task = ComputeTask(executable="echo", arguments=["hi"], capture_stdio=True)
                await session.submit_tasks([task])
                await session.wait_tasks([task])
                print(task.stdout)

        asyncio.run(main())
    """)
    done = command("run", "--work-dir", "new/runs", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "runs") in Path(done.stdout.strip()).parents
    assert Path(done.stdout.strip()).read_text() == "hi\n"


def test_a_work_dir_that_cannot_be_made_is_a_wrong_use(
    script: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = command("run", "--work-dir", tmp_path / "file" / "x", script("print('ran')\n"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--work-dir" in done.stderr


LOGGING = "import logging; logging.getLogger('rhapsody.test').info('heard')\n"


@pytest.mark.parametrize(
    ("options", "env", "heard"),
    [
        ([], {}, True),  # as rhapsody.enable_logging has it
        (["--log-level", "warning"], {}, False),
        ([], {"RHAPSODY_LOG_LEVEL": "WARNING"}, False),
        (["--log-level", "info"], {"RHAPSODY_LOG_LEVEL": "WARNING"}, True),
        (["--log-level", "ERROR"], {"RHAPSODY_LOG_LEVEL": "INFO"}, False),
    ],
)
def test_logging(
    script: Callable[..., Path], options: list[str], env: dict[str, str], heard: bool
) -> None:
    done = command("run", *options, script(LOGGING, header=""), env=env)
    assert (done.returncode, done.stdout) == (0, "")
    assert ("heard" in done.stderr) is heard


# --- run: on a terminal --------------------------------------------------------------------------

# Makes the pseudo-terminal the controlling one, so that ^C is a signal.
TAKE_TERMINAL = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{BECOME}"


class Terminal:
    """A command on a pseudo-terminal of 80 columns."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.fd = fd
        self.process = process
        self.seen = ""

    def until(self, text: str | None, seconds: float = 30.0) -> str:
        """Read until ``text`` was printed, or to the end for None; returns all that was seen."""
        deadline = time.monotonic() + seconds
        while text is None or text not in self.seen:
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], (
                f"{text!r} was not printed in {seconds} s; seen: {self.seen!r}"
            )
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # EIO: nobody has the terminal open any more
                data = b""
            if not data:
                assert text is None, f"ended without {text!r}: {self.seen!r}"
                break
            self.seen += data.decode()
        return self.seen

    def interrupt(self) -> None:
        os.write(self.fd, b"\x03")

    def end(self) -> int:
        self.until(None)
        return self.process.wait(30)


@contextmanager
def terminal(*arguments: str | Path, env: dict[str, str] | None = None) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, *MODULE, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **(env or {})},
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        os.close(ours)
        if process.poll() is None:
            process.kill()
        process.wait(30)


PRINTING = """
    async def main():
        async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
            tasks = [ComputeTask(executable="sleep", arguments=[str(s)]) for s in (0, 1)]
            await session.submit_tasks(tasks)
            await tasks[0]
            print("first done", flush=True)
            if (child := os.fork()) == 0:
                print("from a child")
                sys.stdout.flush()
                os._exit(0)
            os.waitpid(child, 0)
            await session.wait_tasks(tasks)
            print("all done")

    asyncio.run(main())
"""
ESCAPE = "\x1b["


def test_on_a_terminal_a_line_shows_the_progress(script: Callable[..., Path]) -> None:
    with terminal("run", script(PRINTING)) as screen:
        assert screen.end() == 0
    assert re.search(r"concurrent .*1/2.* 1 running", screen.seen)
    for line in ("first done", "from a child", "all done", "2 DONE"):
        assert f"{line}\r\n" in screen.seen
    # The last that is drawn is wiped, and not drawn again.
    assert screen.seen.rindex(f"{ESCAPE}J") > screen.seen.rindex("running")
    assert "running" not in screen.seen.split("rhapsody: 2 tasks")[1]


def test_in_a_pipe_nothing_is_drawn(script: Callable[..., Path]) -> None:
    done = command("run", script(PRINTING), env={"TERM": "xterm"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "first done\nfrom a child\nall done\n"
    assert ESCAPE not in done.stdout + done.stderr
    assert "running" not in done.stderr


def test_a_dumb_terminal_is_not_drawn_on(script: Callable[..., Path]) -> None:
    with terminal("run", script(PRINTING), env={"TERM": "dumb"}) as screen:
        assert screen.end() == 0
    assert ESCAPE not in screen.seen


def test_unfinished_lines_and_both_streams_are_left_as_they_are(
    script: Callable[..., Path],
) -> None:
    path = script("""
        async def main():
            async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
                task = ComputeTask(executable="sleep", arguments=["1"])
                await session.submit_tasks([task])
                print("50%", end="", flush=True)
                await asyncio.sleep(0.6)
                print("...100%", file=sys.stderr)
                sys.stdout.writelines(["a\\n", "b\\n"])
                await session.wait_tasks([task])

        asyncio.run(main())
    """)
    with terminal("run", path) as screen:
        assert screen.end() == 0
    assert "50%...100%\r\n" in screen.seen
    assert "a\r\nb\r\n" in screen.seen
    assert "0/1" in screen.seen


def test_a_log_line_goes_above_the_block(script: Callable[..., Path]) -> None:
    path = script("""
        import logging

        async def main():
            async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
                task = ComputeTask(executable="sleep", arguments=["2"])
                await session.submit_tasks([task])
                await asyncio.sleep(0.6)
                logging.getLogger("rhapsody.test").warning("careful")
                await session.wait_tasks([task])

        asyncio.run(main())
    """)
    with terminal("run", path) as screen:
        assert screen.end() == 0
    before, after = screen.seen.split("careful")
    assert before.count("running") == before.count(f"{ESCAPE}J"), "the block was not wiped first"
    assert "running" in after


# --- run: Ctrl-C ---------------------------------------------------------------------------------

LONG = """
    async def main():
        async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
            shell = ["-c", {shell!r}]
            task = ComputeTask(executable="sh", arguments=shell)
            await session.submit_tasks([task])
            try:
                await session.wait_tasks([task])
            finally:
                print("leaving", flush=True)

    asyncio.run(main())
"""


def opened(path: Path) -> int:
    """The pidfd of the process whose id is written to ``path`` once it runs."""
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "the task did not start"
        time.sleep(0.02)
    return os.pidfd_open(int(path.read_text()))


def is_gone(pidfd: int, seconds: float) -> bool:
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


def test_ctrl_c_closes_the_session(script: Callable[..., Path], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with terminal("run", script(LONG.format(shell=f"echo $$ > {pid}; exec sleep 600"))) as screen:
        task = opened(pid)
        screen.interrupt()
        screen.until("leaving\r\n")
        assert screen.end() == 130
    assert "1 CANCELED" in screen.seen
    assert screen.seen.endswith("rhapsody: interrupted\r\n")
    assert "Traceback" not in screen.seen
    assert is_gone(task, 0), "the session's close came back before its task was gone"


def test_a_second_ctrl_c_leaves_no_process(script: Callable[..., Path], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    deaf = f"trap '' TERM INT; echo $$ > {pid}; while :; do sleep 1; done"
    with terminal("run", script(LONG.format(shell=deaf))) as screen:
        task = opened(pid)
        screen.interrupt()
        screen.until("leaving\r\n")  # it is closing, and the task does not want to stop
        screen.interrupt()
        assert screen.end() in (130, -signal.SIGINT)
    assert is_gone(task, 10)


MAP_WORK = """
        async def main():
            async with Session(backends=[await ConcurrentExecutionBackend()]) as session:
                await session.map(work, [600])

        asyncio.run(main())
"""


def test_threads_that_cannot_be_stopped_are_named_and_a_second_ctrl_c_ends_them(
    script: Callable[..., Path],
) -> None:
    path = script(
        """
        import time

        def work(seconds):
            print("up", flush=True)
            time.sleep(seconds)
    """
        + MAP_WORK
    )
    with terminal("run", path) as screen:
        screen.until("up")
        screen.interrupt()
        screen.until("1 of its threads still run, Ctrl-C again ends them\r\n")
        screen.interrupt()
        assert screen.end() == -signal.SIGINT


def test_a_thread_may_be_in_a_print_when_ctrl_c_comes(script: Callable[..., Path]) -> None:
    """CPython's print holds no reference to the stream, which is no more when the script ends."""
    path = script(
        """
        import time

        class Slow:
            def __str__(self):
                before = id(sys.stdout)
                os.write(1, b"up")
                while id(sys.stdout) == before:
                    time.sleep(0.01)
                return "late"

        def work(seconds):
            print(Slow())
            time.sleep(seconds)
    """
        + MAP_WORK
    )
    with terminal("run", path) as screen:
        screen.until("up")
        screen.interrupt()
        screen.until("1 of its threads still run, Ctrl-C again ends them\r\n")
        screen.until("late\r\n")  # its thread goes on beside ours
        screen.interrupt()
        assert screen.end() == -signal.SIGINT


def test_ctrl_c_in_a_script_without_a_session(script: Callable[..., Path]) -> None:
    path = script("print('up', flush=True)\nimport time\ntime.sleep(600)\n", header="")
    with terminal("run", path) as screen:
        screen.until("up")
        screen.interrupt()
        assert screen.end() == 130


@pytest.mark.parametrize("ignored", [False, True])  # SIGINT, as in a shell's background job
def test_sigterm_closes_the_session_as_ctrl_c_does(
    script: Callable[..., Path], tmp_path: Path, ignored: bool
) -> None:
    path = script("""
        async def main():
            session = Session(backends=[await ConcurrentExecutionBackend()])
            shell = "trap 'echo > ended; exit' TERM; while :; do sleep 0.1; done"
            task = ComputeTask(executable="sh", arguments=["-c", shell])
            try:
                async with session:
                    await session.submit_tasks([task])
                    print("up", flush=True)
                    await session.wait_tasks([task])
            finally:
                print(task.state, session.closed, flush=True)

        asyncio.run(main())
    """)
    process = subprocess.Popen(
        [sys.executable, "-m", "rhapsody", "run", str(path)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "CANCELED True\n"), err
    assert err.splitlines()[-1] == "rhapsody: terminated", err


# --- backends, doctor, bench, help ---------------------------------------------------------------


def test_backends_lists_each_with_what_installs_it(tmp_path: Path) -> None:
    done = command("backends", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^concurrent +installed *$", done.stdout, re.MULTILINE)
    rows = json.loads(command("backends", "--json").stdout)
    by_name = {row["name"]: row for row in rows}
    assert {"concurrent", "noop"} <= set(by_name)
    assert by_name["noop"] == {"name": "noop", "installed": True, "install": None}
    for row in rows:
        if not row["installed"]:
            assert "pip install" in row["install"]
            assert row["install"] in done.stdout, "a line that breaks can not be pasted"
    assert ESCAPE not in done.stdout


def findings(*, env: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    done = command("doctor", "--json", env=env, **options)
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["problems"] else 0)
    return {finding["check"]: finding for finding in found["findings"]}


def test_doctor_prints_every_check_and_its_verdict(tmp_path: Path) -> None:
    done = command("doctor", cwd=tmp_path)
    found = findings()
    for finding in found.values():
        assert re.search(rf"^{finding['check']} +{finding['status']} ", done.stdout, re.MULTILINE)
    problems = sum(finding["status"] == "problem" for finding in found.values())
    assert done.stdout.splitlines()[-1].startswith(f"{problems or 'no'} problem")
    assert ESCAPE not in done.stdout


def test_doctor_says_what_limits_the_cores() -> None:
    core = min(os.sched_getaffinity(0))
    cores = findings(before=f"import os; os.sched_setaffinity(0, {{{core}}})")["cores"]
    assert cores["data"]["granted"] == [core]
    if (os.cpu_count() or 1) > 1:
        assert "affinity mask" in cores["found"]
    slurm = findings(env={"SLURM_CPUS_ON_NODE": "1"})["cores"]
    assert slurm["data"]["granted"] == [core]
    assert slurm["data"]["limits"]["slurm"] == 1


def test_doctor_sees_a_binding_that_wastes_the_allocation() -> None:
    core = min(os.sched_getaffinity(0))
    cores = findings(
        env={"SLURM_CPUS_ON_NODE": "64"}, before=f"import os; os.sched_setaffinity(0, {{{core}}})"
    )["cores"]
    assert cores["status"] == "problem"
    assert "srun" in cores["remedy"]


def test_doctor_asks_for_more_open_files() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {}))"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = findings(before=limit.format(64, hard))
    assert files["open files"]["status"] == "problem"
    assert files["open files"]["data"]["soft"] == 64
    assert "ulimit -n" in files["open files"]["remedy"]
    files = findings(before=limit.format(64, 64))
    assert "administrator" in files["open files"]["remedy"]


def test_doctor_sees_the_gpus_that_were_granted() -> None:
    assert findings(env={"CUDA_VISIBLE_DEVICES": "2,3"})["gpus"]["data"]["visible"] == ["2", "3"]


def test_doctor_misses_only_engines_that_backends_lists_a_line_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    finding = doctor.check_engines()
    assert finding.status == "note"
    named = finding.found.rpartition("not installed: ")[2].split(", ")
    engines = {backend.engine.distribution for backend in BUILT_IN.values() if backend.engine}
    assert set(named) == {"cloudpickle", *engines}
    assert all(install_hint(name) for name, backend in BUILT_IN.items() if backend.engine)


def test_doctor_writes_in_the_work_dir(tmp_path: Path) -> None:
    found = findings(env={"RHAPSODY_WORK_DIR": str(tmp_path / "later")})["work dir"]
    assert (found["status"], found["data"]["path"]) == ("ok", str(tmp_path / "later"))
    (tmp_path / "file").write_text("")
    found = findings(env={"RHAPSODY_WORK_DIR": str(tmp_path / "file")})["work dir"]
    assert found["status"] == "problem"
    assert "RHAPSODY_WORK_DIR" in found["remedy"]


def tool(folder: Path, name: str, body: str = "exit 0") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_scheduler(tmp_path: Path) -> None:
    def found(**environ: str) -> tuple[str, str]:
        finding = doctor.check_scheduler({"PATH": str(tmp_path), **environ})
        return finding.status, finding.found

    assert found()[0] == "ok"
    assert "none" in found()[1]
    status, text = found(SLURM_JOB_ID="17")
    assert status == "problem"
    assert "`srun` is not on PATH" in text
    assert found(SLURM_JOB_ID="17", SLURM_JOB_NUM_NODES="1") == ("ok", "Slurm, in job 17")
    tool(tmp_path, "sbatch")
    tool(tmp_path, "srun")
    assert found() == ("ok", "Slurm, not in a job: tasks run on this node alone")
    assert found(SLURM_JOB_ID="17", SLURM_JOB_NUM_NODES="4") == ("ok", "Slurm, in job 17")
    assert found(FLUX_URI="local:///x")[0] == "problem"


# What each says to `mpiexec --version`; written from their outputs, the first lines.
@pytest.mark.parametrize(
    ("said", "flavour"),
    [
        ("HYDRA build details:\n    Version:   4.2.3\n", "MPICH"),
        ("mpiexec (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/\n", "Open MPI"),
        ("mpiexec (Open MPI) 5.0.6\n", "Open MPI"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.14 Build 20240911\n", "Intel MPI"),
        ("something else\n", "unknown MPI"),
    ],
)
def test_mpi_flavours(
    said: str, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    tool(tmp_path, "mpiexec", f"cat <<'END'\n{said}END")
    environ = {
        "PATH": str(tmp_path),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    finding = doctor.check_mpi(environ)
    assert (finding.status, finding.data["flavour"]) == ("ok", flavour)
    if flavour == "Open MPI" and os.geteuid() == 0:
        refused = doctor.check_mpi({"PATH": str(tmp_path)})
        assert refused.status == "problem"
        assert "OMPI_ALLOW_RUN_AS_ROOT=1" in refused.remedy


def test_an_mpiexec_that_does_not_run_is_a_problem_and_none_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    missing = doctor.check_mpi({"PATH": str(tmp_path)})
    assert missing.status == "note"
    assert "pip install" in missing.remedy
    tool(tmp_path, "mpiexec", "echo 'libmpi.so.40: not found' >&2; exit 127")
    broken = doctor.check_mpi({"PATH": str(tmp_path)})
    assert broken.status == "problem"
    assert "libmpi.so.40" in broken.found


def test_small_shared_memory_is_a_problem(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "none").status == "problem"
    found = doctor.check_shared_memory(tmp_path)
    assert found.data["total"] >= found.data["free"]
    assert (found.status == "problem") is (found.data["free"] < doctor.SHARED_MEMORY_WANTED)


def test_bench_measures_every_workload() -> None:
    done = command("bench", "--repeat", "2", "--scale", "0.001", "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert [one["workload"] for one in measured] == [workload.name for workload in WORKLOADS]
    for one in measured:
        assert one["ours_seconds"] > 0
        assert one["raw_seconds"] > 0
        assert len(one["ratios"]) == 2
        assert one["ratios"] == sorted(one["ratios"])
    table = command("bench", "--repeat", "1", "--scale", "0.001").stdout
    for workload in WORKLOADS:
        assert workload.title in table
    assert ESCAPE not in table


def test_a_benchmark_whose_tasks_fail_is_no_measurement(tmp_path: Path) -> None:
    tool(tmp_path, "true", "exit 1")
    done = command("bench", "--scale", "0.001", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert "not every task" in done.stderr or "non-zero exit status" in done.stderr


@pytest.mark.parametrize("name", ["", "run", "backends", "doctor", "bench"])
def test_help(name: str) -> None:
    arguments = [name] if name else []
    done = command(*arguments, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: python -m rhapsody")
    assert command(*arguments, "-h").stdout == done.stdout


def test_version() -> None:
    import rhapsody

    assert command("--version", program=ENTRY_POINT).stdout.split()[-1] == rhapsody.__version__


def test_the_library_does_not_bring_the_command_line() -> None:
    script = "import sys, rhapsody; print({'click', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
