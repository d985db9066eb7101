#!/usr/bin/env python3
"""Weights from one set of names to another.

    python launchers/convert.py --from uniter --weights uniter-base.pt --to converted/uniter
    python launchers/convert.py --into uniter --weights runs/mine --to uniter.safetensors
    python launchers/convert.py --to-hf clip-for-transformers --weights runs/mine
    python launchers/convert.py --merge runs/mine --to mine.safetensors --dtype fp32

`--from` takes the authors' published weights; a run starts from the folder by `init.weights=converted/uniter`. Sizes
come from the file's shapes; what shapes do not tell, e.g. the number of heads, is the published model's, or given by
--recipe or `family.key=value`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlscale import console
from vlscale.errors import ConfigError

TAKES = {  # of each way to convert: what must be given, and what may be
    "from": (("weights", "to"), ("recipe",)),
    "into": (("weights", "to"), ("dtype",)),
    "to-hf": (("weights",), ("dtype",)),
    "merge": (("to",), ("dtype",)),
}


def parse(argv: list[str]) -> tuple[str, argparse.Namespace]:
    """(the way to convert, the command line).

    Raises:
        ConfigError: an option that is missing, or that this way has no use for.
    """
    parser = console.parser(__doc__)
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--from", metavar="SYSTEM", help="the authors' names to ours, e.g. uniter, tcl, oscar_plus")
    ways.add_argument("--into", metavar="SYSTEM", help="our names to the authors'")
    ways.add_argument("--to-hf", metavar="DIR", help="our names to a folder for transformers (clip, lxmert, albef)")
    ways.add_argument("--merge", metavar="CHECKPOINT", help="a run's or checkpoint's weights to one file")
    parser.add_argument("--weights", metavar="FILE|DIR|RUN", help="what is converted")
    parser.add_argument("--to", metavar="DIR|FILE", help="a new folder (--from), or a .safetensors file")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="with --from: whose family and objectives these are")
    parser.add_argument(
        "--dtype", metavar="fp32|bf16|fp16", help="default: as they are; a run's are rounded from its masters"
    )
    arguments = console.parse(parser, argv)
    given = vars(arguments)
    way = next(each for each in TAKES if given[each.replace("-", "_")] is not None)
    needed, possible = TAKES[way]
    for name in needed:
        if not given[name]:
            raise ConfigError(f"--{way} needs --{name}; `--help` shows each way to convert")
    for name in ("weights", "to", "recipe", "dtype"):
        if given[name] is not None and name not in (*needed, *possible):
            raise ConfigError(f"--{way} has no use for --{name}; leave it out")
    if way != "from":
        console.no_overrides(arguments)
    return way, arguments


def main(argv: list[str]) -> int:
    """Run it; returns the exit code."""
    way, arguments = parse(argv)
    from vlscale import convert

    given = vars(arguments)
    if way == "from":
        lines = convert.from_published(
            given["from"], arguments.weights, arguments.to, arguments.recipe, arguments.overrides
        )
    elif way == "into":
        lines = convert.into_published(arguments.into, arguments.weights, arguments.to, arguments.dtype)
    elif way == "to-hf":
        lines = convert.to_hugging_face(arguments.weights, arguments.to_hf, arguments.dtype)
    else:
        lines = convert.merge(arguments.merge, arguments.to, arguments.dtype)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    console.run(main, sys.argv[1:])
