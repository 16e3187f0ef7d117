"""Options of tasks: the same bad value is refused in the same words on every backend.

Checks need no engine: none of these backends is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rhapsody.api import ComputeTask, Resources, TaskValidationError
from rhapsody.backends import (
    BaseExecutionBackend,
    ConcurrentExecutionBackend,
    DaskExecutionBackend,
    DragonExecutionBackendV1,
    DragonExecutionBackendV2,
    DragonExecutionBackendV3,
)

SECRET = "hunter2"

BACKENDS: dict[str, type[BaseExecutionBackend]] = {
    "concurrent": ConcurrentExecutionBackend,
    "dask": DaskExecutionBackend,
    "dragon_v1": DragonExecutionBackendV1,
    "dragon_v2": DragonExecutionBackendV2,
    "dragon_v3": DragonExecutionBackendV3,
}


class Secretive:
    """An object whose text is a secret."""

    def __repr__(self) -> str:
        return SECRET

    __str__ = __repr__


def refusals(options: Mapping[str, Any], **fields: Any) -> dict[str, str | None]:
    """What each backend that has these options says of them; None where it takes them."""
    found: dict[str, str | None] = {}
    task = ComputeTask(uid="t", task_backend_specific_kwargs=dict(options), **fields)
    for name, kind in BACKENDS.items():
        backend = kind(name=name)
        if not options.keys() <= backend.option_keys:
            continue
        found[name] = None
        try:
            backend.check(task)
        except TaskValidationError as error:
            found[name] = str(error)
    return found


def refused(options: Mapping[str, Any], **fields: Any) -> str:
    """In what words every backend that has these options refuses them."""
    (words,) = set(refusals(options, **fields).values())
    assert words is not None
    assert SECRET not in words
    return words


ENV = "env must be a dict of str to str"
NAMES = "env names must be non-empty str without '=' and NUL; one begins with "

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cwd": 5}, "cwd must be the path of a folder, not 5"),
    ({"cwd": {"TOKEN": SECRET}}, "cwd must be the path of a folder, not this dict"),
    ({"env": [("TOKEN", SECRET)]}, f"{ENV}, not this list"),
    ({"env": f"TOKEN={SECRET}"}, f"{ENV}, not this str"),
    ({"env": {5: SECRET}}, f"{ENV}; a name in it is 5"),
    ({"env": {Secretive(): SECRET}}, f"{ENV}; a name in it is this Secretive"),
    ({"env": {"": SECRET}}, f"{NAMES}''"),
    ({"env": {f"TOKEN={SECRET}": ""}}, f"{NAMES}'TOKEN'"),
    ({"env": {f"TOKEN\0{SECRET}": ""}}, f"{NAMES}'TOKEN'"),
    ({"env": {"TOKEN": f"{SECRET}\0"}}, "env['TOKEN'] must be a str without NUL, not this str"),
    ({"env": {"A": "b", "TOKEN": SECRET.encode()}}, "env['TOKEN'] must be a str without NUL, not"),
    ({"env": {"TOKEN": Secretive()}}, "must be a str without NUL, not this Secretive"),
    ({"env": {"A": 1}}, "env['A'] must be a str without NUL, not 1"),
    ({"env_replace": 1}, "env_replace must be True or False, not 1"),
    ({"shell": "yes"}, "shell must be True or False, not this str"),
    ({"stdin": bytearray(SECRET.encode())}, "the pathlib.Path of a file, not this bytearray"),
    ({"stdin": Secretive()}, "the pathlib.Path of a file, not this Secretive"),
    ({"stdin": 5}, "stdin must be a str or bytes to read, or"),
    ({"timeout": -5}, "timeout must be seconds above 0, not -5"),
    ({"timeout": 0}, "timeout must be seconds above 0, not 0"),
    ({"timeout": True}, "timeout must be seconds above 0, not True"),
    ({"timeout": float("nan")}, "timeout must be seconds above 0, not nan"),
    ({"timeout": "1m"}, "timeout must be seconds above 0, not this str"),
    ({"pmi": SECRET}, "pmi must be 'cray', 'pmix' or None, not this str"),
    ({"pmi": ["pmix"]}, "pmi must be 'cray', 'pmix' or None, not this list"),
    ({"isolated": 1}, "isolated must be True or False, not 1"),
    ({"process_template": [SECRET]}, "process_template must be a dict of cwd, env"),
    ({"process_template": {"env": {"TOKEN": 5}}}, "process_template: env['TOKEN'] must be a str"),
    ({"process_template": {"cwdd": SECRET}}, "does not have cwdd; accepted: cwd, env"),
    ({"process_template": {"args": SECRET}}, "args of a process template are the task's own"),
    ({"process_templates": {"a": SECRET}}, "a list of (number of ranks, dict), not this dict"),
    ({"process_templates": [SECRET]}, "(number of ranks, dict), and this str is in it"),
    ({"process_templates": [(0, {"env": {"TOKEN": SECRET}})]}, "and 0 is a number of ranks in it"),
    ({"process_templates": [(True, {})]}, "and True is a number of ranks in it"),
    ({"process_templates": [(1, {"cwdd": SECRET})]}, "does not have cwdd"),
    ({"process_templates": []}, "process_templates is empty"),
    ({"resources": {"TOKEN": SECRET}}, "resources['TOKEN'] must be a number of at least 0, not"),
    ({"resources": {"GPU": -1}}, "resources['GPU'] must be a number of at least 0, not -1"),
    ({"resources": {"GPU": True}}, "resources['GPU'] must be a number of at least 0, not True"),
    ({"resources": {1: 1}}, "resources must map str to numbers; a name in it is 1"),
    ({"resources": [SECRET]}, "resources must be a dict of numbers, such as {'GPU': 1}, not this"),
    ({"priority": True}, "priority must be a number; higher runs earlier, not True"),
    ({"priority": float("nan")}, "priority must be a number"),
    ({"retries": -1}, "retries must be an int of at least 0"),
    ({"retries": True}, "retries must be an int of at least 0"),
    ({"retries": 1.5}, "retries must be an int of at least 0"),
    ({"workers": {"a": SECRET}}, "an address or name of a worker, or a list of them, not this"),
    ({"allow_other_workers": 1}, "allow_other_workers must be True or False, not 1"),
    ({"key": ""}, "key must be a non-empty str that UTF-8 can encode, not this str"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_a_bad_value_is_refused_alike(options: dict[str, Any], words: str) -> None:
    assert words in refused(options, executable="/bin/true")


def test_every_option_is_among_the_bad_values() -> None:
    tried = {name for options, _ in WRONG for name in options}
    known = {name for kind in BACKENDS.values() for name in kind.option_keys}
    assert tried == known


@pytest.mark.parametrize("name", ["cwd", "env", "env_replace", "shell", "stdin"])
def test_an_option_of_executables_is_refused_for_a_function(name: str) -> None:
    for backend, words in refusals({name: SECRET}, function=len).items():
        assert words is not None
        assert f"options for executables in task_backend_specific_kwargs: {name};" in words
        assert SECRET not in words
        accepted = words.rpartition("accepted for a function: ")[2]
        if backend == "concurrent":
            assert accepted == "none"
        else:
            assert set(accepted.split(", ")) == {
                key
                for key in BACKENDS[backend].option_keys
                if key not in ("cwd", "env", "env_replace", "shell", "stdin")
            }


GOOD: list[dict[str, Any]] = [
    {"cwd": Path("/"), "env": {"A": ""}},
    {"cwd": None, "env": None, "env_replace": None, "shell": None, "stdin": None},
    {"env_replace": True, "shell": True, "stdin": b""},
    {"stdin": Path("/dev/null")},
    {"timeout": 0.5},
    {"timeout": None, "pmi": None},
    {"process_templates": [(2, {"env": {"A": "b"}}), (1, {})], "pmi": "pmix"},
    {"process_template": {"cwd": "/", "env": None}},
    {"resources": {"GPU": 1, "foo": 0.5}, "priority": -1.5, "retries": 0, "key": "mine"},
    {"workers": ["tcp://10.0.0.1:1", 3], "allow_other_workers": True},
]


@pytest.mark.parametrize("options", GOOD)
def test_a_good_value_is_taken(options: dict[str, Any]) -> None:
    found = refusals(options, executable="/bin/true")
    assert found
    assert set(found.values()) == {None}


@pytest.mark.parametrize("env", [[("TOKEN", SECRET)], {"TOKEN": SECRET.encode()}, {"": SECRET}])
def test_env_of_resources_is_refused_as_the_option_is(env: Any) -> None:
    with pytest.raises(TaskValidationError) as caught:
        Resources(env=env)
    option = refused({"env": env}, executable="/bin/true").removeprefix("task 't': ")
    assert str(caught.value) == f"Resources.{option}"


def test_a_value_whose_repr_fails_is_refused_in_words() -> None:
    assert "not <int whose str raises ValueError>" in refused(
        {"timeout": -(10**5000)}, executable="/bin/true"
    )
