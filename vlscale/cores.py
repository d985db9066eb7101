"""The cores of a machine, shared among the ranks on it."""

from __future__ import annotations

import os

import torch


def share() -> None:
    """Give this rank's arithmetic its share of the cores, where nobody has said how many."""
    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return
    torch.set_num_threads(of_a_rank())


def workers(given: int | None) -> int:
    """Loader processes of a rank; `given`: as the run asks."""
    if given is not None:
        return given
    if not torch.cuda.is_available():
        return 0  # the step needs every core itself; decoding overlaps it in a thread
    return max(1, min(8, of_a_rank() - 1))  # one is left to the step


def of_a_rank() -> int:
    """A rank's share of the cores that this process may run on, which a scheduler may have cut down to it already."""
    cores = len(os.sched_getaffinity(0))
    if cores <= _of_a_task():
        return cores
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, cores // ranks_here)


def _of_a_task() -> int:
    """Cores that Slurm was asked for per task, where ranks are tasks; else 0."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
    are_ranks = tasks is not None and tasks == os.environ.get("WORLD_SIZE")
    return int(os.environ.get("SLURM_CPUS_PER_TASK", "0")) if are_ranks else 0
