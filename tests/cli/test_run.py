"""`rhapsody run` in a pipe: what it prints, its exit code, and what the script finds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import ENTRY_POINT, MODULE, command

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


# ---------------------------------------------------------------------- output and exit code


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


# ---------------------------------------------------------------------- what the script finds


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
