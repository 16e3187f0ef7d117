"""The workflow engine AsyncFlow, from PyPI as it is, on our backends."""

# mypy: disallow-untyped-decorators=False
# Its decorators are methods without types.

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from radical.asyncflow import WorkflowEngine

from rhapsody.backends import (
    BaseExecutionBackend,
    ConcurrentExecutionBackend,
    NoopExecutionBackend,
)


@contextlib.asynccontextmanager
async def engine(*backends: BaseExecutionBackend) -> AsyncIterator[Any]:
    flow = await WorkflowEngine.create(backend=[await backend for backend in backends])
    try:
        yield flow
    finally:
        await flow.shutdown()


def threads() -> ConcurrentExecutionBackend:
    return ConcurrentExecutionBackend()


def processes() -> ConcurrentExecutionBackend:
    return ConcurrentExecutionBackend(ProcessPoolExecutor(2), name="processes")


@pytest.mark.parametrize("make", [threads, processes])
async def test_function_tasks_with_dependencies(
    make: Callable[[], ConcurrentExecutionBackend],
) -> None:
    async with engine(make()) as flow:

        @flow.function_task
        async def start(x: int) -> int:
            return x

        @flow.function_task
        async def add(*values: int) -> int:
            return sum(values)

        left, right = start(20), start(22)
        assert await add(left, right) == 42


async def test_executable_tasks(tmp_path: Path) -> None:
    async with engine(threads()) as flow:

        @flow.executable_task
        async def write(text: str) -> str:
            return f"/bin/sh -c 'echo {text} > {tmp_path}/file'"

        @flow.executable_task
        async def read(after: Any) -> str:
            return f"/bin/cat {tmp_path}/file"

        assert (await read(write("hello"))).strip() == "hello"


async def test_functions_and_executables_together() -> None:
    async with engine(threads()) as flow:

        @flow.executable_task
        async def say(word: str) -> str:
            return f"/bin/echo {word}"

        @flow.function_task
        async def length(text: str) -> int:
            return len(text.strip())

        assert await asyncio.gather(*(length(say("x" * n)) for n in range(1, 6))) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("make", [threads, processes])
async def test_a_failure_reaches_the_author_as_it_was_raised(
    make: Callable[[], ConcurrentExecutionBackend],
) -> None:
    async with engine(make()) as flow:

        @flow.function_task
        async def breaks() -> None:
            raise ZeroDivisionError("by the task")

        with pytest.raises(ZeroDivisionError, match="by the task"):
            await breaks()


async def test_a_failed_executable_is_a_failed_task() -> None:
    async with engine(threads()) as flow:

        @flow.executable_task
        async def breaks() -> str:
            return "/bin/false"

        with pytest.raises(Exception, match="exit code 1"):
            await breaks()


async def test_a_task_can_be_canceled() -> None:
    async with engine(threads()) as flow:

        @flow.executable_task
        async def sleep() -> str:
            return "/bin/sleep 1000"

        future = sleep()
        while getattr(future, "state", None) != "RUNNING":
            await asyncio.sleep(0.01)  # the engine has no event for it
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await future


async def test_blocks_of_tasks() -> None:
    async with engine(threads()) as flow:

        @flow.function_task
        async def double(x: int) -> int:
            return 2 * x

        @flow.block
        async def twice(x: int) -> int:
            result: int = await double(double(x))
            return result

        assert list(await asyncio.gather(twice(1), twice(2))) == [4, 8]


async def test_several_backends_in_one_engine() -> None:
    async with engine(threads(), processes()) as flow:

        @flow.function_task
        async def here() -> int:
            import os

            return os.getpid()

        @flow.function_task(backend="processes")
        async def there(driver: int) -> bool:
            import os

            return os.getpid() != driver

        assert await there(here()) is True


async def test_a_task_description_reaches_the_backend(tmp_path: Path) -> None:
    async with engine(threads()) as flow:

        @flow.executable_task
        async def where(task_description: dict[str, Any] = {"cwd": str(tmp_path)}) -> str:  # noqa: B006
            return "/bin/pwd"

        assert (await where()).strip() == str(tmp_path)


async def test_captured_output_is_in_the_engines_folder(tmp_path: Path) -> None:
    async with engine(threads()) as flow:

        @flow.executable_task(capture_stdio=True)
        async def say() -> str:
            return "/bin/echo hello"

        path = Path(await say())
    assert path.read_text() == "hello\n"
    assert path.is_relative_to(tmp_path)


async def test_the_noop_backend_completes_everything() -> None:
    async with engine(NoopExecutionBackend()) as flow:

        @flow.function_task
        async def never(*_: Any) -> None:
            raise AssertionError

        @flow.executable_task
        async def nowhere() -> str:
            return "/there/is/no/such/program"

        assert (
            await asyncio.gather(*(never(never(), nowhere()) for _ in range(100))) == [None] * 100
        )


async def test_shutdown_leaves_nothing_running(tmp_path: Path) -> None:
    backend = threads()
    async with engine(backend) as flow:

        @flow.executable_task
        async def sleep() -> str:
            return f"/bin/sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000'"

        future = sleep()
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.01)
    assert future.cancelled()
    assert backend.state() == "SHUTDOWN"
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
