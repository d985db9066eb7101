"""A real Slurm cluster on one machine: munged, MariaDB, slurmdbd, slurmctld and one slurmd for each node.

All of it lives in one temporary folder and listens on free ports of loopback addresses; it needs root and the
Debian packages of `PACKAGES`, and touches no file at the default places.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

PACKAGES = {  # program -> Debian package
    **{"munged": "munge", "mariadbd": "mariadb-server", "slurmdbd": "slurmdbd"},
    **{"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"},
}
SYSTEM = ("/usr/sbin", "/sbin")
OUT = {"down", "down*", "unknown", "unknown*", "drained", "drained*", "draining"}  # states of nodes that take no job
Answer = TypeVar("Answer")
MACHINE = str(Path(__file__).with_name("machine.py"))

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={slurmctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/logs/slurmctld
SlurmdLogFile={folder}/logs/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
FirstJobId={first}
SlurmdTimeout=10
MessageTimeout=5
InactiveLimit=0
KillWait=30
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={slurmdbd}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN"

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr={address}
DbdPort={slurmdbd}
CommunicationParameters=NoInAddrAny
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/logs/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
"""


class ClusterError(RuntimeError):
    """Why there is no cluster, or what it did not do in time."""


def missing() -> str:
    """Why this machine cannot have one, in a sentence; empty if it can."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root"
    absent = sorted({package for program, package in PACKAGES.items() if _which(program) is None})
    return f"a Slurm cluster for tests needs the Debian packages {' '.join(absent)}" if absent else ""


class Cluster:
    """Started on entering, gone on leaving."""

    def __init__(self, nodes: int = 4) -> None:
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.folder = Path()
        self._machines: dict[str, subprocess.Popen[bytes]] = {}  # by the daemon's name, a slurmd's being its node's
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """All daemons up and all nodes idle, or `ClusterError` and nothing left."""
        if reason := missing():
            raise ClusterError(reason)
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        try:
            self._configure()
            self._start_daemons()
            self.idle(30)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process, jobs' included, and remove the folder."""
        for machine in self._machines.values():
            _close(machine)
        while self._machines:
            self._machines.popitem()[1].wait(timeout=30)
        if self.folder != Path():
            shutil.rmtree(self.folder)
            self.folder = Path()

    def environment(self) -> dict[str, str]:
        """For commands that talk to this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, timeout: float = 30, cwd: Path | None = None) -> str:
        """What a command printed; `ClusterError` if it failed."""
        done = subprocess.run(
            command, env=self.environment(), cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode != 0:
            raise ClusterError(
                f"{' '.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}"
            )
        return done.stdout

    def job(self, job: str | int) -> dict[str, str]:
        """What `scontrol show job` says of one job."""
        words = re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", self.run("scontrol", "show", "job", str(job)))
        return dict(words)

    def wait(self, job: str | int, states: str | Collection[str], timeout: float = 30) -> dict[str, str]:
        """Until the job is in one of the states (`JobState` of scontrol's); what is then known of it."""
        wanted = {states} if isinstance(states, str) else set(states)
        return self._until(
            lambda: found if (found := self.job(job))["JobState"] in wanted else {},
            timeout,
            lambda: f"job {job} is {self.job(job)['JobState']}, not {' or '.join(sorted(wanted))}",
        )

    def kill_node(self, node: str, notice: bool = False) -> None:
        """Kill its slurmd and all of its jobs' processes at once, as a power cut would.

        The controller finds out by itself after some 17 s; with `notice` it is told at once, as a monitor would.
        """
        machine = self._machines.pop(node)
        _close(machine)
        machine.wait(timeout=30)
        if notice:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def start_node(self, node: str, timeout: float = 30) -> None:
        """Bring a killed node back into service."""
        self._start(node, "slurmd", "-D", "-N", node)
        self._until(lambda: self._serves(node), timeout, lambda: f"{node} is {' '.join(self._states(node))}")

    def restore(self) -> None:
        """Cancel what is left, start the nodes that were killed and wait until all are idle."""
        self._works("scancel", "--user=root", "--full", "--signal=KILL")
        self.run("scancel", "--user=root")
        for node in self.failed():
            self.start_node(node)
        for node in self.nodes:
            self._serves(node)
        self.idle()

    def failed(self) -> list[str]:
        """Nodes whose slurmd has ended."""
        return [node for node in self.nodes if node not in self._machines or self._machines[node].poll() is not None]

    def processes(self) -> list[psutil.Process]:
        """Every daemon and every process of a job, but no command that a test itself has started."""
        found = [psutil.Process(machine.pid) for machine in self._machines.values() if machine.poll() is None]
        return [process for machine in found for process in (machine, *machine.children(recursive=True))]

    def idle(self, timeout: float = 60) -> None:
        """Until no job is left and every node is idle."""
        self._until(
            lambda: not self.run("squeue", "--noheader") and self._states() == {"idle"},
            timeout,
            lambda: f"the cluster is not idle: {self.run('sinfo', '--Node')}{self.run('squeue')}",
        )

    @property
    def _database(self) -> Path:
        return self.folder / "mariadb.socket"

    def _configure(self) -> None:
        names = ["slurmdbd", "slurmctld", *self.nodes]
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self.folder.chmod(0o755)  # munged wants its socket to be in reach of all
        for each in ("logs", "state", "spool", "mariadb"):
            (self.folder / each).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().split(".")[0]
        try:
            address = socket.gethostbyname(host)  # where NoInAddrAny lets daemons listen
        except OSError:
            raise ClusterError(
                f"this machine's name {host} has no address; write '127.0.0.1 {host}' into /etc/hosts"
            ) from None
        nodes = (NODE.format(name=name, host=host, address=address, port=self._ports[name]) for name in self.nodes)
        named = {"folder": self.folder, "host": host, "address": address, "nodes": "\n".join(nodes)}
        first = random.randint(1, 4000)  # rendezvous ports come from job numbers: two clusters have others
        values = {**named, **self._ports, "first": first}
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        accounting = self.folder / "slurmdbd.conf"
        accounting.touch(mode=0o600)
        accounting.write_text(SLURMDBD_CONF.format(**values))

    def _start_daemons(self) -> None:
        munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        places = [f"--{name}={self.folder / file}" for name, file in munge.items()]
        self._start(
            "munged", "munged", "--foreground", "--force", f"--log-file={self.folder / 'logs' / 'munge'}", *places
        )
        self._start(
            *("mariadbd", "mariadbd", "--no-defaults", "--user=root", "--skip-grant-tables", "--skip-networking"),
            *(f"--datadir={self.folder / 'mariadb'}", f"--socket={self._database}"),
            *(f"--pid-file={self.folder}/mariadb.pid", "--innodb-lock-wait-timeout=900", "--max-connections=40"),
            *("--innodb-buffer-pool-size=24M", "--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0"),
        )
        self._until(lambda: _answers(self._database), 60, lambda: self._why("mariadbd"))
        self._start("slurmdbd", "slurmdbd", "-D")
        self._until(lambda: self._works("sacctmgr", "-i", "add", "cluster", "test"), 60, lambda: self._why("slurmdbd"))
        self._start("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self._start(node, "slurmd", "-D", "-N", node)
        self._until(lambda: self._works("sinfo"), 60, lambda: self._why("slurmctld"))

    def _start(self, name: str, program: str, *arguments: str) -> None:
        with (self.folder / "logs" / f"{name}.out").open("ab") as log:
            self._machines[name] = subprocess.Popen(
                [sys.executable, MACHINE, str(self.folder), str(_which(program)), *arguments],
                cwd=self.folder,
                env={**self.environment(), "MYSQL_UNIX_PORT": str(self._database)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt at a terminal is for us alone
            )

    def _until(self, wanted: Callable[[], Answer], timeout: float, otherwise: Callable[[], str]) -> Answer:
        """What it says once it is true; a daemon that has died meanwhile ends the waiting."""
        end = time.monotonic() + timeout
        while not (answer := wanted()):
            for name, machine in self._machines.items():
                if machine.poll() is not None:
                    raise ClusterError(self._why(name))
            if time.monotonic() > end:
                raise ClusterError(f"after {timeout:.0f} s: {otherwise()}")
            time.sleep(0.1)
        return answer

    def _why(self, name: str) -> str:
        """The last that a daemon has said."""
        lines = [
            line
            for file in (self.folder / "logs" / f"{name}.out", self.folder / "logs" / name)
            for line in (file.read_text(errors="replace").splitlines() if file.exists() else [])
        ]
        bad = [line for line in lines if re.search("fatal|error", line, re.IGNORECASE)]
        said = (bad or lines or ["nothing"])[-1]
        return f"{name} does not work; it said: {said}"

    def _works(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment(), capture_output=True, check=False).returncode == 0

    def _states(self, node: str = "") -> set[str]:
        only = ["--nodes", node] if node else []
        return set(self.run("sinfo", "--noheader", "--Node", "--format=%T", *only).split())

    def _serves(self, node: str) -> bool:
        """Whether it takes jobs; one that does not is asked to."""
        serves = not self._states(node) & OUT
        if not serves:
            self._works("scontrol", "update", f"nodename={node}", "state=resume")
        return serves


def _close(machine: subprocess.Popen[bytes]) -> None:
    """Ask for its end; not if it has come."""
    assert machine.stdin is not None
    with suppress(BrokenPipeError), machine.stdin as words:
        words.write(b".")


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM]))


def _answers(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(place)) == 0


def _free_ports(number: int) -> list[int]:
    """Below those that the kernel gives to whoever asks for any."""
    return [port for port in random.sample(range(20000, 32000), 10 * number) if _free(port)][:number]


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
