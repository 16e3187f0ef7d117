"""Who may go where on the nodes of Dragon, and when: without Dragon, for it is ours to say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rhapsody.api import ComputeTask
from rhapsody.backends.execution.dragon.placement import NodeAllocator
from rhapsody.backends.execution.dragon.task import DragonTask, Nodes


@pytest.fixture
def places() -> NodeAllocator:
    """Two nodes of two cores."""
    return NodeAllocator(Nodes({"a": 2, "b": 2}, {}, {"a": [0, 1], "b": [0, 1]}))


def job(*hosts: str | None, pmi: str | None = "pmix") -> DragonTask:
    """A rank for each host, on it, or anywhere for None."""
    flight = DragonTask(ComputeTask(executable="true"), 1)
    policies: list[Any] = [SimpleNamespace(host_name=host) for host in hosts]
    flight.jobs = [(1, {"policy": policy}) for policy in policies]
    flight.pmi = pmi
    return flight


def may_go(places: NodeAllocator, take: str, flight: DragonTask) -> bool:
    return getattr(places, take)(flight) in (True, "taken")


@pytest.mark.parametrize("take", ["take", "acquire_mpi_lock"])
def test_worlds_over_several_nodes_take_turns(places: NodeAllocator, take: str) -> None:
    heard: list[None] = []
    places.on_free(lambda: heard.append(None))
    first, second = job("a", "b"), job("a", "b")
    assert may_go(places, take, first)
    assert not may_go(places, take, second)
    assert second.places == []
    places.give_back(second)  # one that has nothing ends no turn
    assert not may_go(places, take, second)
    assert heard == []
    places.give_back(first)
    assert heard == [None]
    assert may_go(places, take, second)


@pytest.mark.parametrize("take", ["take", "acquire_mpi_lock"])
@pytest.mark.parametrize("end", ["give back", "leave"])
def test_the_turn_is_of_all_backends_together(places: NodeAllocator, take: str, end: str) -> None:
    others = NodeAllocator(places.nodes)
    heard: list[None] = []
    others.on_free(lambda: heard.append(None))
    first, second = job("a", "b"), job("a", "b")
    assert may_go(places, take, first)
    assert not may_go(others, take, second)
    NodeAllocator(places.nodes).leave()  # a backend that ends takes nobody's turn
    assert not may_go(others, take, second)
    heard.clear()
    if end == "leave":
        places.leave()
        may_go(places, take, job("a", "b"))  # its thread may not know yet
    else:
        places.give_back(first)
    assert heard == [None]
    assert may_go(others, take, second)


def test_the_others_need_no_turn(places: NodeAllocator) -> None:
    assert places.acquire_mpi_lock(job("a", "b"))
    assert places.acquire_mpi_lock(job("a", "b", pmi=None))
    assert places.acquire_mpi_lock(job("b", "b"))
    assert not places.acquire_mpi_lock(job(None, None))  # Dragon may put them on both


def test_what_a_world_could_not_take_is_free(places: NodeAllocator) -> None:
    assert places.take(job("a", "b")) == "taken"
    assert places.take(job("a", "b")) == "no turn"
    assert places.take(job("a", "b", pmi=None)) == "taken"  # the other cores of each
    assert places.take(job("a", pmi=None)) == "no room"


def test_on_one_node_nobody_waits() -> None:
    places = NodeAllocator(Nodes({"a": 4}, {}, {"a": [0, 1, 2, 3]}))
    assert all(places.acquire_mpi_lock(job(None, None)) for _ in range(3))
    assert [places.take(job(None, None)) for _ in range(2)] == ["taken"] * 2
