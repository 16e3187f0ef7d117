"""Backends that run functions and executables."""

from __future__ import annotations

from .concurrent import ConcurrentExecutionBackend
from .dask_parallel import DaskExecutionBackend
from .dragon import DragonExecutionBackend, DragonExecutionBackendV3
from .dragon.legacy import DragonExecutionBackendV1, DragonExecutionBackendV2
from .noop import NoopExecutionBackend

__all__ = [
    "ConcurrentExecutionBackend",
    "DaskExecutionBackend",
    "DragonExecutionBackend",
    "DragonExecutionBackendV1",
    "DragonExecutionBackendV2",
    "DragonExecutionBackendV3",
    "NoopExecutionBackend",
]
