#!/usr/bin/env python3
"""Run launchers/pretrain.py on a Slurm cluster: checked here, queued, started on all nodes, put back when stopped.

    python slurm/submit.py --nodes 4 --gpus_per_node 8 --time 24:00:00 -- --ds_config ds_configs/zero2.json
    python slurm/submit.py --nodes 4 --follow -- --ds_config ds_configs/zero2.json --recipe quickstart steps=40
    python slurm/submit.py --nodes 2 --sweep optim.lr=1e-4,3e-4 seed=1,2 -- --recipe albef_tiny
    python slurm/submit.py --local 2 -- --recipe quickstart steps=40
    python slurm/submit.py status|logs|cancel|requeue RUN

What follows `--` is for launchers/pretrain.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, installed or not

from launchers import pretrain
from vlscale import console
from vlscale.cluster.options import JobOptions
from vlscale.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("status", "logs", "cancel", "requeue")
PROFILES = ROOT / "slurm" / "clusters"
OF_PROFILES = ("modules", "environment", "setup", "container", "python")
HELP = {
    "nodes": "default: 1",
    "gpus_per_node": "one rank per GPU; default: none, one rank per node on its CPUs",
    "tasks_per_node": "ranks of a node, where that is not one per GPU",
    "cpus_per_task": "cores of a rank",
    "mem": "memory of a node, e.g. 200G",
    "time": "D-HH:MM:SS, HH:MM:SS or minutes; default: 24:00:00",
    "sbatch": "another option of sbatch, KEY=VALUE or KEY; may be repeated",
    "srun": "another option of the srun that starts the ranks; may be repeated: --srun=--mpi=none",
    "cpu_bind": "how srun binds ranks to cores, e.g. cores",
    "interface": "network interface of Gloo's and NCCL's sockets, e.g. ib0",
    "signal": "USR1, USR2 or TERM: tells the ranks to save before the time is over; default: USR2",
    "lead": "seconds before the time limit; default: 120, or a quarter of a job under 8 minutes",
    "requeue": "how often the job may go back into the queue: preempted, out of time, a node lost; default: 100",
    "on_node_loss": "replace (default): wait for as many nodes; shrink: go on with those left, same batch; end",
    "parallel": "runs of a sweep at a time",
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line before `--`."""
    parser = console.parser(__doc__)
    kinds = {"int": int, "int | None": int}
    for each in dataclasses.fields(JobOptions):
        if each.name in OF_PROFILES:
            continue
        how: dict[str, Any] = {"default": None, "help": HELP.get(each.name)}
        if each.type == "bool":
            how["action"] = "store_true"
        elif each.type == "tuple[str, ...]":
            how |= {"action": "append", "metavar": "OPTION"}
        else:
            how |= {"type": kinds.get(str(each.type), str), "metavar": "N" if each.type in kinds else each.name.upper()}
        parser.add_argument(f"--{each.name}", **how)
    parser.add_argument(
        "--cluster", metavar="NAME|FILE", help="profile with defaults: one of slurm/clusters, or a file"
    )
    parser.add_argument("--sweep", nargs="+", metavar="KEY=V1,V2", help="all combinations, as one array of jobs")
    parser.add_argument("--dry_run", action="store_true", help="check everything, print sbatch's script, queue nothing")
    parser.add_argument("--local", type=int, metavar="N", help="the same on this machine now, with N ranks")
    parser.add_argument("--follow", action="store_true", help="wait for the end and show the progress")
    arguments = console.parse(parser, argv)
    if arguments.overrides:
        raise ConfigError(f"'{arguments.overrides[0]}' is for launchers/pretrain.py; write it after ` -- `")
    return arguments


def main(argv: list[str]) -> int:
    """Run it; returns the exit code."""
    if argv and argv[0] in COMMANDS:
        return look_after(argv[0], argv[1:])
    split = argv.index("--") if "--" in argv else len(argv)
    own, run = argv[:split], argv[split + 1 :]
    misplaced = next((word for word in own if word.split("=")[0] in pretrain.OF_A_RUN if word != "--dry_run"), None)
    if misplaced:
        raise ConfigError(f"{misplaced} is for launchers/pretrain.py; write it after ` -- `")
    arguments = parse(own)
    asked = pretrain.parse(run)
    if asked.dry_run or asked.replay or asked.json:
        raise ConfigError("--dry_run goes before ` -- `, and --replay is for launchers/pretrain.py itself")
    from vlscale.cluster import profile, submission

    given = {
        each.name: getattr(arguments, each.name)
        for each in dataclasses.fields(JobOptions)
        if hasattr(arguments, each.name)
    }
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if arguments.local is not None:
        of_slurm = ("cluster", "nodes", "tasks_per_node", "gpus_per_node")
        if odd := next((name for name in of_slurm if getattr(arguments, name)), None):
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
    """`submit.py status|logs|cancel|requeue RUN`."""
    parser = console.parser(f"{command} of a run folder, or of all runs of a sweep's folder")
    parser.prog = f"submit.py {command}"
    parser.add_argument("run", metavar="RUN", help="run folder")
    if command == "logs":
        parser.add_argument("--rank", type=int, metavar="N", help="what this rank printed; default: the job's own log")
        parser.add_argument("--lines", type=int, default=40, metavar="N", help="so many of the last; default: 40")
    arguments = console.parse(parser, argv)
    console.no_overrides(arguments)
    from vlscale.cluster import status

    if command == "status":
        return status.status(Path(arguments.run))
    if command == "logs":
        return status.logs(Path(arguments.run), arguments.rank, arguments.lines)
    return status.cancel(Path(arguments.run)) if command == "cancel" else status.requeue(Path(arguments.run))


if __name__ == "__main__":
    console.run(main, sys.argv[1:])
