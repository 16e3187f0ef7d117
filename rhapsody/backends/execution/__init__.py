"""Backends that run functions and executables.

Those of engines are imported when they are first asked for: most scripts need one of them at most,
and importing them all is a seventh of `import rhapsody` (measured on CPython 3.11).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .concurrent import ConcurrentExecutionBackend
from .noop import NoopExecutionBackend

if TYPE_CHECKING:
    from .dask_parallel import DaskExecutionBackend
    from .dragon import (
        DragonExecutionBackend,
        DragonExecutionBackendV1,
        DragonExecutionBackendV2,
        DragonExecutionBackendV3,
    )

__all__ = [
    "ConcurrentExecutionBackend",
    "DaskExecutionBackend",
    "DragonExecutionBackend",
    "DragonExecutionBackendV1",
    "DragonExecutionBackendV2",
    "DragonExecutionBackendV3",
    "NoopExecutionBackend",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "dask_parallel" if name.startswith("Dask") else "dragon"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
