"""What an object detector would tell of a drawn scene: `regions.npz` for the families that read regions.

The boxes are those of the things, a little off, and some of empty ground. Features come from the pixels within,
so that colour, shape and size can be read from them, through noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.decode import Pixels
from vlscale.data.scenes.drawing import COLOURS, SHAPES, SIDE, SIZES, Group, Scene

FEATURES = 64  # width of a region's features
NUM_CLASSES = 1 + len(SHAPES) * len(COLOURS)  # 0 = background
NUM_ATTRIBUTES = len(SIZES) + 1  # small, large, and the last = none, which the background has
MOST_REGIONS = 10  # six things and four pieces of ground

Floats = NDArray[np.float64]

_GROUND = (2, 4)  # fewest and most boxes of empty ground
_CANDIDATES = 24  # boxes drawn, of which those that cover least of any thing are kept
_SIDES = (8.0, 20.0)  # pixels, of a box of ground
_JITTER = 1.5  # pixels that a side is off at most
_SURE = (0.5, 0.98)  # confidence in a thing
_UNSURE = (0.3, 0.5)  # confidence in the background
_GRID = 8  # a region's pixels are averaged to 8 x 8
_EXTENT = 48  # weight of a pixel of extent against a level of colour: size must be seen beside them
_SCALE = 1500.0  # brings features to about 1
_NOISE = 0.1


def class_of(group: Group) -> int:
    """The detector's number for a kind of thing: 1 + shape * 7 + colour."""
    return 1 + group.shape * len(COLOURS) + group.colour


def detect(scene: Scene, pixels: Pixels, rng: Generator) -> dict[str, NDArray[Any]]:
    """The arrays of a sample's `regions.npz`, R = 4 to 10 regions, the surest first. pixels [64, 64, 3].

    features [R, 64] float16, boxes [R, 4] float32 pixels (x1, y1, x2, y2), width and height of the picture, classes
    [R] int64, class_confidence [R] float32, class_probs [R, 36] float16, attributes [R] int64,
    attribute_confidence [R] float32.
    """
    true = np.array([thing.box for thing in scene.things], dtype=np.float64)  # [T, 4]
    ground = _ground(true, int(rng.integers(_GROUND[0], _GROUND[1] + 1)), rng)
    near = true + rng.uniform(-_JITTER, _JITTER, true.shape)
    boxes = np.concatenate([near.clip(0, SIDE), ground]).astype(np.float32)
    things, rest = len(true), len(ground)
    groups = [thing.group for thing in scene.things]
    classes = np.array([class_of(group) for group in groups] + [0] * rest, dtype=np.int64)
    attributes = np.array([group.size for group in groups] + [NUM_ATTRIBUTES - 1] * rest, dtype=np.int64)
    sure = np.concatenate([rng.uniform(*_SURE, (things, 2)), rng.uniform(*_UNSURE, (rest, 2))])  # class, attribute
    order = np.argsort(-sure[:, 0], kind="stable")
    boxes, classes, sure = boxes[order], classes[order], sure[order]
    return {
        "features": _features(pixels, boxes, rng),
        "boxes": boxes,
        "width": np.array(SIDE),
        "height": np.array(SIDE),
        "classes": classes,
        "class_confidence": sure[:, 0].astype(np.float32),
        "class_probs": _class_probs(classes, sure[:, 0], rng),
        "attributes": attributes[order],
        "attribute_confidence": sure[:, 1].astype(np.float32),
    }


def _ground(things: Floats, count: int, rng: Generator) -> Floats:
    """`count` boxes [count, 4] where there is least of `things` [T, 4]."""
    extent = rng.uniform(*_SIDES, (_CANDIDATES, 2))
    corner = rng.uniform(0, 1, (_CANDIDATES, 2)) * (SIDE - extent)
    boxes = np.concatenate([corner, corner + extent], axis=1)
    first = np.maximum(boxes[:, None, :2], things[:, :2])
    last = np.minimum(boxes[:, None, 2:], things[:, 2:])
    covered = (last - first).clip(0).prod(axis=2).sum(axis=1) / extent.prod(axis=1)  # [_CANDIDATES], share
    return boxes[np.argsort(covered, kind="stable")[:count]]


def _features(pixels: Pixels, boxes: NDArray[np.float32], rng: Generator) -> NDArray[np.float16]:
    """The pixels in each box on a fixed grid, with its extent, through a fixed random layer with ReLU: [R, 64]."""
    first, last = np.floor(boxes[:, :2]).astype(int), np.ceil(boxes[:, 2:]).astype(int)
    seen = np.empty((len(boxes), 3 * _GRID**2 + 2), dtype=np.float32)
    for row, (x1, y1), (x2, y2) in zip(seen, first.tolist(), last.tolist(), strict=True):
        row[:-2] = cv2.resize(pixels[y1:y2, x1:x2], (_GRID, _GRID), interpolation=cv2.INTER_AREA).reshape(-1)
    seen[:, :-2] = 255 - seen[:, :-2]  # the ground is light: near zero
    seen[:, -2:] = _EXTENT * (last - first)
    projected = seen @ _projection() / _SCALE
    noisy: Floats = projected + _NOISE * rng.standard_normal(projected.shape)
    return np.maximum(noisy, 0).astype(np.float16)


@lru_cache(maxsize=1)
def _projection() -> NDArray[np.float32]:
    """Weights -1, 0 and 1: sums of whole numbers, the same in whatever order a machine adds them up."""
    rng = np.random.Generator(np.random.PCG64(23))
    return rng.integers(-1, 2, (3 * _GRID**2 + 2, FEATURES)).astype(np.float32)


def _class_probs(classes: NDArray[np.int64], sure: Floats, rng: Generator) -> NDArray[np.float16]:
    """[R, 36]: `sure` [R] for the class itself, the rest on what looks like it."""
    rest: Floats = _alike()[classes] * rng.uniform(0.5, 1.5, (len(classes), NUM_CLASSES))
    probs: Floats = rest * ((1 - sure) / rest.sum(axis=1))[:, None]
    probs[np.arange(len(classes)), classes] = sure
    return probs.astype(np.float16)


@lru_cache(maxsize=1)
def _alike() -> Floats:
    """[36, 36], what a class is taken for when it is mistaken: its colour or its shape in most cases."""
    shape, colour = np.divmod(np.arange(NUM_CLASSES - 1), len(COLOURS))
    table = np.ones((NUM_CLASSES, NUM_CLASSES))
    table[1:, 1:] += 8.0 * (shape[:, None] == shape) + 8.0 * (colour[:, None] == colour)
    np.fill_diagonal(table, 0)
    return table


def npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of an uncompressed npz; they depend on nothing but the arrays."""
    file = BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
