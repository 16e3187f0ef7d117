"""RHAPSODY: functions, executables, MPI jobs and AI inference as tasks of one session."""

from __future__ import annotations

from . import api, backends
from ._version import __version__
from .api import (
    AITask,
    BackendError,
    BaseTask,
    ComputeTask,
    DependencyError,
    ResourceError,
    Resources,
    RhapsodyError,
    SerializationError,
    Session,
    SessionError,
    TaskExecutionError,
    TaskTimeoutError,
    TaskValidationError,
    WorkerLostError,
)
from .backends.discovery import BackendRegistry, discover_backends, get_backend
from .log import enable_logging

__all__ = [
    "AITask",
    "BackendError",
    "BackendRegistry",
    "BaseTask",
    "ComputeTask",
    "DependencyError",
    "ResourceError",
    "Resources",
    "RhapsodyError",
    "SerializationError",
    "Session",
    "SessionError",
    "TaskExecutionError",
    "TaskTimeoutError",
    "TaskValidationError",
    "WorkerLostError",
    "__version__",
    "api",
    "backends",
    "discover_backends",
    "enable_logging",
    "get_backend",
]
