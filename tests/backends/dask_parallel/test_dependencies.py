"""Parents and children within one cluster."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from functions import fail
from rhapsody.api import ComputeTask, Session
from rhapsody.api.errors import DependencyError, SerializationError, TaskExecutionError

from .helpers import OnlyThere, add, ended, options, until

pytestmark = pytest.mark.timeout(180)


def only_there(pid: int, value: int, gate: Path) -> OnlyThere:
    gate.read_bytes()  # a FIFO, which somebody opens
    return OnlyThere(pid, value)


def value_of(parent: OnlyThere, others: Any = None) -> int:
    return parent.value + (others["b"].value if others else 0)


def test_data_between_tasks_never_passes_the_client(run: Any, tmp_path: Path) -> None:
    async def scenario(session: Session, _: Any) -> None:
        # The parents' results cannot come to life here, so their tasks FAILED, and yet the child
        # has had them: it was submitted before they ended.
        gates = [tmp_path / "a", tmp_path / "b"]
        for gate in gates:
            os.mkfifo(gate)
        a, b = (
            ComputeTask(function=only_there, args=(os.getpid(), value, gate))
            for value, gate in enumerate(gates, start=1)
        )
        child = ComputeTask(function=value_of, args=(a, {"b": b}))
        await session.submit_tasks([a, b, child])
        await asyncio.gather(*(asyncio.to_thread(gate.write_bytes, b"") for gate in gates))
        await session.wait_tasks([a, b, child], timeout=60)
        assert child.return_value == 3
        assert isinstance(a.exception, SerializationError)

    run(scenario)


def test_dependencies_of_executables_and_chains(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        said = ComputeTask(executable="echo", arguments=["-n", "word"])
        again = ComputeTask(executable="echo", arguments=["-n", said, "and", said])
        number = ComputeTask(function=add, args=(again, "!"))
        chain = [number]
        for _ in range(20):
            chain.append(ComputeTask(function=add, args=(chain[-1], "."), after=[said]))
        await ended(session, said, again, *chain)
        assert chain[-1].return_value == "word and word!" + "." * 20

    run(scenario)


def test_a_parent_that_fails_fails_its_children(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        bad = ComputeTask(function=fail)
        child = ComputeTask(function=add, args=(bad,))
        grandchild = ComputeTask(function=add, args=(child,))
        program = ComputeTask(executable="false")
        after = ComputeTask(function=add, args=(1,), after=[program])
        await ended(session, bad, child, grandchild, program, after)
        assert isinstance(child.exception, DependencyError)
        assert child.exception.parent == bad.uid
        assert isinstance(child.exception.cause, KeyError)
        assert isinstance(grandchild.exception, DependencyError)
        assert grandchild.exception.parent == child.uid
        assert isinstance(after.exception, DependencyError)
        assert isinstance(after.exception.cause, TaskExecutionError)

    run(scenario)


def test_a_parent_that_is_canceled_fails_its_children(run: Any) -> None:
    async def scenario(session: Session, _: Any) -> None:
        parent = ComputeTask(executable="sleep", arguments=["600"])
        child = ComputeTask(function=add, args=(parent,))
        await session.submit_tasks([parent, child])
        await until(lambda: parent.state == "RUNNING")
        assert await session.cancel(parent) is True
        await session.wait_tasks([child], timeout=30)
        assert isinstance(child.exception, DependencyError)
        assert child.exception.parent == parent.uid

    run(scenario)


def test_files_are_linked_from_the_producer_s_folder(run: Any, tmp_path: Path) -> None:
    async def scenario(session: Session, backend: Any) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        producer = ComputeTask(
            executable="sh",
            arguments=["-c", "echo data > out.txt"],
            output_files=["out.txt"],
            **options(cwd=str(tmp_path / "a")),
        )
        consumer = ComputeTask(
            executable="cat", arguments=["out.txt"], **options(cwd=str(tmp_path / "b"))
        )
        explicit = backend.link_explicit_data_deps(producer, consumer, file_name="out.txt")
        assert explicit["target"] == str(tmp_path / "b" / "out.txt")
        assert backend.link_implicit_data_deps(producer, consumer)["target"]
        await ended(session, producer)
        await ended(session, consumer)
        assert consumer.stdout == "data\n"

    run(scenario)
