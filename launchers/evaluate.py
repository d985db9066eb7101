#!/usr/bin/env python3
"""Evaluate a trained model: a table for people, JSON for programs.

python launchers/evaluate.py --checkpoint runs/NAME --task retrieval --data 'shards/*-test-*.tar' --json out.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlscale import console


def main(argv: list[str]) -> int:
    """Run it; returns the exit code."""
    parser = console.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="RUN|CHECKPOINT", help="a run folder, or one checkpoint")
    parser.add_argument(
        "--task",
        default=None,
        help="retrieval or pretext; default: retrieval, or pretext of a family without embeddings",
    )
    parser.add_argument("--data", nargs="+", default=None, metavar="SHARDS", help="globs; default: the run's data.val")
    parser.add_argument("--batch", type=int, default=64, help="samples per forward pass; default: %(default)s")
    parser.add_argument("--limit", type=int, default=None, help="samples at most, 0 = all; default: evaluation.limit")
    text = "windows of a clip whose embeddings are averaged; default: evaluation.windows"
    parser.add_argument("--windows", type=int, default=None, help=text)
    parser.add_argument("--json", default=None, metavar="FILE", help="write the figures there")
    arguments = console.parse(parser, argv)
    console.no_overrides(arguments)

    from vlscale import evaluate

    figures = evaluate.evaluate(
        arguments.checkpoint,
        arguments.task,
        arguments.data,
        batch=arguments.batch,
        limit=arguments.limit,
        windows=arguments.windows,
    )
    for name, value in figures.items():
        print(f"{name:40} {value:.4f}" if isinstance(value, float) else f"{name:40} {value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    console.run(main, sys.argv[1:])
