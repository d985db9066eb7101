"""Drawn scenes whose captions tell what is where.

A scene is two groups of shapes on a light ground ("three green triangles above a small yellow star"). The
picture, its caption and its boxes all follow from one `Scene`. No caption fits two scenes, and training and
validation share none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from vlscale.data.decode import Pixels

SIDE = 64  # pixels of the square picture
NUM_TRAIN = 16_384
NUM_VAL = 512

Outline = tuple[tuple[float, float], ...]  # corners (x, y) in the unit square

_STAR: Outline = tuple(
    (0.5 + r * math.sin(turn * math.pi / 5), 0.54 - r * math.cos(turn * math.pi / 5))
    for turn, r in enumerate((0.54, 0.22) * 5)
)
_ARM, _HAND = 0.33, 0.67  # a cross is 1/3 wide
_CROSS: Outline = (
    (_ARM, 0), (_HAND, 0), (_HAND, _ARM), (1, _ARM), (1, _HAND), (_HAND, _HAND),
    (_HAND, 1), (_ARM, 1), (_ARM, _HAND), (0, _HAND), (0, _ARM), (_ARM, _ARM),
)  # fmt: skip
SHAPES: tuple[tuple[str, Outline], ...] = (
    ("circle", ()),
    ("square", ((0, 0), (1, 0), (1, 1), (0, 1))),
    ("triangle", ((0.5, 0), (1, 1), (0, 1))),
    ("star", _STAR),
    ("cross", _CROSS),
)
COLOURS = (
    ("red", (215, 35, 35)),
    ("green", (40, 160, 60)),
    ("blue", (45, 75, 215)),
    ("yellow", (240, 200, 20)),
    ("purple", (145, 50, 170)),
    ("orange", (245, 130, 25)),
    ("black", (25, 25, 25)),
)
SIZES = (("small", 6), ("large", 12))  # name, half the extent in pixels; several of a kind are small
COUNTS = ("no", "one", "two", "three")
RELATIONS = (("left of", "right of"), ("above", "below"))  # each with its reverse


def plural(noun: str) -> str:
    """`red circles`, `red crosses`."""
    return f"{noun}{'es' if noun.endswith('s') else 's'}"


@dataclass(frozen=True, order=True)
class Group:
    """One to three equal shapes; `shape`, `colour` and `size` number the tables above."""

    shape: int
    colour: int
    size: int
    count: int

    @property
    def name(self) -> str:
        """Colour and shape: `red circle`."""
        return f"{COLOURS[self.colour][0]} {SHAPES[self.shape][0]}"

    @property
    def phrase(self) -> str:
        """`a small red circle`, `three red circles`, `two red crosses`."""
        if self.count == 1:
            return f"a {SIZES[self.size][0]} {self.name}"
        return f"{COUNTS[self.count]} {plural(self.name)}"


class Thing(NamedTuple):
    """One drawn shape."""

    group: Group
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels
    shade: tuple[int, int, int]  # RGB


@dataclass(frozen=True)
class Scene:
    """`first` stands before `second` along `axis` (0: left to right, 1: top to bottom)."""

    first: Group
    second: Group
    axis: int
    things: tuple[Thing, ...]
    ground: tuple[int, int, int]  # RGB
    reverse: bool  # whether the caption starts from the second group

    @property
    def caption(self) -> str:
        """Both groups and how they stand to each other."""
        forward, backward = RELATIONS[self.axis]
        if self.reverse:
            return f"{self.second.phrase} {backward} {self.first.phrase}"
        return f"{self.first.phrase} {forward} {self.second.phrase}"

    def record(self) -> dict[str, object]:
        """What the json of a sample holds, but for its questions; `tags` and `objects` in the order of drawing."""
        tags = [thing.group.name for thing in self.things]
        objects = [{"name": thing.group.name, "box": list(thing.box)} for thing in self.things]
        return {"caption": self.caption, "tags": tags, "objects": objects, "width": SIDE, "height": SIDE}

    def draw(self) -> Pixels:
        """The picture, uint8 RGB [64, 64, 3]."""
        pixels = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
        pixels[:] = self.ground
        for thing in self.things:
            _draw(pixels, thing)
        return pixels


def _draw(pixels: Pixels, thing: Thing) -> None:
    x1, y1, x2, y2 = thing.box
    name, outline = SHAPES[thing.group.shape]
    if name == "circle":
        cv2.circle(pixels, ((x1 + x2) // 2, (y1 + y2) // 2), (x2 - x1) // 2, thing.shade, -1, cv2.LINE_AA)
        return
    corners = [(16 * (x1 + x * (x2 - x1)), 16 * (y1 + y * (y2 - y1))) for x, y in outline]
    cv2.fillPoly(pixels, [np.rint(corners).astype(np.int32)], thing.shade, cv2.LINE_AA, shift=4)


def _groups() -> list[Group]:
    """Every group there is: one of any size, or two or three small ones."""
    kinds = [(shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))]
    sizes = [(size, 1) for size in range(len(SIZES))] + [(0, 2), (0, 3)]
    return [Group(shape, colour, size, count) for shape, colour in kinds for size, count in sizes]


def descriptions() -> list[tuple[Group, Group, int]]:
    """Every (first, second, axis) with two groups that differ in shape or colour; 38,080 of them.

    Exactly one of them holds for a picture, and each caption tells one of them.
    """
    groups = _groups()
    return [
        (first, second, axis)
        for first in groups
        for second in groups
        if (first.shape, first.colour) != (second.shape, second.colour)
        for axis in range(len(RELATIONS))
    ]


def compose(first: Group, second: Group, axis: int, rng: Generator) -> Scene:
    """A scene of this description, with drawn places, shades, ground and direction of the caption."""
    things = (*_place(first, 0, axis, rng), *_place(second, 1, axis, rng))
    red, green, blue, reverse = rng.integers([225, 225, 225, 0], [256, 256, 256, 2]).tolist()
    return Scene(first, second, axis, things, (red, green, blue), bool(reverse))


def _place(group: Group, place: int, axis: int, rng: Generator) -> Iterator[Thing]:
    """The shapes of a group in its half of the picture, in a row across the axis."""
    half = SIZES[group.size][1]
    slack = SIDE // 4 - half - 1  # room to either side within a half
    draws = rng.integers([-slack, -5, *[-15] * 3], [slack + 1, 6, *[16] * 3]).tolist()
    along = SIDE // 4 + place * SIDE // 2 + draws[0]
    colour = COLOURS[group.colour][1]
    red, green, blue = (min(255, max(0, c + draw)) for c, draw in zip(colour, draws[2:], strict=True))
    for n in range(group.count):
        across = SIDE // 2 + draws[1] + round((n - (group.count - 1) / 2) * 17)
        x, y = (along, across) if axis == 0 else (across, along)
        yield Thing(group, (x - half, y - half, x + half, y + half), (red, green, blue))


def scenes(train: bool) -> Iterator[Scene]:
    """The scenes of one split, always the same: 16,384 for training, 512 for validation, all unlike."""
    everything = descriptions()
    order = np.random.Generator(np.random.PCG64(20)).permutation(len(everything))
    chosen = order[NUM_VAL : NUM_VAL + NUM_TRAIN] if train else order[:NUM_VAL]
    rng = np.random.Generator(np.random.PCG64([20, train]))
    for number in chosen.tolist():
        first, second, axis = everything[number]
        yield compose(first, second, axis, rng)
