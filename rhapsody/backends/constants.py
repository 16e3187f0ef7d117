"""States of tasks and backends, and the map from an engine's words to ours."""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

__all__ = ["BackendMainStates", "StateMapper", "TasksMainStates"]


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
    SUBMITTED = "SUBMITTED"  # with its backend
    RUNNING = "RUNNING"  # started by a worker
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELED = "CANCELED"


class BackendMainStates(_State):
    """States of a backend."""

    INITIALIZED = "INITIALIZED"
    RUNNING = "RUNNING"
    SHUTDOWN = "SHUTDOWN"


class StateMapper:
    """Translate an engine's task states into ours.

    `StateMapper({"finished": "DONE", "erred": "FAILED"})`; a state that is already one of ours
    needs no entry. The main states are attributes (`mapper.DONE`), as plain strings.
    """

    DONE = "DONE"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    RUNNING = "RUNNING"
    terminal_states: ClassVar[frozenset[str]] = frozenset({"DONE", "FAILED", "CANCELED"})

    def __init__(self, states: dict[Any, str] | None = None) -> None:
        self._states = {
            engine: TasksMainStates(ours).value for engine, ours in (states or {}).items()
        }

    def to_main_state(self, state: Any) -> str:
        """Return our state for the engine's; raises ValueError for one that is not known."""
        if state in self._states:
            return self._states[state]
        try:
            return TasksMainStates(state).value
        except ValueError:
            known = ", ".join(map(str, [*self._states, *TasksMainStates]))
            raise ValueError(f"unknown task state {state!r}; known: {known}") from None
