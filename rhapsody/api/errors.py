"""Every error that RHAPSODY raises, in one tree (see `RhapsodyError`)."""

from __future__ import annotations

from rhapsody.runtime import errors as _errors
from rhapsody.runtime.errors import (
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

__all__ = [
    "BackendError",
    "DependencyError",
    "ResourceError",
    "RhapsodyError",
    "SerializationError",
    "SessionError",
    "TaskExecutionError",
    "TaskTimeoutError",
    "TaskValidationError",
    "WorkerLostError",
]

# Tracebacks show the name by which users import it.
for _name in __all__:
    getattr(_errors, _name).__module__ = __name__
