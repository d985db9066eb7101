#!/usr/bin/env python3
"""Make tar shards from the formats people have, look into them, check them.

    python launchers/shards.py make --from folder --source pictures --captions captions.csv --to shards
    python launchers/shards.py make --from lxmert_tsv --source obj36.tsv --captions mscoco_train.json --to shards
    python launchers/shards.py index 'shards/*.tar'
    python launchers/shards.py verify 'shards/*.tar' --json report.json
    python launchers/shards.py describe 'shards/*.tar' --html page.html
    python launchers/shards.py regions 'shards/*.tar' --detector detr-resnet-50 --to shards_with_regions
    python launchers/shards.py frames 'clips/*.tar' --tower s3d --weights s3d_howto100m.pth --to clips_with_features

`python launchers/shards.py COMMAND --help` lists the options of a command.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlscale import console
from vlscale.data import parallel
from vlscale.data.formats import FORMATS
from vlscale.errors import DONE, STOPPED, ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from vlscale.data.looking.inspect import Problem
    from vlscale.data.making.write import Layout, Written

INTERRUPTED = 130  # as shells say of Ctrl-C
SHOWN = 10  # problems that are printed; the JSON names more


def make(argv: list[str]) -> int:
    """Write shards from another format; the same command goes on where it was stopped."""
    parser = _parser("make", make.__doc__)
    for name, metavar, text in (
        ("--vocab", "FILE", "vocab.txt that the token ids of uniter_lmdb are of"),
        ("--class_names", "FILE", "the detector's class names, one per line; they become tags"),
        ("--images", "DIR", "folder that relative picture paths are in; default: beside their file"),
    ):
        parser.add_argument(name, type=Path, default=None, metavar=metavar, help=text)
    parser.add_argument("--from", dest="format", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--source", nargs="+", required=True, metavar="PATH", help="files or folders in that format")
    text = "texts of pictures or videos: json, jsonl, csv, tsv, srt, vtt, or folders; for uniter_lmdb its text DBs"
    parser.add_argument("--captions", nargs="+", type=Path, default=(), metavar="FILE", help=text)
    text = "parts to take of a file that holds several: train, restval, val, test; default: all"
    parser.add_argument("--split", nargs="+", default=(), metavar="NAME", help=text)
    text = "rows a second in each --source of frame_features; default: 1"
    parser.add_argument("--rates", nargs="+", type=float, default=(), metavar="N", help=text)
    _layout_options(parser)
    options = _parse(parser, argv)

    from vlscale.data import formats
    from vlscale.data.making import manifest, write

    layout = _layout(options)
    names = ("captions", "vocab", "class_names", "images", "split", *(["rates"] if options.rates else []))
    chosen = {name: getattr(options, name) for name in names}
    source = formats.open_source(options.format, options.source, **chosen)
    origin = manifest.origin({"from": options.format, "source": options.source, **chosen})
    written = write.make(source, layout, SHOWN, origin)
    return _told(written, layout.folder / f"{layout.prefix}.broken.jsonl")


def _layout_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--prefix", default="data", metavar="NAME", help="start of their names; default: %(default)s")
    for name, kind, default, text in (
        ("--samples_per_shard", int, 5_000, "samples of a shard at most"),
        ("--megabytes", float, float("inf"), "size of a shard at most"),
        ("--quality", int, 95, "of the JPEGs that --resize writes"),
    ):
        parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{text}; default: %(default)s")
    text = "make pictures whose short side is longer so large, as JPEG; default: pictures stay as they are"
    parser.add_argument("--resize", type=int, default=None, metavar="PIXELS", help=text)
    parser.add_argument("--dtype", default="float16", help="of features: float16 or float32; default: %(default)s")
    _processes_option(parser)


def _processes_option(parser: argparse.ArgumentParser) -> None:
    text = "processes that do the work; default: one for each core, here %(default)s"
    parser.add_argument("--processes", type=int, default=parallel.cores(), metavar="N", help=text)


def _layout(options: argparse.Namespace) -> Layout:
    from vlscale.data.making.write import Layout

    names = {"folder": "to", "samples": "samples_per_shard"}
    return Layout(**{field.name: getattr(options, names.get(field.name, field.name)) for field in fields(Layout)})


def _told(written: Written, broken: Path | None = None) -> int:
    """Say what was written; `broken` is the file that lists the samples that were not."""
    size = sum(path.stat().st_size for path in written.shards) / 2**20
    print(f"{written.samples} samples in {len(written.shards)} shard(s), {size:.1f} MiB: {written.shards[0]} ...")
    if written.before:
        print(f"{written.before} of them were there already")
    if written.broken:
        print(f"{written.broken} broken and left out{f', listed in {broken}' if broken else ''}, such as")
        for name, reason in written.named:
            console.say(f"  {name}: {reason}")
    return DONE


def index(argv: list[str]) -> int:
    """Make the index of each shard that has none or has changed, which a training run reads first; count samples."""
    parser = _parser("index", index.__doc__)
    console.shards_argument(parser)
    _processes_option(parser)
    options = _parse(parser, argv)

    from vlscale.data.storage import indexing

    indexed = list(indexing.index(options.shards, options.processes, options.stores))
    for shard in indexed:
        note = "  (its index was stale)" if shard.was == "stale" else ""
        console.say(f"{shard.samples:>10}  {shard.shard}{note}" if not shard.fault else f"{'-':>10}  {shard.fault}")
    faulty = sum(bool(shard.fault) for shard in indexed)
    told = Counter(shard.was for shard in indexed if not shard.fault)
    states = f"{told['kept']} were there, {told['new']} new, {told['stale']} stale"
    print(f"{sum(shard.samples for shard in indexed):>10}  samples; indexes: {states}")
    if faulty:
        raise DataError(f"{faulty} of {len(indexed)} shards cannot be read; they are named above")
    return DONE


def verify(argv: list[str]) -> int:
    """Read every member of every sample; exit code 3 if anything is wrong."""
    parser = _parser("verify", verify.__doc__)
    console.shards_argument(parser)
    parser.add_argument("--quick", action="store_true", help="pictures by their headers, regions by their shapes")
    text = "put the checksums of sound shards into SHA256SUMS beside them"
    parser.add_argument("--write_checksums", action="store_true", help=text)
    _processes_option(parser)
    _json_option(parser)
    options = _parse(parser, argv)

    from vlscale.data.looking import inspect

    report = inspect.verify(options.shards, options.quick, options.processes, options.write_checksums, options.stores)
    print(f"{report.shards} shard(s), {report.samples} samples, {report.members} members read")
    if report.checksums:
        print(f"{report.checksums} shard(s) with the checksum that SHA256SUMS tells")
    for problem in inspect.spread(report.problems, SHOWN):
        console.say(f"  {_in_words(problem)}")
    if sum(report.counts.values()) > SHOWN:
        print(f"  ... and {sum(report.counts.values()) - SHOWN} more; --json FILE names up to {inspect.NAMED}")
    console.write_json(options.json, {**report._asdict(), "problems": [each._asdict() for each in report.problems]})
    if report.counts:
        counts = ", ".join(f"{count} of {kind}" for kind, count in report.counts.items())
        raise DataError(f"{sum(report.counts.values())} problem(s) in the shards: {counts}")
    print("no problem found")
    return DONE


def _in_words(problem: Problem) -> str:
    if problem.kind == "shard" and problem.shard in problem.reason:
        return problem.reason
    where = f"{problem.shard}: {problem.key}" if problem.key else problem.shard
    return f"{where}: {problem.reason}" + ("" if problem.byte is None else f" (byte {problem.byte})")


def describe(argv: list[str]) -> int:
    """Say what shards hold."""
    parser = _parser("describe", describe.__doc__)
    console.shards_argument(parser)
    text = "look at so many samples, evenly drawn; default: all"
    parser.add_argument("--limit", type=int, default=None, metavar="N", help=text)
    _processes_option(parser)
    _json_option(parser)
    parser.add_argument("--html", type=Path, default=None, metavar="FILE", help="write a page with pictures there")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="that draws its samples; default: %(default)s")
    options = _parse(parser, argv)
    console.check_place("--html", options.html)
    if options.seed < 0:
        raise ConfigError(f"--seed is {options.seed}; write 0 or more")

    from vlscale.data.looking.describe import describe as figures_of
    from vlscale.data.shards import Shards

    shards = Shards(options.shards, options=options.stores)
    figures = figures_of(shards, options.limit, options.processes)
    for name, value in figures.items():
        if name not in ("examples", "histograms") and value is not None:
            print(f"{name.replace('_', ' '):24} {_words(value)}")
    for example in figures["examples"]:
        console.say(json.dumps(example, ensure_ascii=False))
    console.write_json(options.json, figures)
    if options.html:
        from vlscale.data.looking.cards import cards
        from vlscale.data.looking.page import page
        from vlscale.data.storage.stores import shown

        title = ", ".join(map(shown, options.shards))
        console.write("--html", options.html, page(title, figures, cards(shards, seed=options.seed)))
    return DONE


def regions(argv: list[str]) -> int:
    """Copy shards of pictures and add regions.npz and tags, by an object detector from a local folder."""
    parser = _parser("regions", regions.__doc__)
    console.shards_argument(parser)
    parser.add_argument("--detector", type=Path, required=True, metavar="FOLDER", help="a detector of transformers")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for the copies")
    for name, kind, default, text in (
        ("--regions", int, 36, "regions of a picture at most"),
        ("--threshold", float, 0.2, "least confidence of a region; the surest 10 stay in any case"),
        ("--batch", int, 8, "pictures per forward pass"),
    ):
        parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{text}; default: %(default)s")
    _device_options(parser)
    options = _parse(parser, argv)

    from vlscale.data import detect
    from vlscale.data.shards import Shards

    choice = detect.Choice(options.regions, options.threshold)
    shards = Shards(options.shards, options=options.stores)
    detector = detect.Detector(options.detector, options.device)
    return _told(detect.add_regions(shards, options.to, detector, choice, options.batch, options.dtype))


def frames(argv: list[str]) -> int:
    """Copy shards of clips and add frames.npz, by a tower with published weights; goes on where it was stopped."""
    parser = _parser("frames", frames.__doc__)
    console.shards_argument(parser)
    parser.add_argument("--tower", required=True, metavar="KIND", help="s3d, resnet18/50/101/152, vit_b32 or vit_b16")
    text = "its weights: MIL-NCE's of s3d, torchvision's of resnet, DeiT's or a Hugging Face folder of vit"
    parser.add_argument("--weights", type=Path, required=True, metavar="PATH", help=text)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for the copies")
    for name, kind, default, text in (
        ("--every", float, 1.0, "seconds from one feature to the next"),
        ("--window", int, 16, "frames of one feature of s3d"),
        ("--fps", float, 0.0, "frames a second in a window; 0 = as many as fill --every"),
        ("--image_size", int, 224, "pixels of the middle square"),
        ("--batch", int, 8, "features per forward pass"),
    ):
        parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{text}; default: %(default)s")
    _device_options(parser)
    options = _parse(parser, argv)

    from vlscale import frame_features as features
    from vlscale.data.shards import Shards

    sampling = features.Sampling(options.every, options.window, options.fps, options.image_size)
    shards = Shards(options.shards, options=options.stores)
    tower = features.load_tower(options.tower, options.weights, sampling, options.device)
    written, made = features.add_frames(shards, options.to, tower, sampling, options.batch, options.dtype)
    print(f"{made.features} features of {tower.width} numbers; {made.decoded_per_second:.0f} frames per CPU-second")
    return _told(written)


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--dtype", default="float16", help="of features: float16 or float32; default: %(default)s")


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:,.6g}" for name, number in value.items())
    return str(value)


COMMANDS: Mapping[str, Callable[[list[str]], int]] = {
    "make": make,
    "index": index,
    "verify": verify,
    "describe": describe,
    "regions": regions,
    "frames": frames,
}


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    parser = console.parser(__doc__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    if not argv:
        raise ConfigError(f"write a command: {', '.join(COMMANDS)}; `--help` tells more")
    if not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            raise ConfigError(f"no command '{argv[0]}'{did_you_mean(argv[0], COMMANDS)}")
        try:
            with _interruptible():
                return COMMANDS[argv[0]](argv[1:])
        except KeyboardInterrupt:
            goes_on = (
                "; the same command goes on after the shards that are whole" if argv[0] in ("make", "frames") else ""
            )
            print(f"\nstopped{goes_on}", file=sys.stderr)
            return STOPPED if goes_on else INTERRUPTED
    console.parse(parser, argv)
    raise ConfigError(f"write a command: {', '.join(COMMANDS)}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """TERM ends the work as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser(command: str, description: str | None) -> argparse.ArgumentParser:
    parser = console.parser(description)
    parser.prog = f"{parser.prog} {command}"
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parsed options; a command that reads shards takes `data.cache=FOLDER` and its like too, as `stores`."""
    options = console.parse(parser, argv)
    if "shards" in options:
        console.take_stores(options)
    if options.overrides:
        raise ConfigError(f"'{options.overrides[0]}' is no option here; `--help` lists what there is")
    console.check_place("--json", getattr(options, "json", None))
    return options


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures there")


if __name__ == "__main__":
    console.run(main, sys.argv[1:])
