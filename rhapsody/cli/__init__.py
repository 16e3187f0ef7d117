"""The command ``rhapsody``: its subcommands, their options and exit codes.

The work of each is in a module of its own, which is imported when the subcommand runs.
"""

from __future__ import annotations

import json
import math
import os
import sys

import click

from rhapsody import __version__

LOG_LEVELS = click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False)

EXIT_CODES = """\b
Exit code:
  0    the script ended without an exception; tasks that failed are in
       the summary, and the script decides whether they are an error
  n    the script called sys.exit(n)
  1    an uncaught exception, or a script that does not compile
  2    wrong usage of this command, such as a missing SCRIPT
  130  Ctrl-C
"""

LAUNCH_EXIT_CODES = """\b
Exit code:
  n    the workflow's own; 128 + n where signal n ended it
  2    wrong usage of this command, or something that it needs is missing
  130  Ctrl-C; 143 SIGTERM; 129 SIGHUP
  1    on several nodes, also where the workflow's exit code is not known
"""

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rhapsody")
def main() -> None:
    """Run functions, executables, MPI jobs and AI inference as tasks of one session."""


@main.command("run", context_settings={"allow_interspersed_args": False}, epilog=EXIT_CODES)
@click.option(
    "--log-level", type=LOG_LEVELS, help="Least level to log on stderr. [RHAPSODY_LOG_LEVEL]"
)
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, resolve_path=True),
    help="Folder where sessions write; made if missing. [RHAPSODY_WORK_DIR]",
)
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(
    script: str, arguments: tuple[str, ...], log_level: str | None, work_dir: str | None
) -> None:
    """Run the workflow SCRIPT, unchanged, with its ARGUMENTS.

    On a terminal a line per backend shows the progress; at the end a summary is printed. Both
    go to stderr, so that stdout has the script's output alone.
    """
    from rhapsody.log import level_of

    from .run import run_workflow

    if log_level is not None:
        os.environ["RHAPSODY_LOG_LEVEL"] = log_level.upper()
    try:
        level_of()
    except ValueError as error:  # of the environment: click has checked the option
        raise click.UsageError(str(error)) from None
    if work_dir is not None:
        try:
            os.makedirs(work_dir, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(str(error), param_hint="--work-dir") from None
        os.environ["RHAPSODY_WORK_DIR"] = work_dir
    sys.exit(run_workflow(script, arguments))


@main.command(
    "launch", context_settings={"allow_interspersed_args": False}, epilog=LAUNCH_EXIT_CODES
)
@click.option("--dragon", is_flag=True, help="Use Dragon's launcher and runtime.")
@click.option(
    "--nodes",
    type=click.IntRange(1),
    help="How many nodes. Default: all of the allocation or of --hosts, else this machine.",
)
@click.option("--hosts", help="Nodes to reach by ssh, as a,b,c, where there is no allocation.")
@click.option(
    "--image",
    type=click.Path(exists=True),
    help="Run in this Apptainer image, which has RHAPSODY and Dragon; the host needs no Dragon.",
)
# Its word stays as it is: the image may have another release.
@click.option("--outside", "host_socket", hidden=True)
@click.option(
    "--small-machine",
    is_flag=True,
    help="For few cores: patch Dragon 0.15 to sleep where it would spin while it waits.",
)
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch_command(
    script: str,
    arguments: tuple[str, ...],
    dragon: bool,
    nodes: int | None,
    hosts: str | None,
    small_machine: bool,
    image: str | None,
    host_socket: str | None,
) -> None:
    """Run the workflow SCRIPT under a launcher, on one node or several.

    The launcher is supervised. On Ctrl-C or SIGTERM the workflow has 15 s to close its sessions,
    then the runtime has 10 s to end; a second signal kills both. No process is left behind.
    """
    from .launch import launch

    sys.exit(launch(script, arguments, dragon, nodes, hosts, small_machine, image, host_socket))


@main.command("backends")
@as_json
def backends_command(as_json: bool) -> None:
    """List the backends, and how to install those that are missing."""
    from rhapsody.backends.discovery import discover_backends, install_hint

    from .reports import BackendRow, print_backends

    rows = [
        BackendRow(name, installed, None if installed else install_hint(name))
        for name, installed in discover_backends().items()
    ]
    if as_json:
        _print_json([row._asdict() for row in rows])
    else:
        print_backends(rows)


@main.command("doctor")
@as_json
def doctor_command(as_json: bool) -> None:
    """Examine this machine; exit with code 1 if there is a problem."""
    from .doctor import examine, report
    from .reports import print_findings

    findings = examine()
    if as_json:
        _print_json(report(findings))
    else:
        print_findings(findings)
    sys.exit(1 if any(finding.status == "problem" for finding in findings) else 0)


def _reject_nan(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if math.isnan(value):  # click finds it in any range
        raise click.BadParameter("nan is not a number.")
    return value


@main.command("bench")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Repetitions.")
@click.option(
    "--scale",
    type=click.FloatRange(0.0, 1000.0, min_open=True),  # above, memory does not hold the tasks
    callback=_reject_nan,
    default=1.0,
    show_default=True,
    help="Multiplies the number of tasks.",
)
@as_json
def bench_command(repeat: int, scale: float, as_json: bool) -> None:
    """Measure the cost of tasks here beside that of plain Python."""
    from .bench import WORKLOADS, measure
    from .reports import print_measurements, progress_bar

    with progress_bar(len(WORKLOADS)) as advance:
        measured = []
        for workload in WORKLOADS:
            measured.append(measure(workload, repeat=repeat, scale=scale))
            advance(workload.name)
    if as_json:
        _print_json([measurement.as_dict() for measurement in measured])
    else:
        print_measurements(measured)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))
