"""Executables on Dask workers: arguments, environment, output, ranks."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Any

import pytest

from processes import descendants_of, public_listeners
from rhapsody.api import ComputeTask, Resources, Session
from rhapsody.api.errors import TaskExecutionError

from .helpers import Client, add, ended, options, until

pytestmark = pytest.mark.timeout(180)


def test_executables(run: Any, tmp_path: Path) -> None:
    async def scenario(session: Session, _: Any) -> None:
        echo, where, env, shell, fails, missing, reads = await ended(
            session,
            ComputeTask(executable="echo", arguments=["hi", 3, Path("/x")]),
            ComputeTask(executable="pwd", **options(cwd=str(tmp_path))),
            ComputeTask(
                executable="printenv", arguments=["COLOUR"], **options(env={"COLOUR": "red"})
            ),
            ComputeTask(executable="echo $((1+1))", arguments=["; $HOME"], **options(shell=True)),
            ComputeTask(executable="sh", arguments=["-c", "echo oh >&2; exit 3"]),
            ComputeTask(executable="no-such-program"),
            ComputeTask(executable="cat", **options(stdin="typed")),
        )
        assert echo.stdout == "hi 3 /x\n"
        assert echo.exit_code == 0
        assert where.stdout == f"{tmp_path}\n"
        assert env.stdout == "red\n"
        assert shell.stdout == "2 ; $HOME\n"
        assert (fails.state, fails.exit_code, fails.stderr) == ("FAILED", 3, "oh\n")
        assert isinstance(fails.exception, TaskExecutionError)
        assert missing.exit_code == 127
        assert "no-such-program" in str(missing.exception)
        assert reads.stdout == "typed"

    run(scenario)


def printed() -> bytes:
    return b"octets"


def test_executables_are_run_as_on_the_local_backend(run: Any, tmp_path: Path) -> None:
    """A bytes argument, a relative stdin, a captured failure, a path as a shell command."""
    (tmp_path / "input").write_text("from the file")

    async def scenario(session: Session, _: Any) -> None:
        parent = ComputeTask(function=printed)
        _, octets, reads, fails, shell = await ended(
            session,
            parent,
            ComputeTask(executable="echo", arguments=[parent]),
            ComputeTask(executable="cat", **options(stdin=Path("input"), cwd=tmp_path)),
            ComputeTask(
                executable="sh", arguments=["-c", "echo oh >&2; exit 3"], capture_stdio=True
            ),
            ComputeTask(executable=Path("/bin/echo"), arguments=["hi"], **options(shell=True)),
        )
        assert octets.stdout == "octets\n"
        assert reads.stdout == "from the file"
        assert isinstance(fails.exception, TaskExecutionError)
        assert fails.exception.stderr == "oh\n"
        assert shell.stdout == "hi\n"

    run(scenario)


def test_an_executable_does_not_see_the_shell(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        (task,) = await ended(session, ComputeTask(executable="echo", arguments=["$HOME; `id`"]))
        assert task.stdout == "$HOME; `id`\n"

    run(scenario)


def test_captured_output_is_in_files_of_the_session(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        captured, large = await ended(
            session,
            ComputeTask(
                executable="sh", arguments=["-c", "echo out; echo err >&2"], capture_stdio=True
            ),
            ComputeTask(executable="head", arguments=["-c", "20000000", "/dev/zero"]),
        )
        assert captured.stdout == str(session.path / f"{captured.uid}.stdout")
        assert Path(captured.stdout).read_text() == "out\n"
        assert Path(str(captured.stderr)).read_text() == "err\n"
        assert large.state == "DONE"
        assert os.path.getsize(large["stdout_file"]) == 20_000_000
        assert len(str(large.stdout)) < 1_000_000

    run(scenario)


def test_output_of_a_worker_that_shares_no_files_comes_to_the_client(
    run: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        # As for a worker in a container: the marker that it looks for is not there.
        monkeypatch.setattr(backend._serializer, "_marker_path", lambda: "/nonexistent/marker")
        captured, large = await ended(
            session,
            ComputeTask(executable="echo", arguments=["far"], capture_stdio=True),
            ComputeTask(executable="head", arguments=["-c", "3000000", "/dev/zero"]),
        )
        assert Path(str(captured.stdout)).read_text() == "far\n"
        assert Path(str(captured.stdout)).parent == session.path
        assert os.path.getsize(large["stdout_file"]) == 3_000_000

    run(scenario)

    def left(dask_worker: Any) -> list[str]:
        return [n for n in os.listdir(dask_worker.local_directory) if n.startswith("rhapsody-")]

    with Client(cluster, set_as_default=False) as client:
        assert not any(client.run(left).values())


def test_ranks_run_under_mpiexec(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        hello, colon = await ended(
            session,
            ComputeTask(executable="echo", arguments=["hello"], resources=Resources(ranks=2)),
            ComputeTask(executable="echo", arguments=[":", "x"], resources=Resources(ranks=2)),
        )
        assert hello.stdout == "hello\n" * 2, hello.exception
        assert colon.stdout == ": x\n" * 2

    run(scenario)


def test_a_failing_rank_fails_the_task_with_its_exit_code(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        script = "exit $((7 * PMI_RANK))"
        tasks = [
            ComputeTask(executable="sh", arguments=["-c", script], resources=Resources(ranks=2))
            for _ in range(12)
        ]
        await ended(session, *tasks)
        assert [(task.state, task.exit_code) for task in tasks] == [("FAILED", 7)] * 12

    run(scenario)


def test_ranks_open_no_port_to_the_outside(run: Any, tmp_path: Path) -> None:
    async def scenario(session: Session, _: Any) -> None:
        os.mkfifo(tmp_path / "go")
        script = f"cd {tmp_path}; touch up.$PMI_RANK; read word < go"
        task = ComputeTask(executable="sh", arguments=["-c", script], resources=Resources(ranks=2))
        await session.submit_tasks([task])
        await until(lambda: len(list(tmp_path.glob("up.*"))) == 2)
        assert public_listeners(descendants_of(os.getpid())) == []
        assert await session.cancel(task)

    run(scenario)


def test_a_text_of_any_class_is_its_text(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        class Word(str, enum.Enum):
            PRINT = "printenv"
            NAME = "COLOUR"
            RED = "red"

        given = options(env={Word.NAME: Word.RED})
        tasks = [ComputeTask(executable=Word.PRINT, arguments=[Word.NAME], **given)]
        tasks += [ComputeTask(executable="printenv", arguments=["COLOUR"], **given)]
        tasks += [ComputeTask(executable="echo", arguments=["red"]) for _ in range(4)]
        last = ComputeTask(function=add, args=(1,))
        await ended(session, *tasks, last)
        assert [task.stdout for task in tasks] == ["red\n"] * 6
        assert last.return_value == 2

    run(scenario)


def test_a_program_whose_name_is_no_text(run: Any, tmp_path: Path) -> None:
    program = os.fsencode(tmp_path) + b"/\xff"
    Path(os.fsdecode(program)).symlink_to("/bin/echo")

    async def scenario(session: Session, _: Any) -> None:
        (task,) = await ended(
            session, ComputeTask(executable=os.fsdecode(program), arguments=["hi"])
        )
        assert task.stdout == "hi\n"

    run(scenario)
