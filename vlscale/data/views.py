"""Seeded views of a sample: what is done to the picture and to the text before the model sees them.

Every operation is a frozen dataclass of its options, applied by calling it with a generator of the sample's
own, so that the result depends on the sample and its position only. Pictures are uint8 RGB [H, W, 3], texts
int64 [L].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol, TypeVar, get_type_hints

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.decode import Pixels, resize
from vlscale.errors import ConfigError, did_you_mean
from vlscale.types import IGNORE

Ids = NDArray[np.int64]
T = TypeVar("T")


class Vocabulary(Protocol):
    """What masking needs to know of a tokenizer."""

    pad: int
    cls: int
    sep: int
    mask: int
    vocab_size: int


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the picture, resized to a square: area share in `scale`, width/height in `ratio`."""

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        _require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "two rising numbers in (0, 1]")
        _require(0 < self.ratio[0] <= self.ratio[1], "ratio", "two rising numbers above 0")

    def __call__(self, pixels: Pixels, size: int, rng: Generator) -> Pixels:
        """[size, size, 3]. Ten tries, then the largest centred part of an allowed ratio, as torchvision."""
        top, left, height, width = self.box(pixels.shape[0], pixels.shape[1], rng)
        return resize(pixels[top : top + height, left : left + width], size, size)

    def box(self, height: int, width: int, rng: Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part in pixels."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            draws = rng.random(4).tolist()
            area = height * width * (self.scale[0] + draws[0] * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + draws[1] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1)), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with probability `prob`; wrong for captions that tell left from right."""

    prob: float = 0.5

    def __post_init__(self) -> None:
        _require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")

    def __call__(self, pixels: Pixels, rng: Generator) -> Pixels:
        """[H, W, 3]."""
        return pixels[:, ::-1] if rng.random() < self.prob else pixels


_FILL = (128, 128, 128)  # grey, where a warp shows what lies outside the picture


@dataclass(frozen=True)
class RandAugment:
    """ALBEF's RandomAugment (its dataset/randaugment.py): `num` operations drawn with replacement.

    Each drawn operation is applied with probability `prob`, at `level` of 10: brightness and sharpness by the
    factor 0.1 + 0.18 * level, shear by 0.03 * level, shift by `level` pixels, rotation by 3 * level degrees,
    the last three to either side. The authors' sharpness wraps round at 0 and 255; here it is clipped.
    """

    num: int = 2
    level: float = 7
    prob: float = 0.5

    def __post_init__(self) -> None:
        _require(self.num >= 0, "num", "a whole number from 0")
        _require(0 <= self.level <= 10, "level", "a number in [0, 10]")
        _require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")

    def __call__(self, pixels: Pixels, rng: Generator) -> Pixels:
        """[H, W, 3]."""
        for choice, chance, side in rng.random((self.num, 3)).tolist():
            if chance < self.prob:
                operation = _OPERATIONS[int(choice * len(_OPERATIONS))]
                pixels = operation(pixels, self.level, 1.0 if side < 0.5 else -1.0)
        return pixels


def identity(pixels: Pixels, level: float, sign: float) -> Pixels:
    """The picture as it is."""
    return pixels


def auto_contrast(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Stretch every channel to 0..255, as Pillow's `autocontrast`."""
    low = pixels.min(axis=(0, 1)).astype(np.float64)
    high = pixels.max(axis=(0, 1)).astype(np.float64)
    span = np.where(high > low, high - low, 255.0)
    low = np.where(high > low, low, 0.0)
    table = (np.arange(256)[:, None] - low) * (255.0 / span)  # [256, 3]
    return _look_up(pixels, table)


def equalize(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Flatten every channel's histogram, as Pillow's `equalize` (OpenCV's own differs)."""
    return _look_up(pixels, np.stack([_equal_table(pixels[..., c]) for c in range(3)], axis=1))


def _equal_table(channel: NDArray[np.uint8]) -> NDArray[np.float64]:
    counts = np.bincount(channel.reshape(-1), minlength=256)
    used = counts[counts > 0]
    step = int(used[:-1].sum()) // 255
    if step == 0:
        return np.arange(256, dtype=np.float64)
    before = np.concatenate([[step // 2], counts[:-1]])
    return (np.cumsum(before) // step).astype(np.float64)


def brightness(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Scale every value by the level's factor."""
    factor = np.float32(0.1 + 0.18 * level)
    return _look_up(pixels, (np.arange(256, dtype=np.float32) * factor)[:, None])


def sharpness(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Move away from (or to) a smoothed picture by the level's factor; the outermost pixels stay."""
    kernel = np.ones((3, 3), dtype=np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(pixels, -1, kernel / 13)
    factor = 0.1 + 0.18 * level
    out = pixels.copy()
    mixed = cv2.addWeighted(pixels, factor, smooth, 1 - factor, 0)
    out[1:-1, 1:-1] = mixed[1:-1, 1:-1]
    return out


def shear_x(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Shift each row in proportion to its height."""
    return _warp(pixels, [[1, sign * 0.03 * level, 0], [0, 1, 0]])


def shear_y(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Shift each column in proportion to its place."""
    return _warp(pixels, [[1, 0, 0], [sign * 0.03 * level, 1, 0]])


def translate_x(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Shift sideways by `level` pixels."""
    return _warp(pixels, [[1, 0, -sign * level], [0, 1, 0]])


def translate_y(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Shift up or down by `level` pixels."""
    return _warp(pixels, [[1, 0, 0], [0, 1, -sign * level]])


def rotate(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Turn about the centre by 3 * level degrees."""
    height, width = pixels.shape[:2]
    return _warp(pixels, cv2.getRotationMatrix2D((width / 2, height / 2), sign * 3 * level, 1))


def _look_up(pixels: Pixels, table: NDArray[Any]) -> Pixels:
    """Each value through `table` [256, 1 or 3], clipped to bytes and rounded towards zero."""
    bytes_ = np.clip(table, 0, 255).astype(np.uint8)[None]
    changed: Pixels = cv2.LUT(np.ascontiguousarray(pixels), bytes_)
    return changed


def _warp(pixels: Pixels, matrix: Any) -> Pixels:
    height, width = pixels.shape[:2]
    moved: Pixels = cv2.warpAffine(pixels, np.float32(matrix), (width, height), borderValue=_FILL)
    return moved


_OPERATIONS = (  # ALBEF's list: no operation changes colours
    identity,
    auto_contrast,
    equalize,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    rotate,
)


@dataclass(frozen=True)
class MaskTokens:
    """BERT's masking: each token is picked with probability `prob`; the labels hold what was there.

    A picked token becomes [MASK] with probability `mask_share`, a uniform id in [0, vocabulary) with
    `random_share` (special ids included, as in ALBEF), else stays. [PAD], [CLS] and [SEP] are never picked.
    If no token was picked and `at_least_one` holds, one is, uniformly; in ALBEF such a text adds no term.
    """

    prob: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    at_least_one: bool = True

    def __post_init__(self) -> None:
        _require(0 < self.prob <= 1, "prob", "a number above 0 and at most 1")
        _require(0 <= self.mask_share <= 1, "mask_share", "a number in [0, 1]")
        rest = round(1 - self.mask_share, 9)
        _require(0 <= self.random_share <= rest, "random_share", f"a number in [0, {rest:g}]")

    def __call__(self, ids: Ids, vocabulary: Vocabulary, rng: Generator) -> tuple[Ids, Ids]:
        """(ids [L] with masks, labels [L] with IGNORE wherever nothing is predicted)."""
        open_ = (ids != vocabulary.pad) & (ids != vocabulary.cls) & (ids != vocabulary.sep)
        draws = rng.random((2, len(ids)))
        picked = open_ & (draws[0] < self.prob)
        if self.at_least_one and not picked.any() and open_.any():
            picked[rng.choice(np.flatnonzero(open_))] = True
        labels = np.where(picked, ids, IGNORE)
        masked = np.where(picked & (draws[1] < self.mask_share), vocabulary.mask, ids)
        swapped = picked & (draws[1] >= self.mask_share) & (draws[1] < self.mask_share + self.random_share)
        if swapped.any():
            masked[swapped] = rng.integers(vocabulary.vocab_size, size=int(swapped.sum()))
        return masked, labels


@dataclass(frozen=True)
class VisualView:
    """One view of the pictures: crop or plain resize, then flip, then augment."""

    random_resized_crop: RandomResizedCrop | None = None
    flip: Flip | None = None
    rand_augment: RandAugment | None = None

    def __call__(self, pixels: Pixels, size: int, rng: Generator) -> Pixels:
        """uint8 [size, size, 3]."""
        crop = self.random_resized_crop
        pixels = crop(pixels, size, rng) if crop else resize(pixels, size, size)
        if self.flip:
            pixels = self.flip(pixels, rng)
        if self.rand_augment:
            pixels = self.rand_augment(pixels, rng)
        return pixels


@dataclass(frozen=True)
class TextView:
    """One view of the captions: as they are, or masked."""

    mask_tokens: MaskTokens | None = None

    def __call__(self, ids: Ids, vocabulary: Vocabulary, rng: Generator) -> tuple[Ids, Ids | None]:
        """(ids [L], labels [L] or None where nothing is predicted)."""
        return self.mask_tokens(ids, vocabulary, rng) if self.mask_tokens else (ids, None)


@dataclass(frozen=True)
class Views:
    """The views that a run builds of every sample, by name (`clean`, `masked`, `augmented`)."""

    visual: Mapping[str, VisualView] = field(default_factory=dict)
    text: Mapping[str, TextView] = field(default_factory=dict)

    def names(self) -> frozenset[str]:
        """As written in a recipe: `visual.clean`, `text.masked`."""
        return frozenset([f"visual.{name}" for name in self.visual] + [f"text.{name}" for name in self.text])


VIEW_NAMES = ("clean", "masked", "augmented")


def parse(views: Mapping[str, Mapping[str, Mapping[str, Any] | None] | None]) -> Views:
    """A recipe's `views` as operations.

    {"text.masked": {"mask_tokens": {"prob": 0.15}}, "visual.clean": {}}: a name is the modality and the view,
    each operation has its options, and what is not written has its default. ConfigError names the wrong key.
    """
    visual: dict[str, VisualView] = {}
    text: dict[str, TextView] = {}
    known = [f"{modality}.{view}" for modality in ("visual", "text") for view in VIEW_NAMES]
    for name, operations in views.items():
        if name not in known:
            raise ConfigError(f"views.{name} is not a view{did_you_mean(str(name), known)}")
        modality, _, view = name.partition(".")
        if modality == "visual":
            visual[view] = _build(VisualView, operations, f"views.{name}", "operation")
        else:
            text[view] = _build(TextView, operations, f"views.{name}", "operation")
    return Views(visual, text)


def _build(kind: type[T], options: Any, where: str, noun: str) -> T:
    """The dataclass `kind` from a mapping of its fields."""
    given = {} if options is None else options
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: should be a mapping of {noun}s (got {given!r})")
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in names:
            article = "an" if noun[0] in "aeiou" else "a"
            raise ConfigError(f"{where}.{name} is not {article} {noun}{did_you_mean(str(name), names)}")
        values[name] = _value(hints[name], value, f"{where}.{name}")
    try:
        return kind(**values)
    except _OptionError as error:
        got = values.get(error.name, "its default")
        raise ConfigError(f"{where}.{error.name}: should be {error.expected} (got {got!r})") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """One option, checked against its type: an operation, a flag, a number or a pair of numbers."""
    parts = getattr(hint, "__args__", ())
    operation = next((kind for kind in parts if isinstance(kind, type) and is_dataclass(kind)), None)
    if operation is not None:
        return _build(operation, value, where, "option")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and number and value == int(value):
        return int(value)
    if hint is float and number:
        return float(value)
    if hint == tuple[float, float] and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_value(float, part, where) for part in value)
    expected = {bool: "true or false", int: "a whole number", float: "a number"}
    raise ConfigError(f"{where}: should be {expected.get(hint, 'a list of two numbers')} (got {value!r})")


class _OptionError(ConfigError):
    """An option out of its range, raised where only the option's own name is known."""

    def __init__(self, name: str, expected: str) -> None:
        super().__init__(f"{name} should be {expected}")
        self.name = name
        self.expected = expected


def _require(holds: bool, name: str, expected: str) -> None:
    if not holds:
        raise _OptionError(name, expected)
