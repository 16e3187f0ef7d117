"""Backends: what runs tasks, one package or module per engine, behind one contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import execution
from .base import BaseBackend, BaseExecutionBackend
from .constants import BackendMainStates, StateMapper, TasksMainStates
from .discovery import BackendRegistry, discover_backends, get_backend
from .execution import ConcurrentExecutionBackend, NoopExecutionBackend

if TYPE_CHECKING:
    from .execution import (
        DaskExecutionBackend,
        DragonExecutionBackend,
        DragonExecutionBackendV1,
        DragonExecutionBackendV2,
        DragonExecutionBackendV3,
    )

__all__ = [
    "BackendMainStates",
    "BackendRegistry",
    "BaseBackend",
    "BaseExecutionBackend",
    "ConcurrentExecutionBackend",
    "DaskExecutionBackend",
    "DragonExecutionBackend",
    "DragonExecutionBackendV1",
    "DragonExecutionBackendV2",
    "DragonExecutionBackendV3",
    "NoopExecutionBackend",
    "StateMapper",
    "TasksMainStates",
    "discover_backends",
    "get_backend",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # one of an engine, imported when it is first asked for
        return getattr(execution, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
