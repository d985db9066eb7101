"""Slurm's tasks as ranks: `srun python launchers/pretrain.py`, with no other launcher between."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Collection, Mapping

from vlscale.errors import ConfigError

FIRST_PORT, PORTS = 15_000, 15_000  # below those that Linux gives to whoever asks for any (from 32768)
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_A_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # set by Slurm for each task


def for_sbatch(given: Mapping[str, str], asked: Collection[str]) -> dict[str, str]:
    """An environment to submit from: nothing of a job that this shell is in, nor what would go over what is `asked`.

    `asked` has names of sbatch's options as its variables have them, SBATCH_PARTITION for --partition.
    """
    inside = "SLURM_JOB_ID" in given
    return {
        name: value
        for name, value in given.items()
        if not (inside and name.startswith("SLURM_") and name not in OF_A_SITE)
        and name not in OF_A_RANK
        and name not in {f"SBATCH_{each.upper()}" for each in asked}
    }


def adopt() -> None:
    """Make this process the rank that Slurm has started it as; see `of_task`."""
    os.environ.update(of_task(os.environ))


def address_of(node: str) -> str:
    """A node of Slurm's as other nodes reach it: its name where that resolves, else the address that Slurm knows.

    Raises:
        ConfigError: neither is to be had.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        found = re.search(r"\bNodeAddr=(\S+)", _said_by_slurm("show", "node", node))
    if found is None:
        raise ConfigError(
            f"no address is known of node {node}, where rank 0 of this Slurm step runs; "
            f"export MASTER_ADDR=ADDRESS before srun"
        )
    return found.group(1)


def of_task(given: Mapping[str, str], address: Callable[[str], str] = address_of) -> dict[str, str]:
    """What torch and DeepSpeed ask of a launcher, for a task of a Slurm step of several tasks; as far as not `given`.

    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Empty in a batch script, in a step of
    one task, and where a launcher (torchrun, deepspeed) has set RANK. The port differs from step to step and from one
    start of a requeued job to the next, and LOCAL_RANK is 0 where Slurm shows each task a GPU of its own.

    Raises:
        ConfigError: Slurm's variables are incomplete or contradict what is `given`; rank 0's node has no address.
    """
    tasks = given.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "RANK" in given:
        return {}
    if given.get("WORLD_SIZE", tasks) != tasks:
        raise ConfigError(f"WORLD_SIZE is {given['WORLD_SIZE']}, but this Slurm step has {tasks} tasks; unset it")
    here = _tasks_on(int(_slurm(given, "NODEID")), _slurm(given, "STEP_TASKS_PER_NODE"))
    ranks = {"RANK": _slurm(given, "PROCID"), "WORLD_SIZE": tasks, "LOCAL_WORLD_SIZE": str(here)}
    ranks["LOCAL_RANK"] = "0" if _has_own_gpu(given) else _slurm(given, "LOCALID")
    if "MASTER_ADDR" not in given:
        ranks["MASTER_ADDR"] = address(first_node(_slurm(given, "STEP_NODELIST")))
    if "MASTER_PORT" not in given:
        job, step, starts = _slurm(given, "JOB_ID"), _slurm(given, "STEP_ID"), given.get("SLURM_RESTART_COUNT", "0")
        ranks["MASTER_PORT"] = str(port(int(job), int(step), int(starts)))
    return {name: value for name, value in ranks.items() if name not in given}


def port(job: int, step: int, starts: int) -> int:
    """Where rank 0 listens: another one for the next job, the next step of a job and the next start of a job."""
    return FIRST_PORT + (job + 977 * step + 7919 * starts) % PORTS


def free(port: int) -> int:
    """This port, or the next that nobody listens on here, where rank 0 will listen."""
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return port
            except OSError:
                port = FIRST_PORT + (port + 1 - FIRST_PORT) % PORTS


def first_node(nodes: str) -> str:
    """Of Slurm's list of names: `gpu[08-11,14],cpu1` -> `gpu08`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # of any text
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def _slurm(given: Mapping[str, str], name: str) -> str:
    if value := given.get(f"SLURM_{name}"):
        return value
    raise ConfigError(
        f"this is one of {given['SLURM_STEP_NUM_TASKS']} tasks of a Slurm step, but SLURM_{name} is not set; let srun "
        f"pass on its environment (a container may keep it back), or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
        f"MASTER_PORT"
    )


def _tasks_on(node: int, per_node: str) -> int:
    """Of `4(x2),3`: 4, 4 and 3 tasks."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(count)] * int(times or 1)
    return counts[node]


def _has_own_gpu(given: Mapping[str, str]) -> bool:
    """Whether this task sees one GPU of its node's several, which is number 0 whatever the task's number is."""
    shown = next((given[name] for name in GPUS if name in given), "")
    return len(shown.split(",")) == 1 and shown != "" and given.get("SLURM_GPUS_ON_NODE") != "1"


def _said_by_slurm(*words: str) -> str:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
