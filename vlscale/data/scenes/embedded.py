"""The embedded data set: drawn scenes as shards. Made in seconds, always the same.

Each sample has a picture and a json with its caption, the names and boxes of its things, and questions; those for
families that read regions also have what a detector would tell.
"""

from __future__ import annotations

import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlscale.data.decode import Pixels
from vlscale.data.scenes.drawing import scenes
from vlscale.data.scenes.questions import questions
from vlscale.data.scenes.regions import detect, npz
from vlscale.data.shards import cache_folder
from vlscale.data.storage.whole import whole_folder
from vlscale.errors import ConfigError

PER_SHARD = 4_096
FOLDER = "scenes-2"  # the number rises when anything in the samples changes


class Embedded(NamedTuple):
    """The shards of the embedded data set."""

    train: list[Path]
    val: list[Path]


def ensure(cache: Path | None = None, regions: bool = False) -> Embedded:
    """The shards in `cache` (default `cache_folder()`), drawn on first use, by several processes if need be.

    With `regions`, other shards of the same samples, which have a `regions.npz` too. ConfigError if the folder
    cannot be written.
    """
    root = (cache or cache_folder()).expanduser()
    folder = root / (f"{FOLDER}-regions" if regions else FOLDER)
    if not folder.is_dir():
        try:
            _make(root, folder, regions)
        except OSError as error:
            raise ConfigError(
                f"the embedded data set cannot be written to {root} ({error.strerror}); "
                "set VLSCALE_CACHE to a folder that can"
            ) from error
    return Embedded(sorted(folder.glob("train-*.tar")), sorted(folder.glob("val-*.tar")))


def _make(root: Path, folder: Path, regions: bool) -> None:
    """Write beside, then rename; where another process was faster, its folder stays."""
    root.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as scratch:
        _write(samples(False, regions), scratch, "val")
        _write(samples(True, regions), scratch, "train")


def samples(train: bool, regions: bool) -> Iterator[dict[str, bytes]]:
    """The fields of every sample of a split. Each kind of field has draws of its own and leaves the others' alone."""
    asking, detecting = (np.random.Generator(np.random.PCG64([seed, train])) for seed in (21, 22))
    for scene in scenes(train):
        pixels = scene.draw()
        record = {**scene.record(), "qa": questions(scene, asking)}
        fields = {"png": _png(pixels), "json": json.dumps(record).encode()}
        yield {**fields, "regions.npz": npz(detect(scene, pixels, detecting))} if regions else fields


def _write(drawn: Iterable[dict[str, bytes]], folder: Path, split: str) -> None:
    numbered = enumerate(drawn)
    for shard, chunk in groupby(numbered, lambda pair: pair[0] // PER_SHARD):
        with tarfile.open(folder / f"{split}-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, sample in chunk:
                for field, data in sample.items():
                    _add(tar, f"{split}_{number:06d}.{field}", data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without date, owner or anything else that differs from one machine to another."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))


def _png(pixels: Pixels) -> bytes:
    """A PNG without row filters: for flat colours half the size of OpenCV's own and decoded twice as fast."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each row starts with its filter, 0 = none
    rows[:, 1:] = pixels.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
