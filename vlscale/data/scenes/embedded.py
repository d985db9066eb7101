"""The embedded data set: drawn scenes as shards. Made in seconds, always the same.

Each sample has a picture and a json with its caption, the names and boxes of its things, and questions; those for
families that read regions also have what a detector would tell. For families that read clips there are videos, with
sentences in time, frames' features and visual words.
"""

from __future__ import annotations

import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from vlscale.data.decode import Pixels
from vlscale.data.scenes.drawing import scenes
from vlscale.data.scenes.frames import features, grow
from vlscale.data.scenes.moving import FPS, SIDE, Video, videos
from vlscale.data.scenes.questions import questions
from vlscale.data.scenes.regions import detect, npz
from vlscale.data.shards import cache_folder
from vlscale.data.storage.whole import whole_folder
from vlscale.data.visual_words import Codebook, write_codebook, write_words
from vlscale.errors import ConfigError

PER_SHARD = 4_096
FOLDER = "scenes-2"  # the number rises when anything in the samples changes
CLIPS = "clips-1"  # likewise
CODEBOOK = "codebook.safetensors"  # of its visual words
TREE_OF = 160  # training videos whose features the visual words come from


class Embedded(NamedTuple):
    """The shards of the embedded data set."""

    train: list[Path]
    val: list[Path]


def ensure(cache: Path | None = None, regions: bool = False, clips: bool = False) -> Embedded:
    """The shards in `cache` (default `cache_folder()`), drawn on first use, by several processes if need be.

    With `regions`, other shards of the same samples, which have a `regions.npz` too. With `clips`, the videos.
    ConfigError if the folder cannot be written.
    """
    root = (cache or cache_folder()).expanduser()
    folder = root / (CLIPS if clips else f"{FOLDER}-regions" if regions else FOLDER)
    if not folder.is_dir():
        try:
            _make(root, folder, regions, clips)
        except OSError as error:
            raise ConfigError(
                f"the embedded data set cannot be written to {root} ({error.strerror}); "
                "set VLSCALE_CACHE to a folder that can"
            ) from error
    return Embedded(sorted(folder.glob("train-*.tar")), sorted(folder.glob("val-*.tar")))


def _make(root: Path, folder: Path, regions: bool, clips: bool) -> None:
    """Write beside, then rename; where another process was faster, its folder stays."""
    root.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as scratch:
        for train, split in ((False, "val"), (True, "train")):
            _write(clip_samples(train) if clips else samples(train, regions), scratch, split)
        if clips:
            write_codebook(visual_words(), scratch / CODEBOOK)


def samples(train: bool, regions: bool) -> Iterator[dict[str, bytes]]:
    """The fields of every sample of a split. Each kind of field has draws of its own and leaves the others' alone."""
    asking, detecting = (np.random.Generator(np.random.PCG64([seed, train])) for seed in (21, 22))
    for scene in scenes(train):
        pixels = scene.draw()
        record = {**scene.record(), "qa": questions(scene, asking)}
        fields = {"png": _png(pixels), "json": json.dumps(record).encode()}
        yield {**fields, "regions.npz": npz(detect(scene, pixels, detecting))} if regions else fields


def clip_samples(train: bool, number: int | None = None) -> Iterator[dict[str, bytes]]:
    """The fields of every video of a split, or of the first `number`: mp4, json, frames.npz and visual_words.npz."""
    tree = visual_words()
    for video, frames, seen in _filmed(train, number):
        words = tree(seen["features"]).codes
        yield {
            "mp4": _mp4(frames),
            "json": json.dumps(video.record()).encode(),
            "frames.npz": npz(seen),
            "visual_words.npz": write_words(words, seen["times"]),
        }


@lru_cache(maxsize=1)
def visual_words() -> Codebook:
    """The tree that their visual words come from."""
    return grow([seen["features"] for _, _, seen in _filmed(True, TREE_OF)])


def _filmed(train: bool, number: int | None) -> Iterator[tuple[Video, list[Pixels], dict[str, NDArray[Any]]]]:
    """Each video with its frames and their features."""
    rng = np.random.Generator(np.random.PCG64([24, train]))
    for video in islice(videos(train), number):
        frames = list(video.draw())
        yield video, frames, features(video, frames, rng)


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


def _mp4(frames: Sequence[Pixels]) -> bytes:
    """MPEG-4 at its best quality with a key frame every second, by one thread: the same bytes every time."""
    file = BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"qmin": "1", "qmax": "2", "g": str(FPS)})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
