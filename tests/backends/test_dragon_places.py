"""Who may go where on the nodes of Dragon, and when: without Dragon, for it is ours to say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rhapsody.api import ComputeTask
from rhapsody.backends.execution.dragon.placement import Places
from rhapsody.backends.execution.dragon.task import Flight, Nodes


@pytest.fixture
def places() -> Places:
    """Two nodes of two cores."""
    return Places(Nodes({"a": 2, "b": 2}, {}, {"a": [0, 1], "b": [0, 1]}))


def job(*hosts: str | None, pmi: str | None = "pmix") -> Flight:
    """A rank for each host, on it, or anywhere for None."""
    flight = Flight(ComputeTask(executable="true"), 1)
    policies: list[Any] = [SimpleNamespace(host_name=host) for host in hosts]
    flight.jobs = [(1, {"policy": policy}) for policy in policies]
    flight.pmi = pmi
    return flight


def may_go(places: Places, take: str, flight: Flight) -> bool:
    return getattr(places, take)(flight) in (True, "taken")


@pytest.mark.parametrize("take", ["take", "take_turn"])
def test_worlds_over_several_nodes_take_turns(places: Places, take: str) -> None:
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


@pytest.mark.parametrize("take", ["take", "take_turn"])
@pytest.mark.parametrize("end", ["give back", "leave"])
def test_the_turn_is_of_all_backends_together(places: Places, take: str, end: str) -> None:
    others = Places(places.nodes)
    heard: list[None] = []
    others.on_free(lambda: heard.append(None))
    first, second = job("a", "b"), job("a", "b")
    assert may_go(places, take, first)
    assert not may_go(others, take, second)
    Places(places.nodes).leave()  # a backend that ends takes nobody's turn
    assert not may_go(others, take, second)
    heard.clear()
    if end == "leave":
        places.leave()
        may_go(places, take, job("a", "b"))  # its thread may not know yet
    else:
        places.give_back(first)
    assert heard == [None]
    assert may_go(others, take, second)


def test_the_others_need_no_turn(places: Places) -> None:
    assert places.take_turn(job("a", "b"))
    assert places.take_turn(job("a", "b", pmi=None))
    assert places.take_turn(job("b", "b"))
    assert not places.take_turn(job(None, None))  # Dragon may put them on both


def test_what_a_world_could_not_take_is_free(places: Places) -> None:
    assert places.take(job("a", "b")) == "taken"
    assert places.take(job("a", "b")) == "no turn"
    assert places.take(job("a", "b", pmi=None)) == "taken"  # the other cores of each
    assert places.take(job("a", pmi=None)) == "no room"


def test_on_one_node_nobody_waits() -> None:
    places = Places(Nodes({"a": 4}, {}, {"a": [0, 1, 2, 3]}))
    assert all(places.take_turn(job(None, None)) for _ in range(3))
    assert [places.take(job(None, None)) for _ in range(2)] == ["taken"] * 2
