"""Tasks on Dask: a cluster of the backend's own, or one that is there already."""

from __future__ import annotations

from .backend import DaskExecutionBackend

__all__ = ["DaskExecutionBackend"]
