"""``rhapsody launch``: what there is of machines and programs, and then the supervised launcher."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

import click

from rhapsody.backends.discovery import install_hint
from rhapsody.runtime import dragon_line
from rhapsody.runtime.errors import ResourceError
from rhapsody.runtime.launcher import Job, supervise

# These take part in Dragon's choice of a launcher, which is ours here; with both it refuses.
_OVERRIDES = ("DRAGON_SINGLE_NODE_OVERRIDE", "DRAGON_MULTI_NODE_OVERRIDE")


class Refusal(click.ClickException):
    """A launch that cannot be; one line, and the exit code of a wrong use."""

    exit_code = 2


def launch(
    script: str,
    arguments: Sequence[str],
    dragon: bool,
    nodes: int | None,
    hosts: str | None,
    small_machine: bool,
) -> int:
    """Run the script under Dragon and return the exit code.

    Raises:
        Refusal: it cannot be started as asked; the message says what was found and what helps.
    """
    if not dragon:
        raise Refusal(
            "no launcher is named, and Dragon is the one there is: rhapsody launch --dragon "
            f"{script} (without a launcher: rhapsody run {script})"
        )
    environ = {name: value for name, value in os.environ.items() if name not in _OVERRIDES}
    program = _program(environ)
    names = [name.strip() for name in hosts.split(",")] if hosts is not None else []
    try:
        line = dragon_line.line_for(program, nodes, names, environ)
        dragon_line.check_shared_memory()
    except (ResourceError, ValueError) as error:
        raise Refusal(str(error)) from None
    # Dragon starts its other programs by their names.
    _put_first(environ, "PATH", os.path.dirname(program))
    if small_machine:
        _put_first(environ, "PYTHONPATH", _small_machine())
    several = "--wlm" in line.words
    shared = _shared_folder() if several else None
    return supervise(Job(line.words, [script, *arguments], environ, several, shared))


def _program(environ: dict[str, str]) -> str:
    program = dragon_line.find_launcher(environ)
    if program is None or importlib.util.find_spec("dragon") is None:
        hint = install_hint("dragon") or "pip install 'rhapsody-py[dragon]'"
        version = ".".join(map(str, sys.version_info[:2]))
        raise Refusal(
            f"Dragon is not installed for {sys.executable} (Python {version}; it has wheels for "
            f"3.11 to 3.13): {hint}"
        )
    return program


def _shared_folder() -> str:
    """Where sessions write, which nodes share; made if missing."""
    folder = os.path.abspath(os.environ.get("RHAPSODY_WORK_DIR") or os.getcwd())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise Refusal(f"cannot make RHAPSODY_WORK_DIR: {error}") from None
    return folder


def _small_machine() -> str:
    """Say that it is on, and return the folder whose sitecustomize does it."""
    from rhapsody.runtime import small_machine

    version = small_machine.VERSION
    click.echo(
        f"rhapsody: --small-machine: Dragon {version}, changed to sleep where it waits",
        err=True,
    )
    return os.path.join(os.path.dirname(small_machine.__file__), "_small")


def _put_first(environ: dict[str, str], name: str, folder: str) -> None:
    rest = environ.get(name)
    environ[name] = folder + (os.pathsep + rest if rest else "")
