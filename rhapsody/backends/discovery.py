"""Backends by name: our own, those of other packages, and those registered by hand.

Another package offers a backend with an entry point in the group `rhapsody.backends`.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .base import BaseExecutionBackend

__all__ = ["BackendRegistry", "discover_backends", "get_backend", "install_hint"]

_GROUP = "rhapsody.backends"
_EXECUTION = "rhapsody.backends.execution"

# name -> (where the class is, the engine's module if it needs one, the extra that installs it)
_BUILT_IN: dict[str, tuple[str, str | None, str | None]] = {
    "concurrent": (f"{_EXECUTION}.concurrent:ConcurrentExecutionBackend", None, None),
    "noop": (f"{_EXECUTION}.noop:NoopExecutionBackend", None, None),
    "dask": (f"{_EXECUTION}.dask_parallel:DaskExecutionBackend", "distributed", "dask"),
    "dragon_v1": (f"{_EXECUTION}.dragon:DragonExecutionBackendV1", "dragon", "dragon"),
    "dragon_v2": (f"{_EXECUTION}.dragon:DragonExecutionBackendV2", "dragon", "dragon"),
    "dragon_v3": (f"{_EXECUTION}.dragon:DragonExecutionBackendV3", "dragon", "dragon"),
    "dragon": (f"{_EXECUTION}.dragon:DragonExecutionBackendV3", "dragon", "dragon"),
}

# The lines of other package managers that have an engine.
_ELSEWHERE = {"dask": "conda install distributed, spack install py-distributed"}


class BackendRegistry:
    """Where the classes of backends are found; nothing is imported before it is asked for."""

    _registered: dict[str, str] = {}  # noqa: RUF012 - shared on purpose

    @classmethod
    def list_backends(cls) -> list[str]:
        """Return the names of all known backends, installed or not."""
        return list(dict.fromkeys([*_BUILT_IN, *_plugins(), *cls._registered]))

    @classmethod
    def register_backend(cls, name: str, import_path: str) -> None:
        """Make a class known as `package.module:Class` or `package.module.Class`.

        Raises:
            ValueError: the path names no class in a module.
        """
        _split(import_path)
        cls._registered[name] = import_path

    @classmethod
    def get_backend_class(cls, name: str) -> type[BaseExecutionBackend]:
        """Import and return a backend's class.

        Raises:
            ValueError: nothing of this name is known.
            ImportError: its module is missing, or has no such class.
        """
        if name in cls._registered:
            path = cls._registered[name]
        elif name in _BUILT_IN:
            path = _BUILT_IN[name][0]
        elif (plugin := _plugins().get(name)) is not None:
            path = plugin.value
        else:
            known = ", ".join(cls.list_backends())
            raise ValueError(f"unknown backend {name!r}; known: {known}")
        module, attribute = _split(path)
        try:
            found: type[BaseExecutionBackend] = getattr(importlib.import_module(module), attribute)
        except AttributeError:
            raise ImportError(f"backend {name!r}: {module} has no {attribute!r}") from None
        return found


def get_backend(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Make a backend by its name; it is not started yet.

    Raises:
        ValueError, ImportError: as `BackendRegistry.get_backend_class`.
    """
    return BackendRegistry.get_backend_class(name)(*args, **kwargs)


def discover_backends() -> dict[str, bool]:
    """Say of every known backend whether it can be used: its engine is found, but not imported."""
    return {name: _is_there(name) for name in BackendRegistry.list_backends()}


def install_hint(name: str) -> str:
    """Return the line that installs what a backend lacks; empty for one that needs nothing."""
    extra = _BUILT_IN[name][2] if name in _BUILT_IN else None
    if extra is None:
        return ""
    elsewhere = f"  ({_ELSEWHERE[extra]})" if extra in _ELSEWHERE else ""
    return f"pip install 'rhapsody-py[{extra}]'{elsewhere}"


def _is_there(name: str) -> bool:
    if name in BackendRegistry._registered:
        return _found(_split(BackendRegistry._registered[name])[0])
    if name in _BUILT_IN:
        engine = _BUILT_IN[name][1]
        return engine is None or _found(engine)
    return _found(_split(_plugins()[name].value)[0])


def _found(module: str) -> bool:
    """Whether a module is there, judged by its top package: to look deeper would import that."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # a module without a spec, such as one that a test has put in place
        return True


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=_GROUP)}


def _split(path: str) -> tuple[str, str]:
    module, colon, attribute = path.partition(":")
    if not colon:
        module, _, attribute = path.rpartition(".")
    if not module or not attribute:
        raise ValueError(f"an import path is 'package.module:Class', not {path!r}")
    return module, attribute
