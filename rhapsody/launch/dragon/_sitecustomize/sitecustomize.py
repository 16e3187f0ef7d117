"""Installs ``idle_patches`` in this Python, then runs the ``sitecustomize`` that this one hides."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))


def _load_patches() -> ModuleType:
    """Load the module by its path: importing the package would slow every Python's start down."""
    path = os.path.join(os.path.dirname(_HERE), "idle_patches.py")
    spec = spec_from_file_location("rhapsody_idle_patches", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run_hidden_sitecustomize() -> None:
    """Run the module of this name that would have been found without this folder."""
    folders = [os.path.abspath(folder) for folder in sys.path]
    after = sys.path[folders.index(_HERE) + 1 :] if _HERE in folders else []
    spec = PathFinder.find_spec("sitecustomize", after)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


_load_patches().install()
_run_hidden_sitecustomize()
