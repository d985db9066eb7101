#!/usr/bin/env python3
"""Pretrain a vision-language model: the main job.

    deepspeed launchers/pretrain.py --ds_config ds_configs/zero2.json
    deepspeed launchers/pretrain.py --ds_config ds_configs/zero3.json --recipe albef_4m \\
        data.train='/data/coco-*.tar' data.val='/data/coco-val-*.tar' text.vocab=/models/bert-base-uncased
    deepspeed launchers/pretrain.py --replay runs/mine:1234

Also started by `python`, `torchrun` or `srun python`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the launchers also run from a bare checkout

from vlscale import console
from vlscale.errors import ConfigError

OF_A_RUN = ("--recipe", "--ds_config", "--out", "--resume", "--dry_run")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `key=value` words are overrides of the recipe."""
    parser = console.parser(__doc__)
    parser.add_argument("--recipe", default="quickstart", metavar="NAME|FILE", help="default: %(default)s")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", metavar="FILE", help="DeepSpeed JSON")
    parser.add_argument("--out", default=None, metavar="DIR", help="run folder; default runs/<recipe>-<date>-<time>")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|CHECKPOINT",
        help="auto: go on where --out stopped; never: refuse a folder that holds a run; or a checkpoint to start from",
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, do not train")
    parser.add_argument("--replay", metavar="RUN:STEP", help="make one step of a run again and say what broke it")
    parser.add_argument("--json", metavar="FILE", help="with --replay: what was found, for programs")
    return console.parse(parser, argv)


def main(argv: list[str]) -> int:
    """Run it; returns the exit code."""
    arguments = parse(argv)
    if arguments.replay is not None:
        if odd := next((word for word in argv if word.split("=")[0] in OF_A_RUN), None):
            raise ConfigError(f"{odd} does not go with --replay, which reads all of that in the run folder")
        leave = [word for word in arguments.overrides if word.startswith("data.pipe=")]
        arguments.overrides = [word for word in arguments.overrides if word not in leave]
        console.no_overrides(arguments)
        from vlscale import replay

        return replay.show(arguments.replay, arguments.json, leave)
    if arguments.json is not None:
        raise ConfigError("--json goes with --replay; a run's figures are in its metrics.jsonl")
    from vlscale import config

    run = config.load(arguments.recipe, arguments.overrides)
    from vlscale import build, plan, train

    out = Path(arguments.out) if arguments.out is not None else None
    request = build.Request(run, arguments.ds_config, out, arguments.resume)
    if arguments.dry_run:
        return plan.show(request)
    return train.train(request)


if __name__ == "__main__":
    console.run(main, sys.argv[1:], ranks=True)
