"""A Slurm of several nodes on one host: one controller, and a slurmd per node by ``-N``.

Everything lies in one folder, listens on loopback on free ports, and ends with the test run; what a
killed run left is swept by the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import machine

_CONF = """
ClusterName=rhapsody
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=5
MinJobAge=60
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs={cpus} \
RealMemory={memory} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm; its commands find it by ``SLURM_CONF``."""

    folder: Path

    @property
    def conf(self) -> str:
        """The path of its configuration."""
        return str(self.folder / "slurm.conf")

    def run(self, *command: str) -> str:
        """Run one of its commands, and return what it printed."""
        env = {**os.environ, "SLURM_CONF": self.conf}
        return subprocess.run(
            command, env=env, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    def jobs(self) -> list[str]:
        """Ids of the jobs that are queued or run."""
        return self.run("squeue", "-h", "-o", "%A").split()

    def logs(self) -> str:
        """The last words of all daemons."""
        files = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"{f.name}:\n{f.read_text(errors='replace')[-1500:]}" for f in files)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _configure(folder: Path, nodes: int, cpus: int, memory: int) -> None:
    for name in ("state", "log", "spool", "munge", *(f"spool/n{n + 1}" for n in range(nodes))):
        (folder / name).mkdir(mode=0o700 if name == "munge" else 0o755)
    folder.chmod(0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    port, *ports = _free_ports(1 + nodes)
    (folder / "slurm.conf").write_text(
        _CONF.format(
            host=socket.gethostname().partition(".")[0],
            port=port,
            ports=",".join(map(str, ports)),
            user="root" if os.geteuid() == 0 else os.environ.get("USER", ""),
            folder=folder,
            nodes=nodes,
            cpus=cpus,
            memory=memory,
        )
    )


@contextlib.contextmanager
def running(
    ledger: machine.Ledger, nodes: int = 2, cpus: int = 2, memory: int = 4096
) -> Iterator[Slurm]:
    """A Slurm with idle nodes.

    Args:
        ledger: where its processes are recorded.
        nodes: how many nodes.
        cpus, memory: CPUs and MiB that each claims to have.
    """
    folder = Path(tempfile.mkdtemp(prefix="rhapsody-slurm-"))
    slurm = Slurm(folder)
    _configure(folder, nodes, cpus, memory)
    (ledger.folder / "slurm").write_text(str(folder))
    munge = folder / "munge"
    commands = [
        [
            "munged", "--foreground", "--force", f"--key-file={munge}/key",
            f"--socket={folder}/munge.socket", f"--pid-file={munge}/pid",
            f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        ],
        ["slurmctld", "-D", "-c", "-f", slurm.conf],
        *(["slurmd", "-D", "-f", slurm.conf, "-N", f"n{n + 1}"] for n in range(nodes)),
    ]  # fmt: skip
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / "log" / f"{command[0]}-{len(daemons)}.out").open("wb") as out:
                daemon = subprocess.Popen(
                    [machine.which(command[0]) or command[0], *command[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            daemons.append(daemon)
            ledger.add_process(daemon.pid)
            if command[0] == "munged":
                machine.until((folder / "munge.socket").exists, 10, "munged")
        try:
            machine.until(lambda: _idle(slurm) == nodes, 60, "idle nodes", 0.3)
        except TimeoutError as error:
            raise RuntimeError(f"Slurm did not come up:\n{slurm.logs()}") from error
        yield slurm
    finally:
        _cancel_all(slurm)
        for daemon in reversed(daemons):
            ledger.stop(daemon.pid)
            daemon.wait(10)
        (ledger.folder / "slurm").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _idle(slurm: Slurm) -> int:
    try:
        return len(slurm.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())
    except (subprocess.SubprocessError, OSError):
        return 0


def _cancel_all(slurm: Slurm) -> None:
    """End the jobs, which are no children of ours."""
    with contextlib.suppress(subprocess.SubprocessError, OSError, TimeoutError):
        for job in slurm.jobs():
            slurm.run("scancel", job)
        machine.until(lambda: not slurm.jobs(), 30, "jobs to end", 0.3)


def sweep(ledger: machine.Ledger) -> None:
    """End the jobs of a Slurm that a killed run left; its daemons are in the ledger."""
    entry = ledger.folder / "slurm"
    if entry.exists():
        slurm = Slurm(Path(entry.read_text()))
        if Path(slurm.conf).exists():
            _cancel_all(slurm)
        shutil.rmtree(slurm.folder, ignore_errors=True)
        entry.unlink()
