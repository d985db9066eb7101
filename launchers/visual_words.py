#!/usr/bin/env python3
"""Visual words for VideoBERT: hierarchical k-means over the frames of shards, and shards that hold each frame's word.

    python launchers/visual_words.py grow 'frames/*.tar' --to words.safetensors
    python launchers/visual_words.py assign 'frames/*.tar' --codebook words.safetensors --to shards_with_words

`python launchers/visual_words.py COMMAND --help` lists the options of a command.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlscale import console
from vlscale.data import parallel
from vlscale.errors import DONE, STOPPED, ConfigError, did_you_mean

if TYPE_CHECKING:
    from vlscale.data.shards import Shards


def grow(argv: list[str]) -> int:
    """Make a codebook of the features in frames.npz; the same command goes on where it was stopped."""
    parser = _parser("grow", grow.__doc__)
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="the codebook, a safetensors file")
    for name, default, text in (
        ("--branches", 12, "clusters at each node of the tree"),
        ("--levels", 4, "of the tree: branches^levels visual words"),
        ("--rows", 1_000_000, "frames drawn for k-means, 4 bytes a number each on the disk and in memory"),
        ("--iterations", 100, "of one k-means at most"),
        ("--seed", 0, "of all draws"),
        ("--processes", parallel.cores(), "that do the work"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text}; default: %(default)s")
    options = _parse(parser, argv)

    from vlscale.data.making import codebook

    growth = codebook.Growth(options.branches, options.levels, options.rows, options.iterations, options.seed)
    grown = codebook.grow(_shards(options), options.to, growth, options.processes)
    print(f"{grown.words} visual words of {grown.rows} of {grown.frames} frames in {options.to}")
    print(f"{grown.leaves} of them have frames; inertia by level: {_numbers(grown.inertia)}")
    if grown.frames_per_second:
        print(f"{grown.frames_per_second:.0f} frames per second read")
    _tell_broken(grown.broken, grown.named)
    console.write_json(options.json, grown._asdict())
    return DONE


def assign(argv: list[str]) -> int:
    """Copy shards and add visual_words.npz to each sample; the same command goes on where it was stopped."""
    parser = _parser("assign", assign.__doc__)
    parser.add_argument("--codebook", type=Path, required=True, metavar="FILE", help="that `grow` has made")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for the copies")
    options = _parse(parser, argv)

    from vlscale.data.making.words import add_words
    from vlscale.data.visual_words import read_codebook

    written, spread = add_words(_shards(options), options.to, read_codebook(options.codebook))
    print(f"{written.samples} samples in {len(written.shards)} shard(s): {written.shards[0]} ...")
    print(f"{spread.used} visual words in {spread.frames} frames; inertia by level: {_numbers(spread.inertia)}")
    print(f"{spread.frames_per_second:.0f} frames per second")
    _tell_broken(written.broken, written.named)
    console.write_json(options.json, {**spread._asdict(), "samples": written.samples, "broken": written.broken})
    return DONE


def _parser(command: str, description: str | None) -> argparse.ArgumentParser:
    parser = console.parser(description)
    parser.prog = f"{parser.prog} {command}"
    console.shards_argument(parser)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures there")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    options = console.parse(parser, argv)
    console.take_stores(options)
    if options.overrides:
        raise ConfigError(f"'{options.overrides[0]}' is no option here; `--help` lists what there is")
    console.check_place("--json", options.json)
    return options


def _shards(options: argparse.Namespace) -> Shards:
    from vlscale.data.shards import Shards

    return Shards(options.shards, options=options.stores)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.5g}" for value in values)


def _tell_broken(count: int, named: Iterable[tuple[str, str]]) -> None:
    if count:
        print(f"{count} broken and left out, such as")
        for key, reason in named:
            console.say(f"  {key}: {reason}")


COMMANDS: Mapping[str, Callable[[list[str]], int]] = {"grow": grow, "assign": assign}


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    parser = console.parser(__doc__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    if argv and not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            raise ConfigError(f"no command '{argv[0]}'{did_you_mean(argv[0], COMMANDS)}")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return COMMANDS[argv[0]](argv[1:])
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on after what is whole", file=sys.stderr)
            return STOPPED
        finally:
            signal.signal(signal.SIGTERM, before)
    if argv:
        console.parse(parser, argv)
    raise ConfigError(f"write a command: {', '.join(COMMANDS)}; `--help` tells more")


if __name__ == "__main__":
    console.run(main, sys.argv[1:])
