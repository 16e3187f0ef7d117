"""States of tasks and backends, and the map from an engine's states to ours."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import Enum
from typing import ClassVar

__all__ = [
    "CANCELED",
    "DONE",
    "FAILED",
    "NEW",
    "RUNNING",
    "SUBMITTED",
    "TERMINAL_STATES",
    "WAITING",
    "BackendMainStates",
    "StateMapper",
    "TasksMainStates",
]


class _State(str, Enum):
    """A state that is its own name: equal to the plain string, and printed as it."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


class TasksMainStates(_State):
    """States of a task, in the order in which a task passes them."""

    NEW = "NEW"  # constructed
    WAITING = "WAITING"  # submitted, for its parents to end
    SUBMITTED = "SUBMITTED"  # handed to its backend
    RUNNING = "RUNNING"  # started by a worker
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELED = "CANCELED"


# What `task.state` holds is the plain str: its repr is the name, `marshal` and every encoder take
# it, and it compares as fast as a str can.
NEW, WAITING, SUBMITTED, RUNNING, DONE, FAILED, CANCELED = (
    state.value for state in TasksMainStates
)

TERMINAL_STATES = frozenset({DONE, FAILED, CANCELED})


class BackendMainStates(_State):
    """States of a backend."""

    INITIALIZED = "INITIALIZED"
    RUNNING = "RUNNING"
    SHUTDOWN = "SHUTDOWN"


class StateMapper:
    """Translates an engine's task states into ours.

    `StateMapper({"finished": "DONE", "erred": "FAILED"})`; a state that is already one of ours
    needs no entry. The main states are attributes (`mapper.DONE`), as plain `str`.

    Raises:
        ValueError: the map leads to a state that is not one of ours.
    """

    DONE = DONE
    FAILED = FAILED
    CANCELED = CANCELED
    RUNNING = RUNNING
    terminal_states: ClassVar[frozenset[str]] = TERMINAL_STATES

    def __init__(self, states: Mapping[Hashable, str] | None = None) -> None:
        self._states: dict[Hashable, str] = {
            engine: TasksMainStates(ours).value for engine, ours in (states or {}).items()
        }

    def to_main_state(self, state: Hashable) -> str:
        """Return our state for an engine's.

        Raises:
            ValueError: the engine's state is not known.
        """
        if state in self._states:
            return self._states[state]
        try:
            return TasksMainStates(state).value
        except ValueError:
            known = ", ".join(map(str, [*self._states, *TasksMainStates]))
            raise ValueError(f"unknown task state {state!r}; known: {known}") from None
