"""What a video network would tell of a drawn video: `frames.npz` and `visual_words.npz`.

A frame's features come from the pixels of what is shown in it and from how that moves, so that kind, place and action
can be read from them, through noise. Visual words are the leaves of a small tree of k-means over those features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.decode import Pixels
from vlscale.data.scenes.moving import FPS, SIDE, Pose, Stretch, Video
from vlscale.data.visual_words import Codebook, descend

FEATURES = 64  # width of a frame's features
PER_SECOND = 4  # features
BRANCHES, LEVELS = 4, 3  # of the tree: 64 visual words

Floats = NDArray[np.float32]

_STRIDE = FPS // PER_SECOND
_GRID = 8  # a thing's pixels are averaged to 8 x 8
_NUMBERS = 3 * _GRID**2 + 8  # those, and `_motion`
_PLACE, _EXTENT, _CHANGE, _TURN, _FLASH = 20, 80, 600, 60, 1200  # weights of a pixel (the first three), degree, event
_SCALE = 2000.0  # brings features to about 1
_NOISE = 0.1
_SAMPLE = 20_000  # features that the tree is grown from
_ROUNDS = 10  # of k-means
_STEPS = 256  # of a centroid's number from 0 to 1


def features(video: Video, frames: Sequence[Pixels], rng: Generator) -> dict[str, NDArray[Any]]:
    """The arrays of a sample's `frames.npz`: features [T, 64] float16 and times [T] float32 seconds, four a second."""
    rows, first = [], 0
    for stretch in video.stretches:
        rows += [_seen(stretch, frames[first + n], frames[first + n + 1], n) for n in range(0, len(stretch), _STRIDE)]
        first += len(stretch)
    of_frame = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    things = np.maximum(np.concatenate(rows) @ _projection(), 0)  # [things of all frames, 64]
    total = np.zeros((len(rows), FEATURES), dtype=np.float32)
    np.add.at(total, of_frame, things)
    noisy = total / _SCALE + _NOISE * rng.standard_normal(total.shape)
    times = np.arange(len(rows), dtype=np.float32) / PER_SECOND
    return {"features": np.maximum(noisy, 0).astype(np.float16), "times": times}


def _seen(stretch: Stretch, frame: Pixels, following: Pixels, number: int) -> Floats:
    """[things, 200] whole numbers: each thing's pixels in its box, its place and extent, and what changes till next."""
    rows = np.zeros((len(stretch.actors), _NUMBERS), dtype=np.float32)
    for row, actor in zip(rows, stretch.actors, strict=True):
        now, then = actor.poses[number], actor.poses[number + 1]
        if now.shown or then.shown:
            pixels = 255 - _crop(frame if now.shown else following, now)  # the ground is light: near zero
            row[:-8], row[-8:] = pixels.reshape(-1), _motion(now, then)
    return rows


def _crop(frame: Pixels, pose: Pose) -> Pixels:
    """Its box, [8, 8, 3]."""
    x1, y1 = max(0, round(pose.x - pose.half)), max(0, round(pose.y - pose.half))
    x2, y2 = round(pose.x + pose.half) + 1, round(pose.y + pose.half) + 1
    box: Pixels = cv2.resize(frame[y1:y2, x1:x2], (_GRID, _GRID), interpolation=cv2.INTER_AREA).astype(np.uint8)
    return box


def _motion(now: Pose, then: Pose) -> list[int]:
    """Place and extent, and what becomes of them till the next frame."""
    flash = int(then.shown) - int(now.shown)
    return [
        round(_PLACE * (now.x - SIDE / 2)),
        round(_PLACE * (now.y - SIDE / 2)),
        round(_EXTENT * now.half),
        round(_CHANGE * (then.x - now.x)),
        round(_CHANGE * (then.y - now.y)),
        round(3 * _CHANGE * (then.half - now.half)),
        round(_TURN * abs(then.turn - now.turn)),
        _FLASH * flash,
    ]


@lru_cache(maxsize=1)
def _projection() -> Floats:
    """Weights -1, 0 and 1: sums of whole numbers, the same in whatever order a machine adds them up."""
    rng = np.random.Generator(np.random.PCG64(26))
    return rng.integers(-1, 2, (_NUMBERS, FEATURES)).astype(np.float32)


def grow(samples: Sequence[NDArray[np.float16]]) -> Codebook:
    """The tree over features [T, 64] of many videos, of which up to 20,000 rows drawn at random count."""
    rng = np.random.Generator(np.random.PCG64(27))
    rows = np.concatenate(samples)
    rows = rows[rng.permutation(len(rows))[:_SAMPLE]].astype(np.float32)
    nodes = np.zeros(len(rows), dtype=np.int64)
    levels, counts = [], []
    for level in range(LEVELS):
        centroids = np.stack([_split(rows[nodes == node], rng) for node in range(BRANCHES**level)])
        nodes = descend(rows.astype(np.float64), nodes, centroids)[0]
        levels.append(centroids)
        counts.append(np.bincount(nodes, minlength=BRANCHES ** (level + 1)).reshape(-1, BRANCHES))
    return Codebook(tuple(levels), tuple(counts))


def _split(rows: Floats, rng: Generator) -> Floats:
    """k-means from rows [N, 64] drawn at random: centroids [4, 64], which are rounded: machines add up differently."""
    chosen = rows[rng.permutation(len(rows))[:BRANCHES]]
    if len(rows) <= BRANCHES:  # each is one; what is lacking stays empty
        return np.resize(chosen, (BRANCHES, FEATURES)) if len(rows) else np.zeros((BRANCHES, FEATURES), np.float32)
    labels = ((rows[:, None] - chosen) ** 2).sum(axis=2).argmin(axis=1).astype(np.int32)
    stop = (cv2.TERM_CRITERIA_MAX_ITER, _ROUNDS, 0.0)
    centroids = cv2.kmeans(rows, BRANCHES, labels, stop, 1, cv2.KMEANS_USE_INITIAL_LABELS)[2]
    rounded: Floats = (np.rint(centroids * _STEPS) / _STEPS).astype(np.float32)
    return rounded
