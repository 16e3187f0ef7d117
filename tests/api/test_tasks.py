"""Tasks: what is accepted, what is refused and in what words, and what a task can do by itself."""

from __future__ import annotations

import asyncio
import copy
import numbers
import pickle
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from functions import double, fail
from manual import ManualBackend
from rhapsody.api import (
    AITask,
    BackendError,
    BaseTask,
    ComputeTask,
    Resources,
    Session,
    TaskExecutionError,
    TaskValidationError,
)
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend


async def double_async(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


# ---------------------------------------------------------------------- description


def test_a_new_task_has_every_field_of_the_design() -> None:
    task = ComputeTask(function=double, args=(1,))
    assert task.state == "NEW"
    assert task.uid.startswith("task.")
    for name in (
        "backend",
        "stdout",
        "stderr",
        "exit_code",
        "return_value",
        "response",
        "exception",
    ):
        assert getattr(task, name) is None
        assert task[name] is None
    assert task.function is double
    assert task.args == (1,)
    assert task.executable is None


def test_uids_that_are_made_are_unique() -> None:
    assert len({ComputeTask(function=double).uid for _ in range(1000)}) == 1000


def test_what_the_constructor_was_given_is_found_again() -> None:
    parent = ComputeTask(function=double)
    need = Resources(ranks=2)
    task = ComputeTask(
        executable="/bin/echo",
        arguments=["a", 1],
        uid="mine",
        backend="there",
        input_files=["in"],
        output_files=["out"],
        capture_stdio=True,
        resources=need,
        retries=3,
        timeout=5,
        after=[parent],
        task_backend_specific_kwargs={"cwd": "/"},
    )
    expected = {
        "executable": "/bin/echo",
        "arguments": ["a", 1],
        "uid": "mine",
        "backend": "there",
        "input_files": ["in"],
        "output_files": ["out"],
        "capture_stdio": True,
        "resources": need,
        "retries": 3,
        "timeout": 5.0,
        "after": (parent,),
        "task_backend_specific_kwargs": {"cwd": "/"},
    }
    for name, value in expected.items():
        assert getattr(task, name) == value, name
        assert task[name] == value, name
    assert {name: task[name] for name in expected} == expected
    assert expected.keys() <= dict(task).keys()


class Half:
    """A number of somebody's package, which says so as numpy's do."""

    def __str__(self) -> str:
        return "0.5"


numbers.Number.register(Half)


async def test_any_number_is_an_argument() -> None:
    task = ComputeTask(executable="/bin/echo", arguments=[1, 2.5, Decimal("1.5"), Half()])
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        await task
    assert task.stdout == "1 2.5 1.5 0.5\n"


def test_a_path_is_an_executable_and_an_argument() -> None:
    task = ComputeTask(executable=Path("/bin/echo"), arguments=(Path("/tmp"), 1.5, b"x"))
    assert task.executable == "/bin/echo"
    assert task.arguments == [Path("/tmp"), 1.5, b"x"]


@pytest.mark.parametrize("function", [double, double_async, lambda x: x, str.upper, Path])
def test_any_callable_is_a_function(function: Callable[..., Any]) -> None:
    assert ComputeTask(function=function).kind == "function"


def test_an_ai_task_keeps_its_request() -> None:
    task = AITask(
        "why?",
        model="m",
        system_prompt="be short",
        temperature=0.1,
        max_tokens=5,
        top_p=0.5,
        top_k=3,
        stop_sequences=["."],
        uid="q",
        backend="b",
        retries=1,
    )
    assert isinstance(task, BaseTask)
    assert task.kind == "ai"
    assert (task.prompt, task.model, task.system_prompt) == ("why?", "m", "be short")
    assert (task.temperature, task.max_tokens, task.top_p, task.top_k) == (0.1, 5, 0.5, 3)
    assert task.stop_sequences == ["."]
    assert task.response is None


@pytest.mark.parametrize(
    "where", [{"model": "m"}, {"inference_endpoint": "http://h"}, {"backend": "b"}]
)
@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [{"role": "user", "content": "x"}]])
def test_an_ai_task_takes_a_text_or_a_list(prompt: Any, where: dict[str, Any]) -> None:
    assert AITask(prompt, **where).prompt == prompt


# ---------------------------------------------------------------------- refusal

BAD = [
    # what is given, words that the message must have
    ({}, ["exactly one of executable= and function=", "neither"]),
    ({"function": double, "executable": "x"}, ["exactly one of executable= and function=", "both"]),
    ({"function": 5}, ["function must be a callable", "5"]),
    ({"executable": 5}, ["executable must be a program's name or path", "5"]),
    ({"executable": ""}, ["executable must be a program's name or path"]),
    ({"executable": "x", "arguments": "-l"}, ["arguments must be a list", "'-l'"]),
    ({"executable": "x", "arguments": [None]}, ["an argument must be", "None"]),
    ({"executable": "x", "args": (1,)}, ["args and kwargs are a function's"]),
    ({"function": double, "arguments": [1]}, ["arguments are an executable's"]),
    ({"function": double, "args": 1}, ["args must be a tuple", "1"]),
    ({"function": double, "args": "ab"}, ["args must be a tuple", "'ab'"]),
    ({"function": double, "kwargs": [1]}, ["kwargs must be a dict", "[1]"]),
    ({"function": double, "uid": ""}, ["uid must be", "''"]),
    ({"function": double, "uid": 7}, ["uid must be", "7"]),
    ({"function": double, "uid": "../x"}, ["uid must be", "'../x'"]),
    ({"function": double, "backend": 7}, ["backend must be the name", "7"]),
    ({"function": double, "retries": -1}, ["retries must be", "-1"]),
    ({"function": double, "retries": True}, ["retries must be", "True"]),
    ({"function": double, "retries": "2"}, ["retries must be", "'2'"]),
    ({"function": double, "timeout": 0}, ["timeout must be seconds", "0"]),
    ({"function": double, "timeout": "1m"}, ["timeout must be seconds", "'1m'"]),
    ({"function": double, "timeout": float("nan")}, ["timeout must be seconds", "nan"]),
    ({"function": double, "after": 5}, ["after must be a list of tasks", "5"]),
    ({"function": double, "after": ["task.1"]}, ["after must be a list of tasks", "'task.1'"]),
    ({"function": double, "after": "task.1"}, ["after must be a list of tasks", "'task.1'"]),
    ({"function": double, "resources": {"ranks": 2}}, ["resources must be Resources(...)"]),
    ({"function": double, "task_backend_specific_kwargs": 1}, ["must be a dict", "1"]),
    ({"function": double, "capture_stdio": 1}, ["capture_stdio must be True or False", "1"]),
    ({"function": double, "input_files": "a"}, ["input_files must be a list", "'a'"]),
    ({"function": double, "output_files": "a"}, ["output_files must be a list", "'a'"]),
    ({"function": double, "input_files": [1]}, ["input_files must be a list of names", "1"]),
    (
        {"function": double, "retry": 2},
        ["unknown argument 'retry'", "did you mean 'retries'", "timeout"],
    ),
    ({"executable": "x", "colour": 2}, ["unknown argument 'colour'", "accepted", "executable"]),
    ({"executible": "x"}, ["unknown argument 'executible'", "did you mean 'executable'"]),
    # removed upstream: the replacement is named
    ({"executable": "x", "ranks": 2}, ["'ranks'", "Resources(ranks="]),
    ({"executable": "x", "memory": 2}, ["'memory'", "Resources(memory_per_rank="]),
    ({"executable": "x", "gpu": 2}, ["'gpu'", "Resources(gpus_per_rank="]),
    ({"executable": "x", "cpu_threads": 2}, ["'cpu_threads'", "Resources(cores_per_rank="]),
    (
        {"executable": "x", "environment": {}},
        ["'environment'", "task_backend_specific_kwargs", "env"],
    ),
    ({"executable": "x", "cwd": "/"}, ["'cwd'", "task_backend_specific_kwargs"]),
    ({"executable": "x", "shell": True}, ["'shell'", "task_backend_specific_kwargs"]),
]


@pytest.mark.parametrize(("given", "words"), BAD)
def test_bad_input_is_refused_in_words_that_help(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TaskValidationError) as caught:
        ComputeTask(**given)
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": ""}, "prompt must be a non-empty str or list"),
        ({"prompt": []}, "prompt must be a non-empty str or list"),
        ({"prompt": 5}, "prompt must be a non-empty str or list"),
        ({"prompt": "x", "model": None}, "one of model=, inference_endpoint= and backend="),
        ({"prompt": "x", "temprature": 1}, "did you mean 'temperature'"),
        ({"prompt": "x", "ranks": 1}, "Resources(ranks="),
        ({"prompt": ["x", 5]}, "prompt must be of str or chat messages, found 5"),
        ({"prompt": "x", "model": 5}, "model must be a str, not 5"),
        ({"prompt": "x", "inference_endpoint": 5}, "inference_endpoint must be a str"),
        ({"prompt": "x", "system_prompt": 5}, "system_prompt must be a str, not 5"),
        ({"prompt": "x", "temperature": "hot"}, "temperature must be a number of at least 0"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature must be a number"),
        ({"prompt": "x", "temperature": True}, "temperature must be a number"),
        ({"prompt": "x", "max_tokens": -5}, "max_tokens must be an int of at least 1"),
        ({"prompt": "x", "max_tokens": 5.0}, "max_tokens must be an int"),
        ({"prompt": "x", "top_p": 1.5}, "top_p must be a number from 0 to 1, not 1.5"),
        ({"prompt": "x", "top_k": -2}, "top_k must be an int of at least -1"),
        ({"prompt": "x", "stop_sequences": 5}, "stop_sequences must be a list of str, not 5"),
        ({"prompt": "x", "stop_sequences": ["a", 5]}, "must be a list of str, found 5 in it"),
    ],
)
def test_a_bad_ai_task_is_refused(given: dict[str, Any], words: str) -> None:
    given = {"model": "m", **given}
    with pytest.raises(TaskValidationError) as caught:
        AITask(**given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"ranks": 0},
        {"ranks": 1.5},
        {"ranks": True},
        {"ranks": "2"},
        {"cores_per_rank": 0},
        {"gpus_per_rank": -1},
        {"memory_per_rank": "4 parsec"},
        {"memory_per_rank": 0},
        {"memory_per_rank": "0"},
        {"walltime": 0},
        {"walltime": "soon"},
        {"walltime": -1},
        {"walltime": "0:00"},
    ],
)
def test_resources_refuse_what_no_machine_has(given: dict[str, Any]) -> None:
    with pytest.raises(TaskValidationError) as caught:
        Resources(**given)
    assert repr(next(iter(given.values()))) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [(4096, 4096), ("4096", 4096), ("4GiB", 4 * 2**30), ("500MB", 500 * 10**6), ("1.5k", 1536)],
)
def test_memory_is_read_in_bytes(text: int | str, size: int) -> None:
    assert Resources(ranks=3, memory_per_rank=text).memory == 3 * size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90.0),
        ("90", 90.0),
        ("90s", 90.0),
        ("10m", 600.0),
        ("1.5h", 5400.0),
        ("01:30:00", 5400.0),
        ("02:30", 150.0),
        ("1d", 86400.0),
    ],
)
def test_walltime_is_read_in_seconds(text: int | str, seconds: float) -> None:
    assert Resources(walltime=text).walltime_seconds == seconds


def test_resources_add_up_over_ranks() -> None:
    need = Resources(ranks=4, cores_per_rank=2, gpus_per_rank=1)
    assert (need.cores, need.gpus, need.memory) == (8, 4, 0)
    assert pickle.loads(pickle.dumps(need)) == need


# ---------------------------------------------------------------------- object and dict at once


def test_a_task_is_a_mapping_of_its_fields() -> None:
    task = ComputeTask(function=double, args=(1,), uid="t")
    assert task["uid"] == task.uid == task.get("uid") == "t"
    assert "uid" in task
    assert "nothing" not in task
    assert task.get("nothing", 3) == 3
    assert len(task) == len(list(task)) == len(dict(task))
    with pytest.raises(KeyError):
        task["nothing"]
    with pytest.raises(AttributeError, match="nothing"):
        task.nothing  # noqa: B018
    assert {**task}["args"] == (1,)


def test_what_is_written_one_way_is_read_the_other() -> None:
    task = ComputeTask(function=double)
    task["return_value"] = 4
    assert task.return_value == 4
    task.exit_code = 3
    assert task["exit_code"] == 3
    task["note"] = "mine"
    assert task["note"] == task.note == dict(task)["note"] == "mine"
    del task["note"]
    assert "note" not in task
    with pytest.raises(KeyError):
        del task["note"]
    task.update(stdout="out", note=1)
    assert (task.stdout, task["note"]) == ("out", 1)


def test_one_tasks_options_are_not_anothers() -> None:
    first, second = ComputeTask(executable="a"), ComputeTask(executable="a")
    first.arguments = ["x"]
    first.task_backend_specific_kwargs = {"cwd": "/"}
    assert second.arguments == []
    assert second.task_backend_specific_kwargs == {}


async def test_what_an_author_puts_into_an_empty_field_is_that_tasks_only(tmp_path: Path) -> None:
    loud, quiet = (ComputeTask(executable="/bin/pwd") for _ in range(2))
    loud.arguments.append("-L")
    loud["task_backend_specific_kwargs"]["cwd"] = str(tmp_path / "below")
    (tmp_path / "below").mkdir()
    named, plain = (ComputeTask(function=dict) for _ in range(2))
    named.kwargs["boo"] = 1  # type: ignore[index]
    asked = AITask(prompt="why?", model="m")
    asked.task_backend_specific_kwargs["speed"] = 1
    async with Session([ConcurrentExecutionBackend()]) as session:
        tasks = [loud, quiet, named, plain]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
    assert (loud.stdout, quiet.stdout) == (f"{tmp_path}/below\n", f"{tmp_path}\n")
    assert (named.return_value, plain.return_value) == ({"boo": 1}, {})
    assert AITask(prompt="why?", model="m").task_backend_specific_kwargs == {}
    assert (quiet.arguments, quiet.task_backend_specific_kwargs) == ([], {})
    plain.kwargs["late"] = 1  # type: ignore[index]
    quiet.get("arguments").append("late")
    assert (ComputeTask(function=dict).kwargs, ComputeTask(executable="x").arguments) == ({}, [])


def test_a_copys_fields_are_its_own() -> None:
    task = ComputeTask(function=double, retries=1)
    twin = copy.copy(task)
    twin.retries, twin["note"] = 5, "mine"
    assert task.retries == 1
    assert "note" not in task


def test_tasks_are_hashable_and_equal_only_to_themselves() -> None:
    one, other = ComputeTask(function=double, uid="same"), ComputeTask(function=double, uid="same")
    assert one == one
    assert one != other
    assert len({one, other}) == 2
    assert {one: "value"}[one] == "value"
    assert "same" in repr(one)
    assert "NEW" in repr(one)


async def test_awaiting_before_submit_is_a_runtime_error() -> None:
    task = ComputeTask(function=double)
    with pytest.raises(RuntimeError, match=r"not submitted"):
        await task
    with pytest.raises(RuntimeError, match=r"not submitted"):
        await asyncio.gather(task)


# ---------------------------------------------------------------------- pickling


@pytest.mark.parametrize("dump", [pickle.dumps, cloudpickle.dumps])
def test_a_new_task_pickles_with_all_that_it_was_given(dump: Callable[[Any], bytes]) -> None:
    parent = ComputeTask(function=double, args=(1,), uid="parent")
    task = ComputeTask(
        function=double,
        args=(parent,),
        kwargs={"y": 2},
        uid="child",
        after=[parent],
        retries=2,
        timeout=3,
        resources=Resources(cores_per_rank=2),
        backend="b",
    )
    again: ComputeTask = pickle.loads(dump(task))
    assert type(again) is ComputeTask
    assert (again.uid, again.state, again.backend) == ("child", "NEW", "b")
    assert again.function is double
    assert again.kwargs == {"y": 2}
    assert (again.retries, again.timeout, again.resources) == (2, 3.0, Resources(cores_per_rank=2))
    assert again.args[0] is again.after[0]
    assert again.args[0].uid == "parent"


def test_an_ai_task_pickles() -> None:
    task = AITask(["a"], model="m", top_k=3)
    task.response = "because"
    again = pickle.loads(pickle.dumps(task))
    assert type(again) is AITask
    assert (again.prompt, again.model, again.top_k, again.response) == (["a"], "m", 3, "because")


async def test_an_ended_task_pickles_with_its_results() -> None:
    done = ComputeTask(function=double, args=(2,))
    failed = ComputeTask(function=fail)
    broken = ComputeTask(executable="/bin/sh", arguments=["-c", "echo out; echo err >&2; exit 3"])
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([done, failed, broken])
        await session.wait_tasks([done, failed, broken])
    done, failed, broken = pickle.loads(pickle.dumps([done, failed, broken]))
    assert (done.state, done.return_value, done.stdout, done.exit_code) == ("DONE", 4, "4", 0)
    assert failed.state == "FAILED"
    assert isinstance(failed.exception, KeyError)
    assert failed.exception.args == ("as it was told to",)
    assert "in fail" in failed.stderr  # the traceback is text by now
    assert (broken.stdout, broken.stderr, broken.exit_code) == ("out\n", "err\n", 3)
    assert isinstance(broken.exception, TaskExecutionError)
    assert broken.done()
    with pytest.raises(RuntimeError):  # its future stayed where it was
        await done


def test_a_copy_is_a_task_of_its_own() -> None:
    task = ComputeTask(function=double, args=(1,), retries=1)
    other = copy.copy(task)
    assert other is not task
    assert (other.uid, other.args, other.retries) == (task.uid, (1,), 1)


# ---------------------------------------------------------------------- results


async def test_a_functions_fields_when_it_is_done() -> None:
    tasks = [ComputeTask(function=f, args=(21,)) for f in (double, double_async)]
    async with Session([ConcurrentExecutionBackend()]) as session:
        futures = await session.submit_tasks(tasks)
        assert await asyncio.gather(*futures) == tasks
    for task in tasks:
        assert (task.state, task.return_value, task.stdout, task.exit_code) == ("DONE", 42, "42", 0)
        assert task.backend == "concurrent"
        assert task.exception is None
    assert task.stderr is None


async def test_a_functions_fields_when_it_failed() -> None:
    task = ComputeTask(function=fail, args=("nowhere",))
    async with Session([ConcurrentExecutionBackend()]) as session:
        (future,) = await session.submit_tasks([task])
        await session.wait_tasks([task])
        with pytest.raises(KeyError, match="nowhere") as from_future:
            await future
        with pytest.raises(KeyError) as from_task:
            await task
    assert from_future.value is task.exception
    assert from_task.value is task.exception
    assert (task.state, task.return_value, task.stdout, task.exit_code) == ("FAILED", None, None, 1)
    assert task.stderr is not None
    assert "in fail" in task.stderr  # where it happened
    assert "KeyError: 'nowhere'" in task.stderr


async def test_an_executables_fields() -> None:
    done = ComputeTask(executable="/bin/echo", arguments=["a", 1, Path("b")])
    failed = ComputeTask(executable="/bin/sh", arguments=["-c", "echo o; echo e >&2; exit 9"])
    async with Session([ConcurrentExecutionBackend()]) as session:
        futures = await session.submit_tasks([done, failed])
        await session.wait_tasks([done, failed])
        assert await futures[0] is done
        with pytest.raises(TaskExecutionError) as caught:
            await futures[1]
    assert (done.state, done.stdout, done.stderr, done.exit_code) == ("DONE", "a 1 b\n", "", 0)
    assert (failed.state, failed.stdout, failed.stderr, failed.exit_code) == (
        "FAILED",
        "o\n",
        "e\n",
        9,
    )
    error = caught.value
    assert failed.exception is error
    assert (error.uid, error.stderr, error.exit_code) == (failed.uid, "e\n", 9)
    assert done.return_value is None


async def test_captured_output_is_in_files_of_the_session(tmp_path: Path) -> None:
    task = ComputeTask(
        executable="/bin/sh",
        arguments=["-c", "echo out; echo err >&2"],
        capture_stdio=True,
        uid="t",
    )
    async with Session([ConcurrentExecutionBackend()], work_dir=tmp_path) as session:
        await session.submit_tasks([task])
        await task
        assert task.stdout == str(session.path / "t.stdout")
        assert task.stderr == str(session.path / "t.stderr")
    assert task.stdout is not None
    assert task.stderr is not None
    assert Path(task.stdout).read_text() == "out\n"
    assert Path(task.stderr).read_text() == "err\n"


@pytest.mark.parametrize("kind", [StopIteration, asyncio.CancelledError, SystemExit])
async def test_exceptions_that_a_future_cannot_carry_still_fail_the_task(kind: type) -> None:
    def stop() -> None:
        raise kind("no more")

    task = ComputeTask(function=stop)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        await session.wait_tasks([task])
        assert task.state == "FAILED"
        assert isinstance(task.exception, kind)
        assert "in stop" in (task.stderr or "")
        with pytest.raises((RuntimeError, SystemExit)) as caught:
            await task
    assert "no more" in str(caught.value)


async def test_async_functions_have_a_loop_of_their_own() -> None:
    async def its_loop() -> int:
        return id(asyncio.get_running_loop())

    task = ComputeTask(function=its_loop)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        await task
    assert task.return_value != id(asyncio.get_running_loop())


async def test_standard_output_of_a_function_is_made_when_it_is_read() -> None:
    class Shy:
        asked = 0

        def __str__(self) -> str:
            self.asked += 1
            return "shy"

    task = ComputeTask(function=Shy)
    async with Session([ConcurrentExecutionBackend()]) as session:
        await session.submit_tasks([task])
        await task
    assert task.return_value.asked == 0
    assert task.stdout == "shy"


# ---------------------------------------------------------------------- plain dicts


async def test_a_plain_dict_is_accepted_wherever_a_task_is() -> None:
    good: dict[str, Any] = {"function": double, "args": (4,)}
    named: dict[str, Any] = {"uid": "mine", "executable": "/bin/echo", "arguments": ["hi"]}
    bad: dict[str, Any] = {"function": fail}
    async with Session([ConcurrentExecutionBackend()]) as session:
        futures = await session.submit_tasks([good, named, bad])
        assert good["uid"].startswith("task.")
        assert await session.wait_tasks([good, named, bad]) == [good, named, bad]
        assert await futures[0] is good
        with pytest.raises(KeyError):
            await futures[2]
        ended = [task async for task in session.as_completed([good, named, bad])]
        assert all(any(task is given for given in (good, named, bad)) for task in ended)
        assert await session.cancel(good) is False
        session.forget([good, named, bad])
    assert (good["state"], good["return_value"], good["stdout"]) == ("DONE", 8, "8")
    assert (named["state"], named["stdout"], named["exit_code"]) == ("DONE", "hi\n", 0)
    assert (bad["state"], bad["exit_code"]) == ("FAILED", 1)
    assert isinstance(bad["exception"], KeyError)
    assert good["backend"] == "concurrent"


async def test_a_plain_dict_with_a_prompt_is_an_ai_task() -> None:
    task = {"prompt": "why?", "model": "m"}
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        (seen,) = await backend.handed(1)
        assert isinstance(seen, AITask)
        backend.deliver(seen, "DONE", response="because")
        await session.wait_tasks([task])
    assert task["response"] == "because"


async def test_a_running_dict_can_be_canceled() -> None:
    task: dict[str, Any] = {"function": double}
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        assert await session.cancel(task) is True
    assert task["state"] == "CANCELED"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one of executable= and function="),
        ({"function": double, "speed": 3}, "unknown argument 'speed'"),
        ({"function": 3}, "function must be a callable"),
        ({"executable": "x", "ranks": 3}, "Resources(ranks="),
        (5, "a task must be a ComputeTask, an AITask or a dict, not int"),
        (None, "a task must be a ComputeTask, an AITask or a dict, not NoneType"),
        ("echo", "a task must be a ComputeTask, an AITask or a dict, not str"),
    ],
)
async def test_a_bad_dict_is_refused_and_the_others_run(given: Any, words: str) -> None:
    good = ComputeTask(function=double)
    async with Session([NoopExecutionBackend()]) as session:
        with pytest.raises(TaskValidationError) as caught:
            await session.submit_tasks([given, good])
        assert words in str(caught.value)
        await session.wait_tasks([good])
    assert good.state == "DONE"


class Unspeakable:
    def __str__(self) -> str:
        raise LookupError("no words")


async def test_a_value_without_words_harms_nobody() -> None:
    """Of a dict, the text of the result is written into it; those behind it are heard of too."""
    silent: dict[str, Any] = {"function": Unspeakable}
    others: list[Any] = [{"function": double, "args": (2,)}, ComputeTask(function=double)]
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks([silent, *others])
        given = await backend.handed(3)
        value = Unspeakable()
        backend.deliver_burst([(task, "DONE", {"return_value": value}) for task in given])
        await session.wait_tasks([silent, *others], timeout=30)
    assert {task["state"] for task in (silent, *others)} == {"DONE"}
    assert silent["return_value"] is value
    assert silent["stdout"] == "<Unspeakable whose str raises LookupError>"


class Stone(dict):  # type: ignore[type-arg]
    """A dict that takes nothing but a uid."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "uid":
            raise PermissionError("written in stone")
        super().__setitem__(key, value)


@pytest.mark.parametrize("state", ["DONE", "FAILED"])
async def test_a_dict_that_takes_no_results_harms_nobody(
    state: str, caplog: pytest.LogCaptureFixture
) -> None:
    stone = Stone(function=double)
    other, backend = ComputeTask(function=double), ManualBackend()
    async with Session([backend]) as session:
        (future, *_) = await session.submit_tasks([stone, other])
        given = await backend.handed(2)
        child = ComputeTask(function=double, after=[given[0]])
        await session.submit_tasks([child])
        error = {"exception": KeyError("x")} if state == "FAILED" else None
        backend.deliver_burst([(task, state, error) for task in given])
        await session.wait_tasks([stone, other], timeout=30)
        await asyncio.wait([future], timeout=30)
        assert future.done()
        if state == "FAILED":
            await session.wait_tasks([child], timeout=30)
    assert other.state == state
    assert "written in stone" in caplog.text


async def test_a_report_that_says_nothing_sensible_fails_its_task_only() -> None:
    tasks = [ComputeTask(function=double) for _ in range(3)]
    backend = ManualBackend()
    async with Session([backend]) as session:
        await session.submit_tasks(tasks)
        backend.deliver(tasks[0], "RUNNING")
        nonsense: Any = 5
        backend.deliver_burst([(tasks[0], "DONE", nonsense), (tasks[1], "DONE", {})])
        backend.deliver(tasks[2], "DONE")
        await session.wait_tasks(tasks, timeout=30)
        counts = session.get_statistics()["counts"]
    assert [task.state for task in tasks] == ["FAILED", "DONE", "DONE"]
    assert isinstance(tasks[0].exception, BackendError)
    assert counts == {"DONE": 2, "FAILED": 1}
