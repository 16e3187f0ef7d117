"""What a workflow author imports."""

from __future__ import annotations

from rhapsody.runtime.resources import Resources

from .errors import (
    BackendError,
    DependencyError,
    ResourceError,
    RhapsodyError,
    SerializationError,
    SessionError,
    TaskExecutionError,
    TaskTimeoutError,
    TaskValidationError,
    WorkerLostError,
)
from .session import Session
from .task import AITask, BaseTask, ComputeTask

__all__ = [
    "AITask",
    "BackendError",
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
]
