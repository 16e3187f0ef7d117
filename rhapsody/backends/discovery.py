"""Backends by name: our own, those of other packages, and those registered by hand.

Another package offers a backend with an entry point in the group `rhapsody.backends`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

from .base import BaseExecutionBackend
from .descriptors import BUILT_IN

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["BackendRegistry", "discover_backends", "get_backend", "install_hint"]

_GROUP = "rhapsody.backends"


class _ImportPath(NamedTuple):
    module: str
    attribute: str


class BackendRegistry:
    """Finds the class of a backend by its name, and imports it only when it is asked for."""

    _registered: dict[str, str] = {}  # noqa: RUF012 - one registry per process

    @classmethod
    def list_backends(cls) -> list[str]:
        """Return the names of all known backends, whether their engines are installed or not."""
        return list(dict.fromkeys([*BUILT_IN, *_entry_points(), *cls._registered]))

    @classmethod
    def register_backend(cls, name: str, import_path: str) -> None:
        """Register a class under a name, by `package.module:Class` or `package.module.Class`.

        Raises:
            ValueError: the path is of neither form.
        """
        _parse(import_path)
        cls._registered[name] = import_path

    @classmethod
    def get_backend_class(cls, name: str) -> type[BaseExecutionBackend]:
        """Import and return the class of a backend.

        Raises:
            ValueError: no backend has this name.
            ImportError: its module is missing, or has no such class.
        """
        module, attribute = _import_path(name)
        try:
            found: type[BaseExecutionBackend] = getattr(importlib.import_module(module), attribute)
        except AttributeError:
            raise ImportError(f"backend {name!r}: {module} has no {attribute!r}") from None
        return found


def get_backend(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Return a new backend by its name, made with these arguments; it is not started yet.

    Raises:
        ValueError, ImportError: as `BackendRegistry.get_backend_class`.
    """
    return BackendRegistry.get_backend_class(name)(*args, **kwargs)


def discover_backends() -> dict[str, bool]:
    """Return for every known backend whether what it needs is installed; nothing is imported."""
    return {name: _is_installed(name) for name in BackendRegistry.list_backends()}


def install_hint(name: str) -> str:
    """Return the command lines that install a backend's engine; empty where it needs none."""
    engine = BUILT_IN[name].engine if name in BUILT_IN else None
    return engine.install_hint if engine is not None else ""


def _import_path(name: str) -> _ImportPath:
    """Where the class of a backend is: a registered name goes before a built-in one."""
    if (registered := BackendRegistry._registered.get(name)) is not None:
        return _parse(registered)
    if name in BUILT_IN:
        return _parse(BUILT_IN[name].import_path)
    if (point := _entry_points().get(name)) is not None:
        return _parse(point.value)
    known = ", ".join(BackendRegistry.list_backends())
    raise ValueError(f"unknown backend {name!r}; known: {known}")


def _is_installed(name: str) -> bool:
    if name in BUILT_IN and name not in BackendRegistry._registered:
        engine = BUILT_IN[name].engine
        return engine is None or _is_importable(engine.module)
    return _is_importable(_import_path(name).module)


def _is_importable(module: str) -> bool:
    """Whether the top-level package of a module is there; a look below it would import it."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # it is imported, and has no __spec__, as one that a test has put in place
        return True


def _entry_points() -> dict[str, EntryPoint]:
    # Here: it takes a tenth of `import rhapsody`, which most scripts need for nothing else.
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=_GROUP)}


def _parse(path: str) -> _ImportPath:
    module, colon, attribute = path.partition(":")
    if not colon:
        module, _, attribute = path.rpartition(".")
    if not module or not attribute:
        raise ValueError(f"an import path must be 'package.module:Class', not {path!r}")
    return _ImportPath(module, attribute)
