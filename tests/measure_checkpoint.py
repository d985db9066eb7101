"""`python -m tests.measure_checkpoint [--rounds N]`: how long a run waits for a checkpoint, beside a synchronous save.

Two processes train a recipe (SigLIP ViT-B/16: 203 M parameters) on the embedded pictures. Each round saves once in the
foreground and once in the background, interleaved; with `--train` the next steps are made meanwhile. Medians over
rounds, of the slowest rank.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.distributed.spawn import run_ranks
from vlscale.options import CheckpointConfig

FIGURES = ("synchronous save", "its processor time", "stall", "its processor time", "until it counts", "step meanwhile")
FIGURES = (*FIGURES, "step alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", default="siglip_vit_b16")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json")
    parser.add_argument("--out", default=None, help="a folder on the disk to measure; default: the temporary one")
    parser.add_argument("--train", action="store_true", help="steps while it is written, and one without")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    out = Path(tempfile.mkdtemp(dir=given.out))
    try:
        everyone = run_ranks(
            measure,
            given.ranks,
            *(given.recipe, given.ds_config, given.overrides, out, given.rounds, given.train),
            timeout=1500,
        )
    finally:
        shutil.rmtree(out)
    parameters, size, _ = everyone[0]
    print(f"{given.recipe}, {parameters / 1e6:.0f} M parameters, {given.ranks} processes, {size / 2**30:.2f} GiB")
    rounds = [
        [max(values) for values in zip(*of_ranks, strict=True)] for of_ranks in zip(*_rounds(everyone), strict=True)
    ]
    medians = [median(values) for values in zip(*rounds, strict=True)]
    for name, seconds, values in zip(FIGURES, medians, zip(*rounds, strict=True), strict=True):
        print(f"{name:24} {seconds:8.3f} s   ({', '.join(f'{value:.3f}' for value in values)})")
    print(f"stall / synchronous save: {medians[2] / medians[0]:.3f}, by processor time {medians[3] / medians[1]:.3f}")


def _rounds(everyone: list[Any]) -> list[Any]:
    return [rounds for _, _, rounds in everyone]


def measure(
    recipe: str, ds_config: str, overrides: list[str], out: Path, rounds: int, training: bool
) -> tuple[int, int, list[Any]]:
    """On each rank: parameters, bytes of a checkpoint, and per round the seconds of `FIGURES`."""
    from vlscale import build, config, distributed, train
    from vlscale.build import Request
    from vlscale.saving.background import Saved, Saver
    from vlscale.saving.targets import Folder

    data = ("data.train=embedded", "data.val=embedded", f"data.batch={distributed.world_size()}", "data.micro_batch=1")
    run = config.load(recipe, [*data, "data.workers=0", "steps=100000", *overrides])
    setting = build.setup(Request(run, ds_config, out / "run"))
    model = build.build_model(run)
    machine = build.build_engine(run, setting, model)
    steps = build.build_loader(run, setting, model).steps(0, run.steps)
    plans, vote = distributed.StepPlans(), distributed.StopVote()

    def step() -> float:
        number, batches = next(steps)
        began = time.perf_counter()
        train.one_step(run, model, machine, plans, number, batches)
        return time.perf_counter() - began

    def timed(saver: Saver, step: int) -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.thread_time()
        saver.start(step, machine.pieces(), {"step": step})
        return time.perf_counter() - wall, time.thread_time() - processor

    told: list[Saved] = []
    kept = Folder(out / "checkpoints")
    foreground = Saver(kept, CheckpointConfig(keep=1, background=False), told.append)
    background = Saver(kept, CheckpointConfig(keep=1), told.append)
    step()
    background.reserve(machine.pieces())
    found = []
    for number in range(rounds):
        alone = step() if training else 0.0
        distributed.barrier()
        synchronous = timed(foreground, 2 * number + 1)
        distributed.barrier()
        stall, meanwhile = timed(background, 2 * number + 2), list[float]()
        while background.busy:
            meanwhile.append(step() if training else 0.0)
            time.sleep(0.02)
            (behind,) = vote.agreed(-background.halves)
            background.go_on(-behind)
        total = told[-1].seconds if told else 0.0
        found.append((*synchronous, *stall, total, median(meanwhile), alone))
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters())
    return parameters, told[-1].bytes if told else 0, found


if __name__ == "__main__":
    main()
