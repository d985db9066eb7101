"""Formats that people have their data in, one file each; `open_source` finds them by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlscale.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from vlscale.data.making.write import Source

CAPTIONED = ("albef_json", "coco", "karpathy", "flickr30k", "cc_tsv")  # name pictures and their captions
ASKED = ("vqa", "gqa", "nlvr2", "refcoco", "snli_ve")  # name pictures and what is asked or said of them
FOLDERS = ("folder", "npz", "lxmert_tsv", "uniter_lmdb", "oscar_tsv", "vlp")  # pictures or regions, texts apart
VIDEOS = ("clips", "frame_features")  # clips or their frames' features, what is said in them apart
FORMATS = (*CAPTIONED, "img2dataset", *ASKED, *FOLDERS, *VIDEOS)
SPLIT = ("karpathy", "flickr30k", "refcoco", *VIDEOS)  # whose files hold several splits


def open_source(
    name: str,
    paths: Sequence[str | Path],
    captions: Sequence[Path] = (),
    vocab: Path | None = None,
    class_names: Path | None = None,
    images: Path | None = None,
    split: Sequence[str] = (),
    rates: Sequence[float] = (),
) -> Source[Any]:
    """The source that `paths` hold in format `name`.

    `captions` are files (for `uniter_lmdb` the text DBs' folders), `vocab` the vocab.txt of token ids, `class_names`
    the names of the detector's classes, one per line, `images` the folder that relative picture paths are in, `split`
    the parts to take of a file that holds several (all if empty), `rates` the rows a second of each folder of frames'
    features (1 if empty). ConfigError for a wrong option, DataError for a path
    that is missing or holds something else.
    """
    if name not in FORMATS:
        raise ConfigError(f"no format '{name}'{did_you_mean(name, FORMATS)}")
    for option, value, readers in (
        ("images", images, (*CAPTIONED, *ASKED)),
        ("split", split, SPLIT),
        ("captions", captions, (*FOLDERS, *VIDEOS)),
        ("rates", rates, ("frame_features",)),
    ):
        if value and name not in readers:
            raise ConfigError(f"--{option} is not read by {name}, only by {', '.join(readers)}; leave it out")
    found = [Path(path).expanduser() for path in paths]
    for path in [*found, *captions, *(path for path in (vocab, class_names, images) if path)]:
        if not path.exists():
            there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            near = did_you_mean(path.name, there) if len(there) < 1_000 else ""
            raise DataError(f"there is no '{path}'{near if near.startswith('; did') else ''}")
        if path.suffix == ".tar":
            raise DataError(f"{path} is a shard already: train on it as it is (data.train='{path}')")
    module = importlib.import_module(f"vlscale.data.formats.{name}")
    options = module.Options(tuple(captions), vocab, class_names, images, tuple(split), tuple(rates))
    source: Source[Any] = module.source(found, options)
    return source
