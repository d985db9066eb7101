"""A stand-in for training: short steps with one collective each, a loader worker, and the stop guard.

Run under a launcher: `deepspeed --num_accelerators 2 tests/distributed/loop.py FOLDER [hang]`. Each rank
leaves `rank_<r>.pid` in FOLDER once it steps, and `rank_<r>.saved` when it has "saved". With `hang`, rank 1
stops taking part after 10 steps, and rank 0 waits for it for ever.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

from vlscale import console
from vlscale.errors import DONE, STOPPED
from vlscale.stop import StopGuard, shield_worker, worker_processes

DEADLINE = 6.0


def lock_name(folder: Path) -> str:
    """How the names of a launch's locks in shared memory begin."""
    return f"mp-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode", nargs="?", default="step")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args(argv)
    return run(StopGuard(deadline=DEADLINE), arguments.folder, arguments.mode)


def run(guard: StopGuard, folder: Path, mode: str) -> int:
    import torch
    from torch.utils.data import DataLoader

    from vlscale import distributed

    torch.set_num_threads(1)
    multiprocessing.current_process()._config["semprefix"] = f"/{lock_name(folder)}"  # type: ignore[attr-defined]
    distributed.init()
    rank = distributed.rank()
    vote = distributed.StopVote()
    samples = iter(
        DataLoader(
            range(10**6),  # type: ignore[arg-type]
            num_workers=1,
            worker_init_fn=shield_worker,
            multiprocessing_context=worker_processes("torch.utils.data"),
        )
    )
    for step in range(1200):
        next(samples)
        time.sleep(0.05)
        if mode == "hang" and rank == 1 and step == 10:
            time.sleep(600)
        if any(vote.agreed(guard.requested)):
            (folder / f"rank_{rank}.saved").write_text(f"step {step}: {guard.reason}")
            return STOPPED
        if step == 3:
            part = folder / f"rank_{rank}.part"
            part.write_text(str(os.getpid()))
            part.rename(folder / f"rank_{rank}.pid")
    return DONE


if __name__ == "__main__":
    console.run(main, sys.argv[1:])
