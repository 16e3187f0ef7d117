"""``rhapsody launch``: checks what the launch needs, then runs it under the supervisor."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

import click

from rhapsody.backends.discovery import install_hint
from rhapsody.launch.apptainer import Image, find_apptainer, run_inside
from rhapsody.launch.dragon.command import build_command, find_launcher, path_with_launcher
from rhapsody.launch.dragon.shared_memory import check_shared_memory
from rhapsody.launch.supervisor import LaunchSpec, supervise
from rhapsody.runtime.errors import ResourceError

# These too choose Dragon's launcher, which the options do here; with both Dragon refuses to start.
_OVERRIDES = ("DRAGON_SINGLE_NODE_OVERRIDE", "DRAGON_MULTI_NODE_OVERRIDE")


class LaunchError(click.ClickException):
    """Raised when a launch cannot start; the command prints one line and exits with code 2."""

    exit_code = 2


def launch(
    script: str,
    arguments: Sequence[str],
    dragon: bool,
    nodes: int | None,
    hosts: str | None,
    small_machine: bool,
    image: str | None,
    host_socket: str | None,
) -> int:
    """Run the script under Dragon, inside an image if one is given, and return the exit code.

    Args:
        script: the workflow.
        arguments: of the script.
        dragon: whether Dragon was named as the launcher.
        nodes: how many nodes to use; None for all that there are.
        hosts: names of hosts to reach by ssh, separated by commas.
        small_machine: whether to patch Dragon for few cores.
        image: the path of the image to run in.
        host_socket: given by `run_inside` to the launch that runs inside an image.

    Raises:
        LaunchError: it cannot start as asked; the message says what was found and what helps.
    """
    if image is not None:
        options = ["--dragon", *_options(nodes, hosts, small_machine)]
        return _launch_inside(image, options, script, arguments)
    if not dragon:
        raise LaunchError(
            "name a launcher; Dragon is the one there is: rhapsody launch --dragon "
            f"{script} (without a launcher: rhapsody run {script})"
        )
    environ = {name: value for name, value in os.environ.items() if name not in _OVERRIDES}
    launcher = _find_dragon(environ, inside=host_socket is not None)
    names = [name.strip() for name in hosts.split(",")] if hosts is not None else []
    try:
        command = build_command(launcher, nodes, names, environ)
        check_shared_memory()
    except (ResourceError, ValueError) as error:
        raise LaunchError(str(error)) from None
    environ["PATH"] = path_with_launcher(launcher, environ)
    if small_machine:
        _apply_idle_patches(environ)
    shared_dir = _shared_dir() if command.remote else None
    spec = LaunchSpec(command, [script, *arguments], environ, shared_dir, host_socket)
    return supervise(spec)


def _options(nodes: int | None, hosts: str | None, small_machine: bool) -> list[str]:
    options = [f"--nodes={nodes}"] if nodes is not None else []
    options += [f"--hosts={hosts}"] if hosts is not None else []
    return options + (["--small-machine"] if small_machine else [])


def _launch_inside(path: str, options: Sequence[str], script: str, arguments: Sequence[str]) -> int:
    """Run this command in an image, in which the folders that it uses are bound."""
    scripts = {os.path.dirname(os.path.abspath(script)), os.path.dirname(os.path.realpath(script))}
    folders = sorted({os.getcwd(), _shared_dir(), *scripts} - {os.sep})
    try:
        image = Image(find_apptainer(os.environ), os.path.abspath(path), folders)
        return run_inside(image, [*options, "--", script, *arguments], os.environ)
    except ResourceError as error:
        raise LaunchError(str(error)) from None


def _find_dragon(environ: dict[str, str], *, inside: bool) -> str:
    """The path of Dragon's launcher, here or, where this runs inside an image, there."""
    launcher = find_launcher(environ)
    if launcher is None or importlib.util.find_spec("dragon") is None:
        image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
        if inside:
            raise LaunchError(
                f"{image} has no Dragon for its {sys.executable}; use an image that was made with "
                "rhapsody-py[dragon]"
            )
        hint = install_hint("dragon")
        version = ".".join(map(str, sys.version_info[:2]))
        raise LaunchError(
            f"Dragon is not installed for {sys.executable} (Python {version}; it has wheels for "
            f"3.11 to 3.13): {hint}"
        )
    return launcher


def _shared_dir() -> str:
    """The folder where sessions write, which all nodes must see; made if missing."""
    folder = os.path.abspath(os.environ.get("RHAPSODY_WORK_DIR") or os.getcwd())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"cannot make RHAPSODY_WORK_DIR: {error}") from None
    return folder


def _apply_idle_patches(environ: dict[str, str]) -> None:
    """Patch Dragon in every Python that is started with this environment, and print that it is."""
    from rhapsody.launch.dragon import idle_patches

    version = idle_patches.VERSION
    click.echo(
        f"rhapsody: --small-machine: Dragon {version}, patched to sleep as it waits", err=True
    )
    folder = os.path.join(os.path.dirname(idle_patches.__file__), "_sitecustomize")
    rest = environ.get("PYTHONPATH")
    environ["PYTHONPATH"] = folder + (os.pathsep + rest if rest else "")
