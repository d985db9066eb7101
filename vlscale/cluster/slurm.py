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


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return all(shutil.which(name) for name in ("sbatch", "srun", "squeue", "scontrol"))


def check(partition: str | None, nodes: int) -> None:
    """ConfigError unless jobs of so many nodes can be queued from here, in this partition."""
    if not is_here():
        raise ConfigError(
            "this machine has no Slurm (sbatch is not found); run it on a login node, or give --local N to run here, "
            "or --dry_run to see the script"
        )
    listed = [
        line.split() for line in ask(["sinfo", "--all", "--summarize", "--noheader", "--format=%P %F"]).splitlines()
    ]
    sizes = {name.rstrip("*"): int(counts.split("/")[-1]) for name, counts in listed}  # allocated/idle/other/all
    asked = partition.split(",") if partition else [name.rstrip("*") for name, _ in listed if name.endswith("*")]
    for each in asked:
        if each not in sizes:
            raise ConfigError(f"--partition {each}: this cluster has none of that name{did_you_mean(each, sizes)}")
    most = max((sizes[each] for each in asked), default=nodes)
    if nodes > most:
        raise ConfigError(f"--nodes {nodes}: partition {', '.join(asked)} has {most}; ask for so many or fewer")


def ask(words: Sequence[str]) -> str:
    """What a command prints.

    Raises:
        ConfigError: it fails; says what it said.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{words[0]} does not answer ({error}); is this a login node of a Slurm cluster?") from None
    if done.returncode:
        raise ConfigError(f"{words[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def job(number: str) -> dict[str, str]:
    """What `scontrol show job` says; empty if Slurm does not know it any more, or does not answer."""
    try:
        text = ask(["scontrol", "--oneliner", "show", "job", number])
    except ConfigError:
        return {}
    return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", text.splitlines()[0])) if text.strip() else {}


def state(number: str) -> str:
    """PENDING, RUNNING, COMPLETED, ...; empty if nobody knows the job."""
    if said := job(number).get("JobState"):
        return said
    try:  # forgotten by the scheduler, kept by the accounts
        listed = ask(["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", number, "--format=State"])
    except ConfigError:
        return ""
    states = [line.split()[0] for line in listed.splitlines() if line.strip()]
    return states[-1] if states else ""


def is_gone(node: str) -> bool:
    """Whether Slurm knows that a node does not answer; False where it cannot be asked."""
    try:
        found = re.search(r"\bState=(\S+)", ask(["scontrol", "show", "node", node]))
    except ConfigError:
        return False
    return found is not None and not GONE.isdisjoint(re.split(r"[+*]", found.group(1)))
