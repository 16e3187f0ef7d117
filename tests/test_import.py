"""What `import rhapsody` costs and brings, and where every public name is found."""

from __future__ import annotations

import importlib
import os
import re
import resource
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import rhapsody

NAMES = {
    "rhapsody": [
        "Session", "ComputeTask", "AITask", "BaseTask", "Resources", "RhapsodyError",
        "BackendError", "TaskValidationError", "TaskExecutionError", "SessionError",
        "ResourceError", "BackendRegistry", "discover_backends", "get_backend", "enable_logging",
        "__version__",
    ],
    "rhapsody.api": [
        "Session", "ComputeTask", "AITask", "BaseTask", "Resources", "RhapsodyError",
        "BackendError", "TaskValidationError", "TaskExecutionError", "SessionError",
        "ResourceError",
    ],
    "rhapsody.api.errors": [
        "RhapsodyError", "BackendError", "TaskValidationError", "TaskExecutionError",
        "SessionError", "ResourceError",
    ],
    "rhapsody.backends": [
        "ConcurrentExecutionBackend", "NoopExecutionBackend", "BaseExecutionBackend",
    ],
    "rhapsody.backends.base": ["BaseExecutionBackend", "BaseBackend"],
    "rhapsody.backends.constants": ["TasksMainStates", "BackendMainStates", "StateMapper"],
    "rhapsody.backends.discovery": ["BackendRegistry", "discover_backends", "get_backend"],
    "rhapsody.backends.execution": ["ConcurrentExecutionBackend", "NoopExecutionBackend"],
    "rhapsody.backends.execution.concurrent": ["ConcurrentExecutionBackend"],
    "rhapsody.backends.execution.dask_parallel": ["DaskExecutionBackend"],
    "rhapsody.backends.execution.dragon": [
        "DragonExecutionBackendV1", "DragonExecutionBackendV2", "DragonExecutionBackendV3",
    ],
    "rhapsody.backends.execution.noop": ["NoopExecutionBackend"],
    "rhapsody.api.session": ["Session"],
    "rhapsody.api.task": ["ComputeTask", "AITask", "BaseTask"],
}  # fmt: skip

#: Engines, and what only the command line needs.
HEAVY = [
    "click", "rich", "dask", "distributed", "dragon", "radical", "vllm", "numpy", "opentelemetry",
    "prometheus_client", "httpx", "aiohttp", "requests", "yaml",
]  # fmt: skip


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_is_where_the_design_has_it(module: str) -> None:
    found = importlib.import_module(module)
    for name in NAMES[module]:
        assert hasattr(found, name), f"{module}.{name}"
    assert set(NAMES[module]) - {"__version__"} <= set(found.__all__)


@pytest.mark.parametrize("module", NAMES)
def test_what_a_module_says_is_public_is_there(module: str) -> None:
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in found.__all__)
    assert len(set(found.__all__)) == len(found.__all__)


def test_a_name_is_one_thing_wherever_it_is_found() -> None:
    things: dict[str, set[int]] = {}
    for module, names in NAMES.items():
        for name in names:
            things.setdefault(name, set()).add(id(getattr(importlib.import_module(module), name)))
    assert {name for name, found in things.items() if len(found) > 1} == set()


def test_the_distribution() -> None:
    assert rhapsody.__version__ == version("rhapsody-py")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", rhapsody.__version__)
    package = Path(rhapsody.__file__).parent
    assert (package / "py.typed").is_file()
    hard = {
        re.split(r"[<>=!~ ;\[]", line)[0]
        for line in requires("rhapsody-py") or []
        if "extra ==" not in line
    }
    assert hard == {"cloudpickle", "click", "rich"}  # few, and each with its reason


def test_an_import_brings_no_engine_and_no_command_line() -> None:
    script = (
        "import sys, rhapsody, rhapsody.api, rhapsody.backends\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert output(script) == "[]\n"


def test_an_import_writes_and_starts_nothing(tmp_path: Path) -> None:
    script = (
        "import threading, asyncio, rhapsody, os, logging\n"
        "print(threading.active_count(), os.listdir('.'), logging.getLogger().handlers)"
    )
    assert output(script, cwd=tmp_path) == "1 [] []\n"


def test_an_import_takes_little_time() -> None:
    """CPU seconds of `import rhapsody`: those of a process that does it, less one that does not."""
    # The least of ten: other work on the machine can only add to it.
    bare = min(cpu("pass") for _ in range(10))
    ours = min(cpu("import rhapsody") for _ in range(10))
    assert ours - bare < 0.15


def output(script: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, check=True
    )
    return done.stdout


def cpu(script: str) -> float:
    """User and system seconds of a fresh interpreter."""
    # With byte code, as an installed package has it: the first run writes it.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", script], check=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
