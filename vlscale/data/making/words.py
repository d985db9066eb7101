"""Shards with the visual words of their frames, by a codebook."""

from __future__ import annotations

import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlscale.data.making.resumed import rewrite_resumed
from vlscale.data.making.write import Member, Written
from vlscale.data.samples import FRAME_FIELD, WORD_FIELD
from vlscale.data.shards import Shards
from vlscale.data.visual_words import Codebook, read_features, write_words


class Spread(NamedTuple):
    """What `add_words` has seen, of the copies that this call has made."""

    frames: int
    used: int  # visual words
    inertia: tuple[float, ...]  # mean squared distance of the frames to their centroid, by level
    frames_per_second: float


def add_words(shards: Shards, folder: Path, codebook: Codebook) -> tuple[Written, Spread]:
    """Copies of `shards` in `folder`, under their names, whose samples have `visual_words.npz`.

    Samples without usable `frames.npz` are left out, counted and named. Ended early, the same call goes on after the
    copies that are whole. ConfigError if `folder` holds shards of these names that another call has made, DataError if
    no sample could be written.
    """
    used = np.zeros(codebook.words, dtype=np.int64)
    squares, started = np.zeros(len(codebook.levels)), time.monotonic()

    def change(numbers: range) -> Iterator[Member]:
        for i in numbers:
            raw = shards.read(i)
            try:
                if FRAME_FIELD not in raw:
                    raise ValueError(f"it has no '{FRAME_FIELD}' but {', '.join(raw)}")
                features, times = read_features(raw[FRAME_FIELD])
                found = codebook(features)
            except ValueError as error:
                yield Member(shards.key(i), {}, str(error))
                continue
            used[:] += np.bincount(found.codes, minlength=len(used))
            squares[:] += found.squares
            yield Member(shards.key(i), {**raw, WORD_FIELD: write_words(found.codes, times)})

    digest = sha256(b"".join(level.tobytes() for level in codebook.levels)).hexdigest()
    written = rewrite_resumed(shards, folder, change, {"codebook": digest})
    frames = int(used.sum())
    inertia = tuple((squares / max(frames, 1)).tolist())
    return written, Spread(frames, int((used > 0).sum()), inertia, frames / max(time.monotonic() - started, 1e-9))
