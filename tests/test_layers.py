"""Imports point down and make no circle; read from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import rhapsody

PACKAGE = Path(rhapsody.__file__).parent

# A layer imports itself and what is behind it here. `launch` starts programs and knows neither
# sessions nor backends, so that a backend which starts a runtime of its own can use it.
LAYERS = ("cli", "api", "backends", "launch", "runtime")

#: modules beside the layers that belong to one: the public names, and `python -m rhapsody`
TOP_LEVEL = {"rhapsody": "api", "rhapsody.__main__": "cli"}

#: the rooms of each engine, by the name of the package that it is imported as
ENGINES = {
    "dask": ("backends.execution.dask_parallel",),
    "distributed": ("backends.execution.dask_parallel",),
    "dragon": ("backends.execution.dragon", "launch.dragon"),
}


@cache
def modules() -> dict[str, Path]:
    """The files of the package by module name; a package's name is that of its `__init__`."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports by name, in functions and for type checkers too."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return frozenset(name for node in ast.walk(tree) for name in imported(node, module))


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """The modules that a statement or a call of `import_module` imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
            package = module.split(".")
            if modules()[module].name != "__init__.py":
                package.pop()
            package = package[: len(package) - node.level + 1]
            origin = ".".join([*package, origin]).rstrip(".")
        for alias in node.names:  # a module of that package, or a name in it
            name = f"{origin}.{alias.name}"
            yield name if name in modules() else origin
    elif isinstance(node, ast.Call) and node.args:
        function, first = ast.unparse(node.func), node.args[0]
        if function.endswith("import_module") and isinstance(first, ast.Constant):
            yield str(first.value)


def graph() -> dict[str, set[str]]:
    """The imports of each module that are modules of the package."""
    return {module: {name for name in imports(module) if name in modules()} for module in modules()}


def layer(module: str) -> int | None:
    """The place of a module in LAYERS; None for one that any layer may import."""
    if module in TOP_LEVEL:
        return LAYERS.index(TOP_LEVEL[module])
    room = (*module.split("."), "")[1]
    return LAYERS.index(room) if room in LAYERS else None


def is_in(module: str, rooms: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"rhapsody.{room}.") for room in rooms)


def test_the_imports_are_found() -> None:
    """Of each form that the package uses, one that is known to be there."""
    edges = graph()
    assert "rhapsody.api.session" in edges["rhapsody.cli.run"]  # a module, from its package
    assert "rhapsody.launch.supervisor" in edges["rhapsody.launch.apptainer"]  # relative
    assert "rhapsody.cli.launch" in edges["rhapsody.cli"]  # relative, in a function of __init__
    assert "rhapsody.cli.bench" in edges["rhapsody.cli.reports"]  # for type checkers
    assert "dragon.channels" in imports("rhapsody.backends.execution.dragon.runtime")  # a call


def test_every_folder_is_in_a_layer() -> None:
    folders = {file.relative_to(PACKAGE).parts[0] for file in PACKAGE.glob("*/**/*.py")}
    assert folders == set(LAYERS)


def test_imports_point_down() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, names in graph().items()
        for name in names
        if (there := layer(name)) is not None
        and (here := layer(module)) is not None
        and there < here
    ]
    assert sorted(upwards) == []


def test_an_engine_is_imported_in_its_own_rooms() -> None:
    outside = [
        f"{module} imports {name}"
        for module in modules()
        for name in imports(module)
        if not is_in(module, ENGINES.get(name.split(".")[0], ("",)))
        and name.split(".")[0] in ENGINES
    ]
    assert sorted(outside) == []


def test_an_engines_rooms_import_no_other_engines() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in graph().items()
        for rooms in ENGINES.values()
        if is_in(module, rooms)
        for name in names
        for others in ENGINES.values()
        if others != rooms and is_in(name, others)
    ]
    assert sorted(set(wrong)) == []


def test_no_circle_of_files() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
    else:
        circle = ""
    assert circle == ""
