"""Backends by name: built-in, from other packages, and registered by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nox.project
import pytest

import rhapsody
from rhapsody import BackendRegistry, discover_backends, get_backend
from rhapsody.api import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend, NoopExecutionBackend, discovery
from rhapsody.backends.descriptors import BUILT_IN

ROOT = Path(__file__).parents[2]
THIRD_PARTY = Path(__file__).parents[1] / "thirdparty"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path for modules that are made up here; the registry is put back after."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(BackendRegistry, "_registered", {})
    yield folder
    for name in [name for name in sys.modules if name.startswith("made_up_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["concurrent", "noop"])
def test_what_needs_nothing_is_there(name: str) -> None:
    assert discover_backends()[name] is True
    assert name in BackendRegistry.list_backends()


def test_backends_by_name() -> None:
    assert BackendRegistry.get_backend_class("concurrent") is ConcurrentExecutionBackend
    assert BackendRegistry.get_backend_class("noop") is NoopExecutionBackend
    backend = get_backend("noop", name="mine")
    assert isinstance(backend, NoopExecutionBackend)
    assert (backend.name, backend.state()) == ("mine", "INITIALIZED")
    assert get_backend("concurrent", slots=3, name="c").name == "c"


def test_an_unknown_name_is_a_value_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'daks'; known: .*concurrent.*noop"):
        get_backend("daks")


def test_the_same_names_everywhere() -> None:
    for name in ("BackendRegistry", "discover_backends", "get_backend"):
        assert (
            getattr(rhapsody, name) is getattr(rhapsody.backends, name) is getattr(discovery, name)
        )


def test_discovery_agrees_with_the_registry() -> None:
    found = discover_backends()
    assert list(found) == BackendRegistry.list_backends()
    assert all(type(there) is bool for there in found.values())


def test_discovery_tells_the_truth() -> None:
    """What it calls there can be had; what it calls missing has an engine that is missing."""
    for name, there in discover_backends().items():
        if there:
            assert BackendRegistry.get_backend_class(name)


@pytest.mark.parametrize("path", ["made_up_one:Backend", "made_up_one.Backend"])
async def test_a_backend_registered_by_hand(elsewhere: Path, path: str) -> None:
    (elsewhere / "made_up_one.py").write_text(
        "from rhapsody.backends import NoopExecutionBackend\n"
        "class Backend(NoopExecutionBackend):\n"
        "    pass\n"
    )
    BackendRegistry.register_backend("mine", path)
    assert discover_backends()["mine"] is True
    assert "made_up_one" not in sys.modules
    async with Session([get_backend("mine")]) as session:
        task = ComputeTask(function=int)
        await session.submit_tasks([task])
        assert (await task).backend == "noop"


def test_a_name_registered_by_hand_goes_before_a_built_in(elsewhere: Path) -> None:
    (elsewhere / "made_up_two.py").write_text("class Backend: pass\n")
    BackendRegistry.register_backend("noop", "made_up_two:Backend")
    assert BackendRegistry.get_backend_class("noop").__module__ == "made_up_two"


def test_a_registered_module_that_is_missing(elsewhere: Path) -> None:
    BackendRegistry.register_backend("gone", "made_up_gone.module:Backend")
    assert discover_backends()["gone"] is False
    with pytest.raises(ImportError, match="made_up_gone"):
        BackendRegistry.get_backend_class("gone")


def test_a_registered_class_that_is_missing(elsewhere: Path) -> None:
    (elsewhere / "made_up_three.py").write_text("")
    BackendRegistry.register_backend("classless", "made_up_three:Backend")
    with pytest.raises(ImportError, match="'classless': made_up_three has no 'Backend'"):
        BackendRegistry.get_backend_class("classless")


def test_a_registered_module_that_breaks_says_how(elsewhere: Path) -> None:
    (elsewhere / "made_up_four.py").write_text("1 / 0\n")
    BackendRegistry.register_backend("breaks", "made_up_four:Backend")
    with pytest.raises(ZeroDivisionError):
        BackendRegistry.get_backend_class("breaks")


@pytest.mark.parametrize("path", ["", "module", ":Class", "module:"])
def test_a_path_that_names_no_class(path: str) -> None:
    with pytest.raises(ValueError, match=r"an import path must be 'package\.module:Class'"):
        BackendRegistry.register_backend("bad", path)
    assert "bad" not in BackendRegistry.list_backends()


# ---------------------------------------------------------------------- engines

#: extras of this project that are not an engine's
OTHER_EXTRAS = {"demo", "dev"}


def test_each_engine_has_an_extra_that_installs_it() -> None:
    extras = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    engines = {backend.engine for backend in BUILT_IN.values() if backend.engine}
    assert {engine.extra for engine in engines} == extras.keys() - OTHER_EXTRAS
    for engine in engines:
        names = {re.split(r"[^\w.-]", requirement)[0] for requirement in extras[engine.extra]}
        assert engine.distribution in names


def test_an_engine_is_installed_by_the_lines_of_three_package_managers() -> None:
    assert discovery.install_hint("dask") == (
        "pip install 'rhapsody-py[dask]' or conda install -c conda-forge distributed"
        " or spack install py-distributed"
    )
    assert discovery.install_hint("dragon") == "pip install 'rhapsody-py[dragon]'"
    assert discovery.install_hint("concurrent") == discovery.install_hint("unknown") == ""


# ---------------------------------------------------------------------- other packages


def test_a_package_on_the_path_is_discovered_and_not_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(THIRD_PARTY)
    sys.modules.pop("starlight", None)
    found = discover_backends()
    assert found["starlight"] is True
    assert found["dark"] is False  # its package is not there
    assert "starlight" not in sys.modules
    assert BackendRegistry.get_backend_class("starlight").__name__ == "StarlightBackend"


def test_a_package_that_is_wrong_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(THIRD_PARTY)
    with pytest.raises(ImportError, match="that_is_not_there"):
        get_backend("eclipsed")
    with pytest.raises(ImportError, match="'nameless': starlight has no 'NoSuchClass'"):
        get_backend("nameless")
    with pytest.raises(ImportError, match="no_such_engine_anywhere"):
        get_backend("dark")
    assert get_backend("starlight").name == "starlight"


def test_a_package_cannot_take_a_built_in_name(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = elsewhere / "usurper-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: usurper\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rhapsody.backends]\nnoop = usurper:Backend\n")
    assert BackendRegistry.get_backend_class("noop") is NoopExecutionBackend
    assert discover_backends()["noop"] is True


def test_discovery_imports_no_engine() -> None:
    """In a fresh process, with a package whose import would be noticed."""
    script = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import rhapsody\n"
        "found = rhapsody.discover_backends()\n"
        "assert found['starlight'] and found['concurrent'], found\n"
        "engines = {'starlight', 'dask', 'distributed', 'dragon', 'radical', 'vllm'}\n"
        "print(sorted(engines & (set(sys.modules) - before)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(THIRD_PARTY), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
