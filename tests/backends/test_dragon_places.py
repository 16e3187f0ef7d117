"""Allocation of the cores of Dragon's nodes, and of the MPI lock; without Dragon."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rhapsody.api import ComputeTask
from rhapsody.backends.execution.dragon.placement import Allocation, NodeAllocator
from rhapsody.backends.execution.dragon.resources import Nodes
from rhapsody.backends.execution.dragon.task import DragonTask


@pytest.fixture
def allocator() -> NodeAllocator:
    """Two nodes of two cores."""
    return NodeAllocator(Nodes({"a": 2, "b": 2}, {}, {"a": [0, 1], "b": [0, 1]}))


def job(*hosts: str | None, pmi: str | None = "pmix") -> DragonTask:
    """A rank for each host, on it, or anywhere for None."""
    task = DragonTask(ComputeTask(executable="true"), 1)
    policies: list[Any] = [SimpleNamespace(host_name=host) for host in hosts]
    task.templates = [{"policy": policy} for policy in policies]
    task.pmi = pmi
    return task


def may_start(allocator: NodeAllocator, method: str, task: DragonTask) -> bool:
    return getattr(allocator, method)(task) in (True, Allocation.DONE)


@pytest.mark.parametrize("method", ["allocate", "acquire_mpi_lock"])
def test_mpi_jobs_over_several_nodes_run_one_at_a_time(
    allocator: NodeAllocator, method: str
) -> None:
    calls: list[None] = []
    allocator.on_free(lambda: calls.append(None))
    first, second = job("a", "b"), job("a", "b")
    assert may_start(allocator, method, first)
    assert not may_start(allocator, method, second)
    assert second.placements == []
    allocator.release(second)  # it holds nothing, and releases no lock
    assert not may_start(allocator, method, second)
    assert calls == []
    allocator.release(first)
    assert calls == [None]
    assert may_start(allocator, method, second)


@pytest.mark.parametrize("method", ["allocate", "acquire_mpi_lock"])
@pytest.mark.parametrize("end", ["release", "close"])
def test_all_backends_have_one_mpi_lock(allocator: NodeAllocator, method: str, end: str) -> None:
    others = NodeAllocator(allocator.nodes)
    calls: list[None] = []
    others.on_free(lambda: calls.append(None))
    first, second = job("a", "b"), job("a", "b")
    assert may_start(allocator, method, first)
    assert not may_start(others, method, second)
    NodeAllocator(allocator.nodes).close()  # a backend that ends releases nobody else's
    assert not may_start(others, method, second)
    calls.clear()
    if end == "close":
        allocator.close()
        may_start(allocator, method, job("a", "b"))  # its thread may not know yet
    else:
        allocator.release(first)
    assert calls == [None]
    assert may_start(others, method, second)


def test_other_jobs_need_no_mpi_lock(allocator: NodeAllocator) -> None:
    assert allocator.acquire_mpi_lock(job("a", "b"))
    assert allocator.acquire_mpi_lock(job("a", "b", pmi=None))
    assert allocator.acquire_mpi_lock(job("b", "b"))
    assert not allocator.acquire_mpi_lock(job(None, None))  # Dragon may put them on both


def test_a_job_that_waits_for_the_lock_holds_no_cores(allocator: NodeAllocator) -> None:
    assert allocator.allocate(job("a", "b")) is Allocation.DONE
    assert allocator.allocate(job("a", "b")) is Allocation.MPI_LOCKED
    assert allocator.allocate(job("a", "b", pmi=None)) is Allocation.DONE  # other cores of each
    assert allocator.allocate(job("a", pmi=None)) is Allocation.NO_ROOM


def test_on_one_node_nobody_waits() -> None:
    allocator = NodeAllocator(Nodes({"a": 4}, {}, {"a": [0, 1, 2, 3]}))
    assert all(allocator.acquire_mpi_lock(job(None, None)) for _ in range(3))
    assert [allocator.allocate(job(None, None)) for _ in range(2)] == [Allocation.DONE] * 2
