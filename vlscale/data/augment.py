"""What may be done to a picture, each a frozen dataclass of options called with the sample's own generator.

Pictures are uint8 RGB [H, W, 3]; what is drawn depends on the generator alone. Crops are told before the picture is
decoded, from its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.decode import Crop, Pixels
from vlscale.errors import ConfigError


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the picture, resized to a square: area share in `scale`, width/height in `ratio`."""

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "two rising numbers in (0, 1]")
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", "two rising numbers above 0")

    def __call__(self, height: int, width: int, size: int, rng: Generator) -> Crop:
        """Of a picture of these sides. Ten tries, then the largest centred part of an allowed ratio, as torchvision."""
        return Crop(*self.box(height, width, rng), size=(size, size))

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
class KeepRatio:
    """The whole picture in its own shape: the shorter side `short` pixels, the longer at most `long` (SOHO).

    Small pictures are enlarged. The factor, the rounding to whole pixels and the bilinear filter are mmcv's, which the
    authors take. `multiple` and `mask` say how a batch of such pictures is padded: see `pictures.pad_pictures`.
    """

    short: int = 600  # configs/Pretrain/soho_res18_pre.py: img_scale
    long: int = 1000
    multiple: int = 32  # size_divisor
    mask: Literal["picture", "authors"] = "picture"

    def __post_init__(self) -> None:
        require(self.short >= 1, "short", "a whole number from 1")
        require(self.long >= self.short, "long", f"at least short ({self.short})")
        require(self.multiple >= 32 and self.multiple % 32 == 0, "multiple", "a multiple of 32, the trunk's stride")
        require(self.mask in ("picture", "authors"), "mask", "'picture' or 'authors'")

    def __call__(self, height: int, width: int) -> Crop:
        """All of a picture of these sides."""
        return Crop(0, 0, height, width, self.size(height, width), bilinear=True)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of these sides gets, each at least one pixel."""
        factor = min(self.long / max(height, width), self.short / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with probability `prob`; wrong for captions that tell left from right."""

    prob: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")

    def __call__(self, pixels: Pixels, rng: Generator) -> Pixels:
        """[H, W, 3], in the memory of `pixels`."""
        return cv2.flip(pixels, 1, dst=pixels) if rng.random() < self.prob else pixels


_FILL = (128, 128, 128)  # grey, where a warp shows what lies outside the picture


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, in a drawn order, all with probability `prob` (torchvision's
    ColorJitter; MoCo v2 and TCL: 0.4, 0.4, 0.4, 0.1 with 0.8).

    A strength s of the first three draws a factor from [max(0, 1 - s), 1 + s]; the hue turns by a share of the
    circle from [-s, s].
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    prob: float = 0.8

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            require(getattr(self, name) >= 0, name, "a number from 0")
        require(0 <= self.hue <= 0.5, "hue", "a number in [0, 0.5]")
        require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")

    def __call__(self, pixels: Pixels, rng: Generator) -> Pixels:
        """[H, W, 3]."""
        chance, *draws = rng.random(5).tolist()
        order = rng.permutation(4).tolist()
        if chance >= self.prob:
            return pixels
        strengths = (self.brightness, self.contrast, self.saturation)
        for number in order:
            if number < 3:
                least, greatest = max(0.0, 1 - strengths[number]), 1 + strengths[number]
                other = (_black, _mean_gray, _gray)[number](pixels)
                pixels = _blend(pixels, other, least + draws[number] * (greatest - least))
            elif self.hue:
                pixels = turn_hue(pixels, (2 * draws[3] - 1) * self.hue)
        return pixels


@dataclass(frozen=True)
class Grayscale:
    """No colours, with probability `prob` (MoCo v2, TCL: 0.2)."""

    prob: float = 0.2

    def __post_init__(self) -> None:
        require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")

    def __call__(self, pixels: Pixels, rng: Generator) -> Pixels:
        """[H, W, 3], three equal channels."""
        return _gray(pixels) if rng.random() < self.prob else pixels


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of a drawn width in pixels, with probability `prob` (MoCo v2, TCL: 0.1 to 2.0 with 0.5)."""

    sigma: tuple[float, float] = (0.1, 2.0)
    prob: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.sigma[0] <= self.sigma[1], "sigma", "two rising numbers above 0")
        require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")

    def __call__(self, pixels: Pixels, rng: Generator) -> Pixels:
        """[H, W, 3]."""
        chance, draw = rng.random(2).tolist()
        if chance >= self.prob:
            return pixels
        sigma = self.sigma[0] + draw * (self.sigma[1] - self.sigma[0])
        blurred: Pixels = cv2.GaussianBlur(pixels, (0, 0), sigma)
        return blurred


def turn_hue(pixels: Pixels, share: float) -> Pixels:
    """Every colour moved along the circle of hues by a share of it."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(share * 256) % 256)  # bytes wrap round, as hues do
    turned: Pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return turned


def _gray(pixels: Pixels) -> Pixels:
    gray: Pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return gray


def _mean_gray(pixels: Pixels) -> Pixels:
    return np.full_like(pixels, int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5))


def _black(pixels: Pixels) -> Pixels:
    return np.zeros_like(pixels)


def _blend(pixels: Pixels, other: Pixels, factor: float) -> Pixels:
    """factor * pixels + (1 - factor) * other, kept within bytes."""
    mixed: Pixels = cv2.addWeighted(pixels, factor, other, 1 - factor, 0.0)
    return mixed


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
        require(self.num >= 0, "num", "a whole number from 0")
        require(0 <= self.level <= 10, "level", "a number in [0, 10]")
        require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")

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
    return _by_channel(pixels, _stretching)


def _stretching(channel: Pixels) -> NDArray[np.float64]:
    low, high, *_ = cv2.minMaxLoc(channel)
    values = np.arange(256, dtype=np.float64)
    return values if low == high else (values - low) * (255.0 / (high - low))


def equalize(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Flatten every channel's histogram, as Pillow's `equalize` (OpenCV's own differs)."""
    return _by_channel(pixels, _flattening)


def _flattening(channel: Pixels) -> NDArray[np.float64]:
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).reshape(-1).astype(np.int64)
    used = counts[counts > 0]
    step = int(used[:-1].sum()) // 255
    if step == 0:
        return np.arange(256, dtype=np.float64)
    before = np.concatenate([[step // 2], counts[:-1]])
    return (np.cumsum(before) // step).astype(np.float64)


def brightness(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Scale every value by the level's factor."""
    factor = np.float32(0.1 + 0.18 * level)
    return _look_up(pixels, np.arange(256, dtype=np.float32) * factor)


def sharpness(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Move away from (or to) a smoothed picture by the level's factor; the outermost pixels stay."""
    factor = 0.1 + 0.18 * level
    # smoothed = (9 mean + 4 own) / 13 of the nine pixels around: weights 1, and 5 in the middle
    out: Pixels = cv2.addWeighted(
        pixels, factor + (1 - factor) * 4 / 13, cv2.blur(pixels, (3, 3)), (1 - factor) * 9 / 13, 0
    )
    out[[0, -1]], out[:, [0, -1]] = pixels[[0, -1]], pixels[:, [0, -1]]
    return out


def shear_x(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Shift each row in proportion to its height."""
    return _warp(pixels, [[1, sign * 0.03 * level, 0], [0, 1, 0]])


def shear_y(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Shift each column in proportion to its place."""
    return _warp(pixels, [[1, 0, 0], [sign * 0.03 * level, 1, 0]])


def translate_x(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Shift sideways by `level` pixels."""
    return _shift(pixels, 0.0, -sign * level)


def translate_y(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Shift up or down by `level` pixels."""
    return _shift(pixels, -sign * level, 0.0)


def rotate(pixels: Pixels, level: float, sign: float) -> Pixels:
    """Turn about the centre by 3 * level degrees."""
    height, width = pixels.shape[:2]
    return _warp(pixels, cv2.getRotationMatrix2D((width / 2, height / 2), sign * 3 * level, 1))


def _look_up(pixels: Pixels, table: NDArray[Any]) -> Pixels:
    """Each value through `table` [256], clipped to bytes and rounded towards zero."""
    changed: Pixels = cv2.LUT(pixels, np.clip(table, 0, 255).astype(np.uint8))
    return changed


def _by_channel(pixels: Pixels, table: Callable[[Pixels], NDArray[Any]]) -> Pixels:
    """Each channel through a table that is made from it: faster in planes than all three at once."""
    changed: Pixels = cv2.merge([_look_up(channel, table(channel)) for channel in cv2.split(pixels)])
    return changed


def _shift(pixels: Pixels, down: float, right: float) -> Pixels:
    if down % 1 or right % 1:
        return _warp(pixels, [[1, 0, right], [0, 1, down]])
    moved = np.full_like(pixels, _FILL[0])
    rows, columns = (_overlap(side, int(by)) for side, by in zip(pixels.shape, (down, right), strict=False))
    moved[rows[1], columns[1]] = pixels[rows[0], columns[0]]
    return moved


def _overlap(side: int, by: int) -> tuple[slice, slice]:
    """Which of `side` pixels stay in sight when all move by so many, before and after."""
    least, most = min(side, max(0, by)), max(0, side + min(0, by))
    return slice(least - by, most - by), slice(least, most)


def _warp(pixels: Pixels, matrix: Any) -> Pixels:
    """As it would be done to three channels, in two thirds of the time: OpenCV is at its best with four."""
    height, width = pixels.shape[:2]
    four = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)
    moved = cv2.warpAffine(four, np.float32(matrix), (width, height), borderValue=(*_FILL, 255))
    colours: Pixels = cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB)
    return colours


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


class OptionError(ConfigError):
    """An option out of its range, raised where only the option's own name is known."""

    def __init__(self, name: str, expected: str) -> None:
        super().__init__(f"{name} should be {expected}")
        self.name = name
        self.expected = expected


def require(holds: bool, name: str, expected: str) -> None:
    """OptionError unless `holds`."""
    if not holds:
        raise OptionError(name, expected)
