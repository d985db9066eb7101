#!/usr/bin/env python3
"""Run launchers/pretrain.py on a Slurm cluster: checked here, queued, started on all nodes, put back when stopped.

    python slurm/submit.py --nodes 4 --gpus_per_node 8 --time 24:00:00 -- --ds_config ds_configs/zero2.json
    python slurm/submit.py --nodes 4 --follow -- --ds_config ds_configs/zero2.json --recipe quickstart steps=40
    python slurm/submit.py --nodes 2 --sweep optim.lr=1e-4,3e-4 seed=1,2 -- --recipe albef_tiny
    python slurm/submit.py --local 2 -- --recipe quickstart steps=40
    python slurm/submit.py status|logs|follow|cancel|requeue RUN

What follows `--` is for launchers/pretrain.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, installed or not

from launchers import pretrain
from vlscale import console
from vlscale.cluster.options import JobOptions
from vlscale.errors import ConfigError, did_you_mean

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("status", "logs", "follow", "cancel", "requeue")
PROFILES = ROOT / "slurm" / "clusters"
OF_PROFILES = ("gpu_type", "modules", "environment", "setup", "container", "python")
OF_SLURM = {"-N": "nodes", "-p": "partition", "-t": "time", "-A": "account", "-q": "qos", "-J": "job_name"}
OF_SLURM |= {"-n": "tasks_per_node", "-c": "cpus_per_task", "-C": "constraint", "-w": "nodelist", "-x": "exclude"}
EPILOG = """\
A profile (--cluster) has these options as its keys, and modules, environment, setup, container and python:
docs/cluster.md and slurm/clusters/gpu.yaml explain them.
"""
HELP = {
    "nodes": "default: 1",
    "gpus_per_node": "4, or a100:4 for those of a type: one rank per GPU; default: none, one rank per node on its CPUs",
    "tasks_per_node": "ranks of a node, where that is not one per GPU",
    "cpus_per_task": "cores of a rank",
    "mem": "memory of a node, e.g. 200G",
    "time": "D-HH:MM:SS, HH:MM:SS or minutes; default: 24:00:00",
    "partition": "where the job waits; `sinfo` lists them; default: the cluster's own",
    "account": "who pays",
    "qos": "quality of service",
    "constraint": "features that nodes must have, e.g. 'a100|h100'",
    "reservation": "nodes that are reserved under this name",
    "exclusive": "whole nodes, for this job alone",
    "nodelist": "these nodes among others, e.g. node[1-4]",
    "exclude": "not these nodes",
    "comment": "kept with the job",
    "job_name": "default: the recipe's name",
    "sbatch": "another option of sbatch, KEY=VALUE or KEY; may be repeated",
    "srun": "another option of the srun that starts the ranks; may be repeated: --srun=--mpi=none",
    "cpu_bind": "how srun binds ranks to cores, e.g. cores",
    "interface": "network interface of Gloo's and NCCL's sockets, e.g. ib0",
    "signal": "tells the ranks to save before the time is over; default: USR2",
    "lead": "seconds before the time limit; default: 120, or a quarter of a job under 8 minutes",
    "requeue": "how often the job may go back into the queue: preempted, out of time, a node lost; default: 100",
    "on_node_loss": "replace (default): wait for as many nodes; shrink: go on with those left, same batch; end",
    "parallel": "runs of a sweep at a time",
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line before `--`."""
    parser = console.parser(__doc__)
    parser.epilog = EPILOG
    kinds = {"int": int, "int | None": int}
    hints = typing.get_type_hints(JobOptions)
    for each in dataclasses.fields(JobOptions):
        if each.name in OF_PROFILES:
            continue
        how: dict[str, Any] = {"default": None, "help": HELP.get(each.name)}
        if each.type == "bool":
            how["action"] = "store_true"
        elif each.name == "gpus_per_node":
            how["metavar"] = "[TYPE:]N"
        elif typing.get_origin(hints[each.name]) is typing.Literal:
            how["metavar"] = "|".join(typing.get_args(hints[each.name]))
        elif each.type == "tuple[str, ...]":
            how |= {"action": "append", "metavar": "OPTION"}
        else:
            how |= {"type": kinds.get(str(each.type), str), "metavar": "N" if each.type in kinds else each.name.upper()}
        parser.add_argument(f"--{each.name}", **how)
    parser.add_argument(
        "--cluster", metavar="NAME|FILE", help="profile with defaults: one of slurm/clusters, or a file"
    )
    sweep = {"nargs": "+", "metavar": "KEY=V1,V2", "help": "all combinations, as one array of jobs"}
    parser.add_argument("--sweep", action="extend", **sweep)
    parser.add_argument("--dry_run", action="store_true", help="check everything, print sbatch's script, queue nothing")
    parser.add_argument("--local", type=int, metavar="N", help="the same on this machine now, with N ranks")
    parser.add_argument("--follow", action="store_true", help="wait for the end and show the progress")
    _check_words(argv)
    arguments = console.parse(parser, argv)
    if arguments.overrides:
        raise ConfigError(f"'{arguments.overrides[0]}' is for launchers/pretrain.py; write it after ` -- `")
    return arguments


def _check_words(argv: list[str]) -> None:
    """ConfigError for what people know from Slurm and argparse would call unknown."""
    for word, then in itertools.pairwise([*argv, ""]):
        if word == "--sbatch" and then.startswith("-"):
            raise ConfigError(f"--sbatch {then}: without dashes; write --sbatch {then.lstrip('-')}")
        if word == "--srun" and then.startswith("-"):
            raise ConfigError(f"--srun {then}: as one word; write --srun={then}")
        if not word.startswith("--") and word[:2] in OF_SLURM:
            raise ConfigError(f"{word[:2]} is sbatch's; write --{OF_SLURM[word[:2]]} {word[2:] or then}".rstrip())


def parse_run(argv: list[str]) -> argparse.Namespace:
    """The command line after `--`; ConfigError names the override that an option was meant for."""
    try:
        return pretrain.parse(argv)
    except ConfigError:
        from vlscale import config

        known = set(config.flat(config.load("quickstart", ()))) - {word[2:] for word in pretrain.OF_A_RUN}
        for word, then in itertools.pairwise([*argv, "..."]):
            name, _, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and name in known:
                raise ConfigError(f"{word}: {name} is an override; write {name}={value or then}") from None
        raise


def main(argv: list[str]) -> int:
    """Run it; returns the exit code."""
    if argv and argv[0] in COMMANDS:
        return look_after(argv[0], argv[1:])
    if argv and argv[0].isalpha():
        raise ConfigError(f"no command {argv[0]}{did_you_mean(argv[0], COMMANDS)}")
    split = argv.index("--") if "--" in argv else len(argv)
    own, run = argv[:split], argv[split + 1 :]
    misplaced = next((word for word in own if word.split("=")[0] in pretrain.OF_A_RUN if word != "--dry_run"), None)
    if misplaced:
        raise ConfigError(f"{misplaced} is for launchers/pretrain.py; write it after ` -- `")
    arguments = parse(own)
    asked = parse_run(run)
    if asked.dry_run or asked.replay or asked.json:
        raise ConfigError("--dry_run goes before ` -- `, and --replay is for launchers/pretrain.py itself")
    from vlscale.cluster import profile, submission

    given = {
        each.name: getattr(arguments, each.name)
        for each in dataclasses.fields(JobOptions)
        if hasattr(arguments, each.name)
    }
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if arguments.parallel is not None and not arguments.sweep:
        raise ConfigError("--parallel is for the runs of a --sweep; leave it out")
    if arguments.local is not None:
        if odd := next((name for name in ("cluster", *given) if name != "requeue" and getattr(arguments, name)), None):
            raise ConfigError(f"--local {arguments.local} starts so many ranks here; leave out --{odd}")
        if arguments.local < 1:
            raise ConfigError(f"--local should be at least 1 (got {arguments.local})")
        given["tasks_per_node"] = arguments.local
    return submission.submit(
        submission.Asked(
            options=profile.resolve(given, arguments.cluster, PROFILES),
            checkout=ROOT,
            recipe=asked.recipe,
            overrides=tuple(asked.overrides),
            ds_config=asked.ds_config,
            out=asked.out,
            resume=asked.resume,
            sweep=tuple(arguments.sweep or ()),
            local=arguments.local is not None,
            dry_run=arguments.dry_run,
            follow=arguments.follow,
        )
    )


def look_after(command: str, argv: list[str]) -> int:
    """`submit.py status|logs|follow|cancel|requeue RUN`."""
    parser = console.parser(f"{command} of a run folder, or of all runs of a sweep's folder")
    parser.prog = f"submit.py {command}"
    parser.add_argument("run", metavar="RUN", help="run folder")
    if command == "logs":
        parser.add_argument("--rank", type=int, metavar="N", help="what this rank printed; default: the job's own log")
        parser.add_argument("--lines", type=int, default=40, metavar="N", help="so many of the last; default: 40")
    arguments = console.parse(parser, argv)
    console.no_overrides(arguments)
    from vlscale.cluster import status

    if command == "logs":
        return status.logs(Path(arguments.run), arguments.rank, arguments.lines)
    deeds = {
        "status": status.status,
        "follow": status.watch,
        "cancel": status.cancel,
        "requeue": status.requeue,
    }
    return deeds[command](Path(arguments.run))


if __name__ == "__main__":
    console.run(main, sys.argv[1:])
