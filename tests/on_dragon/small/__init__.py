"""What makes Dragon bearable on two cores, and nodes larger than they are: an environment.

The Python part is the product's, ``rhapsody.launch.dragon.idle_patches``; ``idlewait.c`` is a
library to preload, ``sitecustomize`` fakes CPUs and GPUs, and ``bin`` is first on the PATH: these
three are for tests only.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import rhapsody.launch.dragon

from .. import machine

_HERE = Path(__file__).parent
_TESTS = _HERE.parents[1]


def environment(cpus: int | None = 8, gpus: int | None = None) -> dict[str, str]:
    """Variables for a Dragon runtime of the tests; its Pythons can import the test modules.

    Args:
        cpus: how many each node says it has; None for as many as there are.
        gpus: how many NVIDIA GPUs each node says it has; None for what there is.
    """
    product = Path(rhapsody.launch.dragon.__file__).parent / "_sitecustomize"
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, (product, _HERE, _TESTS))),
        "LD_PRELOAD": str(idlewait()),
        "RHAPSODY_TEST_ANSWERS": _answers(),
    }
    if cpus is not None:
        variables["RHAPSODY_TEST_CPUS"] = str(cpus)
    if gpus is not None:
        variables["RHAPSODY_TEST_GPUS"] = str(gpus)
    return variables


#: programs that take the places of others
BIN = _HERE / "bin"


@functools.cache
def _answers() -> str:
    """The folder in which `dragon-config` keeps its answers, as long as this process lives."""
    folder = tempfile.mkdtemp(prefix="rhapsody-answers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def idlewait() -> Path:
    """The library to preload, compiled at first.

    Raises:
        RuntimeError: there is no C compiler, or it failed.
    """
    source = _HERE / "idlewait.c"
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    library = machine.CACHE / f"idlewait-{key}.so"
    if library.exists():
        return library
    compiler = machine.which("cc") or machine.which("gcc")
    if compiler is None:
        raise RuntimeError(
            "no C compiler: apt-get install -y --no-install-recommends gcc libc6-dev"
        )
    machine.CACHE.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(f".{os.getpid()}")
    options = ["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(fresh), str(source), "-ldl"]
    done = subprocess.run([compiler, *options], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{compiler} failed on {source}:\n{done.stderr}")
    fresh.rename(library)  # at once, for another run may want it too
    return library
