"""Tasks on Dragon: V3 on its Batch, V1 and V2 on processes of their own."""

from __future__ import annotations

from .backend import DragonExecutionBackend, DragonExecutionBackendV3
from .legacy import DragonExecutionBackendV1, DragonExecutionBackendV2

__all__ = [
    "DragonExecutionBackend",
    "DragonExecutionBackendV1",
    "DragonExecutionBackendV2",
    "DragonExecutionBackendV3",
]
