#!/usr/bin/env python3
"""Measure a recipe on this machine: speed, MFU and HFU, memory; a table for people, JSON for programs.

    python launchers/benchmark.py --recipe quickstart --ds_config ds_configs/zero2.json --json speed.json
    deepspeed launchers/benchmark.py --recipe albef_4m --ds_config ds_configs/zero2.json data.train='/data/*.tar' \\
        data.val='/data/val/*.tar' activation_checkpointing=selective

It trains for a few steps and leaves nothing behind. docs/benchmarks.md explains the figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the launchers also run from a bare checkout

from vlscale import console

UNITS = {
    "seconds_per_step": ("step", "s"),
    "samples_per_second": ("samples", "1/s"),
    "tokens_per_second": ("text tokens, all views", "1/s"),
    "data_wait_fraction": ("waiting for data", "of the step"),
    "cpu_seconds_per_step": ("processor time, rank 0", "s"),
    "model_tflops_per_second": ("model FLOPs", "TFLOP/s"),
    "hardware_tflops_per_second": ("hardware FLOPs", "TFLOP/s"),
    "mfu": ("MFU", "of the peak"),
    "hfu": ("HFU", "of the peak"),
}


def main(argv: list[str]) -> int:
    """Run it; returns the exit code."""
    parser = console.parser(__doc__)
    parser.add_argument("--recipe", default="quickstart", metavar="NAME|FILE", help="default: %(default)s")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", metavar="FILE", help="DeepSpeed JSON")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps that count; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=10, metavar="N", help="steps before them; default: %(default)s")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--against",
        default=None,
        metavar="bare",
        help="also time a bare DeepSpeed loop on the same model and batches, in turns, and give the ratio",
    )
    arguments = console.parse(parser, argv)
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        from vlscale.errors import ConfigError

        raise ConfigError(f"--json {arguments.json}: there is no such folder")
    from vlscale import config

    run = config.load(arguments.recipe, arguments.overrides)
    from vlscale import benchmark, build, distributed
    from vlscale.errors import DONE, STOPPED

    request = build.Request(run, arguments.ds_config, None)
    figures = benchmark.benchmark(request, steps=arguments.steps, warmup=arguments.warmup, against=arguments.against)
    if not figures:
        return STOPPED
    if distributed.rank() == 0:
        figures["command"] = [Path(sys.argv[0]).name, *argv]
        print(table(figures))
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    distributed.barrier()
    return DONE


def table(figures: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    machine = figures["machine"]
    lines = [
        f"{figures['recipe']}: {figures['family']} with {', '.join(figures['objectives'])}, "
        f"{figures['trainable_parameters'] / 1e6:.1f} M trainable parameters, ZeRO {figures['zero_stage']} "
        f"{figures['precision']}, activation checkpointing {figures['activation_checkpointing']}",
        f"{figures['ranks']} rank(s), batch {figures['batch']} in micro-batches of {figures['micro_batch']}, "
        f"{figures['steps']} steps after {figures['warmup']} for warm-up",
        f"{machine['device']}, {machine['threads']} thread(s), {machine['versions']}",
        "",
        f"{'':32}{'median':>12}{'p10':>12}{'p90':>12}",
    ]
    for name, (label, unit) in UNITS.items():
        lines.append(f"{label:32}{_three(figures[name])}  {unit}" if figures[name] else f"{label:32}{'unknown':>12}")
    for name in ("before", "peak", "growth"):
        lines.append(f"{'memory ' + name:32}{figures[f'memory_{name}_bytes'] / 2**20:>12.1f}  MiB")
    found = figures["against"]
    if found:
        lines += [
            "",
            f"against the {found['name']} loop, {found['pairs']} pair(s) of blocks of {found['steps_per_block']} steps",
            f"{'our step':32}{_three(found['ours_seconds_per_step'])}  s",
            f"{'bare step':32}{_three(found['bare_seconds_per_step'])}  s",
            f"{'ours / bare, pairs':32}{_three(found['ratio_of_pairs'])}",
            f"{'the same in processor time':32}{_three(found['cpu_ratio_of_pairs'])}",
            f"{'ours / bare, of the medians':32}{found['ratio']:>12.4f}",
        ]
    return "\n".join(lines)


def _three(values: Mapping[str, float]) -> str:
    return "".join(f"{values[name]:>12.4g}" for name in ("median", "p10", "p90"))


if __name__ == "__main__":
    console.run(main, sys.argv[1:], ranks=True)
