"""What a job asks of a cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Literal

from vlscale.errors import ConfigError

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
LEAD = 120  # seconds, where the job is long enough for it
OURS = ("array", "chdir", "error", "no-requeue", "open-mode", "output")  # sbatch's
ELSEWHERE = {  # sbatch's, and which of our options says it
    r"(gpus|gpus-per-task|gpus-per-socket)(=.*)?|gres=.*\bgpu\b.*": "gpus_per_node",
    r"(n?tasks|ntasks-per-\w+)(=.*)?": "tasks_per_node",
}


@dataclass(frozen=True)
class JobOptions:
    """What is asked of Slurm and of the nodes; each field is an option of `slurm/submit.py` or a key of a profile."""

    nodes: int = 1
    gpus_per_node: int = 0  # 0: ranks on CPUs
    gpu_type: str | None = None  # the TYPE of --gpus_per_node TYPE:N
    tasks_per_node: int | None = None  # ranks; None = one per GPU, or one per node without GPUs
    cpus_per_task: int | None = None  # cores of a rank
    mem: str | None = None  # per node, as Slurm writes it: 200G
    time: str = "24:00:00"  # D-HH:MM:SS, HH:MM:SS or minutes
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    nodelist: str | None = None
    exclude: str | None = None
    comment: str | None = None
    job_name: str | None = None  # None = the recipe's name
    sbatch: tuple[str, ...] = ()  # further options of sbatch, KEY=VALUE or KEY
    srun: tuple[str, ...] = ()  # further options of the srun that starts the ranks, as it takes them
    cpu_bind: str | None = None  # of the ranks, as srun takes it: cores, none, ...
    interface: str | None = None  # network interface for Gloo's and NCCL's sockets
    signal: Literal["USR1", "USR2", "TERM"] = "USR2"  # that tells the ranks to save before the time limit
    lead: int | None = None  # seconds before the time limit; None = 120, or a quarter of a short job
    requeue: int = 100  # at most so many times
    on_node_loss: Literal["replace", "shrink", "end"] = "replace"
    parallel: int | None = None  # runs of a sweep at a time; None = all
    # of profiles alone
    modules: tuple[str, ...] = ()  # loaded before anything else
    environment: dict[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()  # shell lines after that
    container: tuple[str, ...] = ()  # words before `python` that bring a rank into its container
    python: str | None = None  # of the ranks, as the nodes or the container know it; None = the one that submits

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus(self) -> str | None:
        """Those of a node, as Slurm takes them: 4, or a100:4."""
        if not self.gpus_per_node:
            return None
        return f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else str(self.gpus_per_node)

    @property
    def minutes(self) -> int:
        """The time limit, rounded up to Slurm's unit."""
        return -(-seconds(self.time) // 60)

    @property
    def lead_seconds(self) -> int:
        """How long before the time limit the ranks are told."""
        return self.lead if self.lead is not None else min(LEAD, self.minutes * 15)


def seconds(time: str) -> int:
    """Slurm's notation of a time: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        ConfigError: it is none of these, or zero.
    """
    found = TIME.fullmatch(time.strip())
    days, *parts = found.groups() if found else (None,)
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, rest = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, rest = numbers
    else:
        hours, (minutes, rest) = 0, (*numbers, 0, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
    if found is None or total == 0:
        raise ConfigError(f"--time {time} is no time; write minutes, HH:MM:SS or D-HH:MM:SS, e.g. 24:00:00")
    return total


def check(options: JobOptions) -> None:
    """ConfigError for values that cannot be."""
    least = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "parallel": 1, "gpus_per_node": 0, "requeue": 0}
    for name, at_least in {**least, "lead": 1}.items():
        value = getattr(options, name)
        if value is not None and value < at_least:
            raise ConfigError(f"--{name} should be at least {at_least} (got {value})")
    if options.gpus_per_node and options.ranks_per_node > options.gpus_per_node:
        raise ConfigError(
            f"--tasks_per_node {options.ranks_per_node} is more than --gpus_per_node {options.gpus_per_node}; "
            f"a rank needs a GPU of its own"
        )
    if options.lead_seconds >= options.minutes * 60:
        raise ConfigError(
            f"--lead {options.lead_seconds} s is all of --time {options.time}; the ranks would be told to save at once"
        )
    for word in options.sbatch:
        if word.startswith("-") or not re.fullmatch(r"[A-Za-z][\w-]*(=.*)?", word):
            raise ConfigError(f"--sbatch {word}: write KEY=VALUE or KEY without dashes, e.g. mail-type=END")
        key, option = word.split("=")[0], word.split("=")[0].replace("-", "_")
        if option in (each.name for each in fields(JobOptions)):
            raise ConfigError(f"--sbatch {word}: slurm/submit.py has an option {option} of its own; write that one")
        if ours := next((name for pattern, name in ELSEWHERE.items() if re.fullmatch(pattern, word)), None):
            raise ConfigError(f"--sbatch {word}: slurm/submit.py has an option {ours} of its own; write --{ours}")
        if key in OURS:
            raise ConfigError(f"--sbatch {word}: slurm/submit.py sets {key} itself; leave it out")
    for name in options.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"environment: '{name}' is no name of an environment variable")
