"""Drawn videos whose sentences tell what happens when.

A video is four or five stretches of one and a half to two and a half seconds. In each one thing acts ("a small red
circle moves left beside a yellow star"), or two swap places, on a ground of its own. Frames, sentences and their
times all follow from one `Video`. No sentence fits two descriptions, and training and validation share none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from vlscale.data.decode import Pixels
from vlscale.data.scenes.drawing import COLOURS, SHAPES, Group

SIDE = 48  # pixels of the square frame
FPS = 8  # frames per second
NUM_TRAIN = 1_600
NUM_VAL = 256
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y downwards
ACTIONS = (*(f"moves {way}" for way in MOVES), "grows", "shrinks", "turns", "appears", "vanishes", "blinks")

_STRETCHES = (4, 5)  # of a video
_FRAMES = (12, 20)  # of a stretch; an even number
_HALVES = (5.0, 9.0)  # half the extent of a small and a large actor, in pixels
_MEDIUM = 6.0  # of all others
_SHARES = (0.25, 0.85)  # one thing alone in a quarter of the stretches, one beside another up to here, else a swap
_HELD_OUT = 8  # one in so many descriptions is for validation
_TRAVEL = 11.0  # pixels to either side of the middle
_BLINK = 3  # frames on, frames off


class Description(NamedTuple):
    """What happens: `actor` does ACTIONS[action], beside `other` where there is one; both swap where action is -1."""

    actor: Group
    action: int
    other: Group | None

    def sentence(self, reverse: bool) -> str:
        """`a small red circle moves left beside a yellow star`; `reverse` names a swap's second thing first."""
        if self.action < 0:
            assert self.other is not None
            first, second = (self.other, self.actor) if reverse else (self.actor, self.other)
            return f"a {first.name} and a {second.name} swap places".replace("a orange", "an orange")
        changes_size = ACTIONS[self.action] in ("grows", "shrinks")
        who = f"a {self.actor.name}" if changes_size else self.actor.phrase
        beside = f" beside a {self.other.name}" if self.other else ""
        return f"{who} {ACTIONS[self.action]}{beside}".replace("a orange", "an orange")


class Pose(NamedTuple):
    """How a thing stands in one frame, in pixels and degrees."""

    x: float
    y: float
    half: float  # half its extent
    turn: float = 0.0
    shown: bool = True


class Actor(NamedTuple):
    """One thing in every frame of its stretch."""

    group: Group
    shade: tuple[int, int, int]  # RGB
    poses: tuple[Pose, ...]


@dataclass(frozen=True)
class Stretch:
    """One thing that happens."""

    sentence: str
    actors: tuple[Actor, ...]
    ground: tuple[int, int, int]  # RGB

    def __len__(self) -> int:
        """Frames."""
        return len(self.actors[0].poses)

    def draw(self) -> Iterator[Pixels]:
        """Its frames, uint8 RGB [48, 48, 3]."""
        for number in range(len(self)):
            pixels = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
            pixels[:] = self.ground
            for actor in self.actors:
                if actor.poses[number].shown:
                    _paint(pixels, actor.group.shape, actor.poses[number], actor.shade)
            yield pixels


@dataclass(frozen=True)
class Video:
    """Stretches one after another."""

    stretches: tuple[Stretch, ...]

    def record(self) -> dict[str, object]:
        """What the json of a sample holds; times in seconds."""
        ends = np.cumsum([len(stretch) for stretch in self.stretches]).tolist()
        sentences = [
            {"start": (end - len(stretch)) / FPS, "end": end / FPS, "text": stretch.sentence}
            for stretch, end in zip(self.stretches, ends, strict=True)
        ]
        return {"sentences": sentences, "duration": ends[-1] / FPS, "width": SIDE, "height": SIDE}

    def draw(self) -> Iterator[Pixels]:
        """Its frames, uint8 RGB [48, 48, 3], eight a second."""
        for stretch in self.stretches:
            yield from stretch.draw()


def _paint(pixels: Pixels, shape: int, pose: Pose, shade: tuple[int, int, int]) -> None:
    name, outline = SHAPES[shape]
    if name == "circle":
        centre = (round(16 * pose.x), round(16 * pose.y))
        cv2.circle(pixels, centre, round(16 * pose.half), shade, -1, cv2.LINE_AA, shift=4)
        return
    along, across = math.cos(math.radians(pose.turn)), math.sin(math.radians(pose.turn))
    unit = [(2 * pose.half * (x - 0.5), 2 * pose.half * (y - 0.5)) for x, y in outline]
    corners = [(pose.x + along * x - across * y, pose.y + across * x + along * y) for x, y in unit]
    cv2.fillPoly(pixels, [np.rint(np.multiply(corners, 16)).astype(np.int32)], shade, cv2.LINE_AA, shift=4)


def descriptions() -> tuple[list[Description], list[Description], list[Description]]:
    """All there are: of one thing (616), of one beside another (20,944), of two that swap (595)."""
    kinds = [Group(shape, colour, 0, 1) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))]
    alone = [
        Description(Group(kind.shape, kind.colour, size, 1), action, None)
        for kind in kinds
        for action, name in enumerate(ACTIONS)
        for size in ((0,) if name in ("grows", "shrinks") else (0, 1))
        if name != "turns" or SHAPES[kind.shape][0] != "circle"
    ]
    beside = [
        Description(actor, action, kind)
        for actor, action, _ in alone
        for kind in kinds
        if (kind.shape, kind.colour) != (actor.shape, actor.colour)
    ]
    swaps = [Description(first, -1, second) for n, first in enumerate(kinds) for second in kinds[n + 1 :]]
    return alone, beside, swaps


def compose(description: Description, rng: Generator) -> Stretch:
    """A stretch of this description with drawn length, places, shades and ground."""
    frames = 2 * int(rng.integers(_FRAMES[0] // 2, _FRAMES[1] // 2 + 1))
    vertical, far, reverse = rng.integers(2, size=3).tolist()
    red, green, blue = rng.integers(225, 256, size=3).tolist()
    actor, action, other = description
    if action < 0:
        assert other is not None
        paths: list[tuple[Group, tuple[Pose, ...]]] = list(zip((actor, other), _swap(frames, rng), strict=True))
    else:
        name = ACTIONS[action]
        if name.startswith("moves"):
            vertical = abs(MOVES[name.split()[1]][1])
        paths = [(actor, _act(name, _HALVES[actor.size], _lane(vertical, far, rng), frames, rng))]
        if other is not None:
            paths.append((other, (Pose(*_lane(vertical, 1 - far, rng, wide=True), _MEDIUM),) * frames))
    actors = tuple(Actor(group, _shade(group, rng), poses) for group, poses in paths)
    return Stretch(description.sentence(bool(reverse)), actors, (red, green, blue))


def _lane(vertical: int, far: int, rng: Generator, wide: bool = False) -> tuple[float, float]:
    """The middle of one half of the frame, a little off; `wide` = anywhere along it."""
    across, along = rng.integers([-1, -9 if wide else -2], [2, 10 if wide else 3]).tolist()
    place = SIDE / 4 + far * SIDE / 2 + across, SIDE / 2 + along
    return place if vertical else place[::-1]


def _act(name: str, half: float, middle: tuple[float, float], frames: int, rng: Generator) -> tuple[Pose, ...]:
    """The actor's pose in every frame. What appears or vanishes does so in the middle third, at an odd frame."""
    x, y = middle
    still = Pose(x, y, half)
    first, way = int(rng.integers(0, 360)), int(rng.integers(2))
    change = 1 + 2 * int(rng.integers(frames // 6, frames // 3))
    ways = [-1 + 2 * n / (frames - 1) for n in range(frames)]  # -1 to 1
    if name.startswith("moves"):
        right, down = MOVES[name.split()[1]]
        return tuple(still._replace(x=x + _TRAVEL * s * right, y=y + _TRAVEL * s * down) for s in ways)
    if name in ("grows", "shrinks"):
        sign = 1 if name == "grows" else -1
        return tuple(still._replace(half=sum(_HALVES) / 2 + sign * s * (_HALVES[1] - _HALVES[0]) / 2) for s in ways)
    if name == "turns":
        return tuple(still._replace(turn=first + (15.0 if way else -15.0) * n) for n in range(frames))
    if name == "blinks":
        return tuple(still._replace(shown=n // _BLINK % 2 == 0) for n in range(frames))
    return tuple(still._replace(shown=(n >= change) == (name == "appears")) for n in range(frames))


def _swap(frames: int, rng: Generator) -> tuple[tuple[Pose, ...], tuple[Pose, ...]]:
    """Both on half a circle around the middle of the frame."""
    first, sign = float(rng.uniform(0, 2 * math.pi)), -1 if rng.integers(2) else 1
    angles = [first + sign * math.pi * n / (frames - 1) for n in range(frames)]
    offsets = [(_TRAVEL * math.cos(angle), _TRAVEL * math.sin(angle)) for angle in angles]
    middle = SIDE / 2
    return (
        tuple(Pose(middle + x, middle + y, _MEDIUM) for x, y in offsets),
        tuple(Pose(middle - x, middle - y, _MEDIUM) for x, y in offsets),
    )


def _shade(group: Group, rng: Generator) -> tuple[int, int, int]:
    offs = rng.integers(-15, 16, size=3).tolist()
    red, green, blue = (min(255, max(0, c + off)) for c, off in zip(COLOURS[group.colour][1], offs, strict=True))
    return red, green, blue


def videos(train: bool) -> Iterator[Video]:
    """The videos of one split, always the same: 1,600 for training, 256 for validation."""
    shuffle = np.random.Generator(np.random.PCG64(25))
    pools = [_part(pool, shuffle.permutation(len(pool)).tolist(), train) for pool in descriptions()]
    rng = np.random.Generator(np.random.PCG64([25, train]))
    for _ in range(NUM_TRAIN if train else NUM_VAL):
        stretches = []
        for _ in range(int(rng.integers(_STRETCHES[0], _STRETCHES[1] + 1))):
            pool = pools[int(np.searchsorted(_SHARES, rng.uniform(), side="right"))]
            stretches.append(compose(pool[int(rng.integers(len(pool)))], rng))
        yield Video(tuple(stretches))


def _part(pool: Sequence[Description], order: list[int], train: bool) -> list[Description]:
    """The descriptions of one split."""
    first = len(pool) // _HELD_OUT
    return [pool[number] for number in (order[first:] if train else order[:first])]
