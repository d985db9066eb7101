"""What Slurm's own commands say."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

from vlscale.errors import ConfigError, did_you_mean

PATIENCE = 60  # seconds for a command of Slurm's
OVER = (  # PREEMPTED: and not put back
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"),
    *("BOOT_FAIL", "REVOKED"),
)
GONE = frozenset({"DOWN", "NOT_RESPONDING", "FAIL", "POWERED_DOWN", "UNKNOWN"})  # of the states of a node
UNKNOWN = "Invalid job id"  # what scontrol says of a job that Slurm has forgotten, or never had


class SlurmError(ConfigError):
    """A command of Slurm's fails, or does not answer."""


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return all(shutil.which(name) for name in ("sbatch", "srun", "squeue", "scontrol"))


def need(otherwise: str = "") -> None:
    """ConfigError on a machine without Slurm."""
    if not is_here():
        raise ConfigError(f"this machine has no Slurm (sbatch is not found); run it on a login node{otherwise}")


def check(partition: str | None, nodes: int) -> None:
    """Whether jobs of so many nodes can be queued in this partition.

    Raises:
        ConfigError: they cannot; SlurmError if Slurm cannot be asked.
    """
    listed = [
        line.split()
        for line in ask(["sinfo", "--all", "--summarize", "--noheader", "--noconvert", "--format=%P %F"]).splitlines()
    ]
    sizes = {name.rstrip("*"): int(counts.split("/")[-1]) for name, counts in listed}  # allocated/idle/other/all
    asked = partition.split(",") if partition else [name.rstrip("*") for name, _ in listed if name.endswith("*")]
    for each in asked:
        if each not in sizes:
            raise ConfigError(f"--partition {each}: this cluster has none of that name{did_you_mean(each, sizes)}")
    most = max((sizes[each] for each in asked), default=nodes)
    if nodes > most:
        raise ConfigError(f"--nodes {nodes}: partition {', '.join(asked)} has {most}; ask for so many or fewer")


def has_gpus(partition: str | None) -> bool:
    """Whether nodes of the partition, or of the default one, have GPUs."""
    asked = [f"--partition={partition}"] if partition else []
    listed = [line.split() for line in ask(["sinfo", "--noheader", "--format=%P %G", *asked]).splitlines()]
    return any(re.search(r"\bgpu\b", kinds) for name, kinds in listed if partition or name.endswith("*"))


def ask(words: Sequence[str]) -> str:
    """What a command prints.

    Raises:
        SlurmError: it fails; says what it said last.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{words[0]} does not answer ({error}); is this a login node of a Slurm cluster?") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        asks = "" if words[0] == "scancel" else "; is this a login node of a Slurm cluster?"
        raise SlurmError(f"{words[0]} failed: {said}{asks}")
    return done.stdout


def job(number: str) -> dict[str, str]:
    """What `scontrol show job` says; empty if Slurm does not know it any more, or does not answer."""
    try:
        return _shown(number)
    except SlurmError:
        return {}


def state(number: str) -> str:
    """PENDING, RUNNING, COMPLETED, ...; empty if nobody knows the job.

    Raises:
        SlurmError: the scheduler does not answer.
    """
    if said := _shown(number).get("JobState"):
        return said
    try:  # forgotten by the scheduler, kept by the accounts
        listed = ask(["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", number, "--format=State"])
    except SlurmError:
        return ""
    states = [line.split()[0] for line in listed.splitlines() if line.strip()]
    return states[-1] if states else ""


def _shown(number: str) -> dict[str, str]:
    try:
        text = ask(["scontrol", "--oneliner", "show", "job", number])
    except SlurmError as error:
        if UNKNOWN in str(error):
            return {}
        raise
    return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", text.splitlines()[0])) if text.strip() else {}


def is_gone(node: str) -> bool:
    """Whether Slurm knows that a node does not answer; False where it cannot be asked."""
    try:
        found = re.search(r"\bState=(\S+)", ask(["scontrol", "show", "node", node]))
    except SlurmError:
        return False
    return found is not None and not GONE.isdisjoint(re.split(r"[+*]", found.group(1)))
