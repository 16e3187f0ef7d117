"""Backends: what runs tasks, one package or module per engine, behind one contract."""

from __future__ import annotations

from .base import BaseBackend, BaseExecutionBackend
from .constants import BackendMainStates, StateMapper, TasksMainStates
from .discovery import BackendRegistry, discover_backends, get_backend
from .execution import (
    ConcurrentExecutionBackend,
    DaskExecutionBackend,
    DragonExecutionBackend,
    DragonExecutionBackendV1,
    DragonExecutionBackendV2,
    DragonExecutionBackendV3,
    NoopExecutionBackend,
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
