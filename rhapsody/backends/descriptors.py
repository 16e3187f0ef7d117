"""The built-in backends: where each class is, which engine it needs, how that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["BUILT_IN", "BackendDescriptor", "Engine"]


class Engine(NamedTuple):
    """A package that runs the tasks of a backend, which imports it when it is started."""

    module: str
    distribution: str  # on PyPI
    extra: str  # of rhapsody-py
    conda: str | None = None  # its package on conda-forge
    spack: str | None = None  # its package in Spack

    @property
    def install_hint(self) -> str:
        """The command lines that install it, of pip and other package managers."""
        lines = [f"pip install 'rhapsody-py[{self.extra}]'"]
        if self.conda:
            lines.append(f"conda install -c conda-forge {self.conda}")
        if self.spack:
            lines.append(f"spack install {self.spack}")
        return " or ".join(lines)


class BackendDescriptor(NamedTuple):
    """A backend of this package."""

    name: str
    import_path: str  # package.module:Class
    engine: Engine | None = None


_DASK = Engine("distributed", "distributed", "dask", conda="distributed", spack="py-distributed")
_DRAGON = Engine("dragon", "dragonhpc", "dragon")
_EXECUTION = "rhapsody.backends.execution"

BUILT_IN: Mapping[str, BackendDescriptor] = {
    backend.name: backend
    for backend in (
        BackendDescriptor("concurrent", f"{_EXECUTION}.concurrent:ConcurrentExecutionBackend"),
        BackendDescriptor("noop", f"{_EXECUTION}.noop:NoopExecutionBackend"),
        BackendDescriptor("dask", f"{_EXECUTION}.dask_parallel:DaskExecutionBackend", _DASK),
        BackendDescriptor("dragon_v1", f"{_EXECUTION}.dragon:DragonExecutionBackendV1", _DRAGON),
        BackendDescriptor("dragon_v2", f"{_EXECUTION}.dragon:DragonExecutionBackendV2", _DRAGON),
        BackendDescriptor("dragon_v3", f"{_EXECUTION}.dragon:DragonExecutionBackendV3", _DRAGON),
        BackendDescriptor("dragon", f"{_EXECUTION}.dragon:DragonExecutionBackendV3", _DRAGON),
    )
}
