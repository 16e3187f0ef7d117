"""``rhapsody launch``: what there is of machines and programs, and then the supervised launcher."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

import click

from rhapsody.backends.discovery import install_hint
from rhapsody.launch.apptainer import Image, find_runner, run_inside
from rhapsody.launch.dragon import command as dragon_command
from rhapsody.launch.supervisor import Job, supervise
from rhapsody.runtime.errors import ResourceError

# These take part in Dragon's choice of a launcher, which is ours here; with both it refuses.
_OVERRIDES = ("DRAGON_SINGLE_NODE_OVERRIDE", "DRAGON_MULTI_NODE_OVERRIDE")


class LaunchError(click.ClickException):
    """A launch that cannot be; one line, and the exit code of a wrong use."""

    exit_code = 2


def launch(
    script: str,
    arguments: Sequence[str],
    dragon: bool,
    nodes: int | None,
    hosts: str | None,
    small_machine: bool,
    image: str | None,
    outside: str | None,
) -> int:
    """Run the script under Dragon, inside an image if one is given, and return the exit code.

    `outside` is for the process that an image's launch runs inside.

    Raises:
        LaunchError: it cannot be started as asked; the message says what was found and what helps.
    """
    if image is not None:
        options = ["--dragon", *_options(nodes, hosts, small_machine)]
        return _launch_inside(image, options, script, arguments)
    if not dragon:
        raise LaunchError(
            "no launcher is named, and Dragon is the one there is: rhapsody launch --dragon "
            f"{script} (without a launcher: rhapsody run {script})"
        )
    environ = {name: value for name, value in os.environ.items() if name not in _OVERRIDES}
    program = _program(environ, inside=outside is not None)
    names = [name.strip() for name in hosts.split(",")] if hosts is not None else []
    try:
        line = dragon_command.line_for(program, nodes, names, environ)
        dragon_command.check_shared_memory()
    except (ResourceError, ValueError) as error:
        raise LaunchError(str(error)) from None
    environ["PATH"] = dragon_command.path_for(program, environ)
    if small_machine:
        _put_first(environ, "PYTHONPATH", _small_machine())
    several = "--wlm" in line.words
    shared = _shared_folder() if several else None
    return supervise(Job(line.words, [script, *arguments], environ, several, shared, outside))


def _options(nodes: int | None, hosts: str | None, small_machine: bool) -> list[str]:
    options = [f"--nodes={nodes}"] if nodes is not None else []
    options += [f"--hosts={hosts}"] if hosts is not None else []
    return options + (["--small-machine"] if small_machine else [])


def _launch_inside(path: str, options: Sequence[str], script: str, arguments: Sequence[str]) -> int:
    """Run this command in an image, which sees the folders that it would use outside."""
    scripts = {os.path.dirname(os.path.abspath(script)), os.path.dirname(os.path.realpath(script))}
    folders = sorted({os.getcwd(), _shared_folder(), *scripts} - {os.sep})
    try:
        image = Image(find_runner(os.environ), os.path.abspath(path), folders)
        return run_inside(image, [*options, "--", script, *arguments], os.environ)
    except ResourceError as error:
        raise LaunchError(str(error)) from None


def _program(environ: dict[str, str], *, inside: bool) -> str:
    program = dragon_command.find_launcher(environ)
    if program is None or importlib.util.find_spec("dragon") is None:
        image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
        if inside:
            raise LaunchError(
                f"{image} has no Dragon for its {sys.executable}; take an image that was made with "
                "rhapsody-py[dragon]"
            )
        hint = install_hint("dragon")
        version = ".".join(map(str, sys.version_info[:2]))
        raise LaunchError(
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
        raise LaunchError(f"cannot make RHAPSODY_WORK_DIR: {error}") from None
    return folder


def _small_machine() -> str:
    """Say that it is on, and return the folder whose sitecustomize does it."""
    from rhapsody.launch.dragon import idle_patches

    version = idle_patches.VERSION
    click.echo(
        f"rhapsody: --small-machine: Dragon {version}, changed to sleep where it waits",
        err=True,
    )
    return os.path.join(os.path.dirname(idle_patches.__file__), "_sitecustomize")


def _put_first(environ: dict[str, str], name: str, folder: str) -> None:
    rest = environ.get(name)
    environ[name] = folder + (os.pathsep + rest if rest else "")
