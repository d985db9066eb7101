"""The frames of a clip: what is done to them before the model sees them.

T frames of a clip, F numbers of a feature; frames are uint8 RGB pixels [T, H, W, 3], features [T, F], or visual words
[T] (features then have F = 0). Every operation is a frozen dataclass of its options, called with the frames and a
generator of the sample's own; it gives the frames changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.augment import Blur, ColorJitter, Flip, Grayscale, RandomResizedCrop, require
from vlscale.data.decode import Crop
from vlscale.types import HIDDEN, IGNORE


class Frames(NamedTuple):
    """The frames of one clip in one view, as `Visual` has them for a whole batch; what nobody made is None."""

    feats: NDArray[Any]  # features float32 [T, F], or pixels uint8 [T, H, W, 3]
    codes: NDArray[np.int64] | None = None  # [T] visual words
    picked: NDArray[np.bool_] | None = None  # [T] what an objective restores
    targets: NDArray[Any] | None = None  # [T, F] features as they were, where some are hidden
    code_labels: NDArray[np.int64] | None = None  # [T] the visual word to restore, else IGNORE
    order: NDArray[np.int64] | None = None  # [T] the place that each frame is moved to
    vocabulary: int = 0  # how many visual words there are
    window: int = 1  # frames that a tower makes one place of, which are hidden together

    @property
    def length(self) -> int:
        """T."""
        return len(self.feats)

    @property
    def pixels(self) -> bool:
        """Whether they are pictures."""
        return self.feats.ndim == 4


@dataclass(frozen=True)
class RandomCrop:
    """A square at a random place, the same in all frames, in the clip's own pixels (MIL-NCE: video_loader.py).

    `resize` none: as large as the family reads (`crop_only`); of a clip that is smaller, as with `shortest`: as large
    as fits, then resized.
    """

    resize: Literal["none", "shortest"] = "none"

    def __call__(self, height: int, width: int, size: int, rng: Generator) -> Crop:
        """Of a clip of these sides."""
        fits = self.resize == "none" and size <= min(height, width)
        side = size if fits else min(height, width)
        down, right = rng.random(2)
        return Crop(int(down * (height - side + 1)), int(right * (width - side + 1)), side, side, (size, size))


@dataclass(frozen=True)
class MaskFrames:
    """Each frame is picked with probability `prob`, its feature becomes zero, and what it was is left to restore.

    Pixels stay: their family hides the feature that it makes of a picked frame. HERO and BERT pick `at_least_one`;
    UniVL picks none where none is drawn.
    """

    prob: float = 0.15
    at_least_one: bool = True

    def __post_init__(self) -> None:
        require(0 < self.prob <= 1, "prob", "a number above 0 and at most 1")

    def __call__(self, frames: Frames, rng: Generator) -> Frames:
        """With `picked` and, of features, `targets`."""
        picked = drawn(-(-frames.length // frames.window), self.prob, self.at_least_one, rng)
        if frames.pixels:
            return frames._replace(picked=picked.repeat(frames.window)[: frames.length])
        hidden = np.where(picked[:, None], np.float32(0), frames.feats)
        return frames._replace(feats=hidden, picked=picked, targets=frames.feats)


@dataclass(frozen=True)
class ShuffleFrames:
    """Each frame is picked with probability `prob`; those that are change places among themselves, or stay by chance
    (HERO: data/fom.py). `order` says where each goes, `picked` which ones take part; the frames stay as they are: their
    family moves what it makes of them.
    """

    prob: float = 0.15

    def __post_init__(self) -> None:
        require(0 < self.prob <= 1, "prob", "a number above 0 and at most 1")

    def __call__(self, frames: Frames, rng: Generator) -> Frames:
        """With `picked` and `order`."""
        picked = drawn(frames.length, self.prob, False, rng)
        order = np.arange(frames.length)
        order[picked] = rng.permutation(np.flatnonzero(picked))
        return frames._replace(picked=picked, order=order)


@dataclass(frozen=True)
class SkipFrames:
    """Every n-th frame alone, n uniform from 1 to `most_step` for each clip, so that it passes at different speeds
    (VideoBERT)."""

    most_step: int = 5

    def __post_init__(self) -> None:
        require(self.most_step >= 1, "most_step", "a whole number from 1 on")

    def __call__(self, frames: Frames, rng: Generator) -> Frames:
        """From the first frame on."""
        step = int(rng.integers(1, self.most_step + 1))
        kept: dict[str, Any] = {
            name: value[::step] for name, value in frames._asdict().items() if isinstance(value, np.ndarray)
        }
        return frames._replace(**kept)


@dataclass(frozen=True)
class MaskWords:
    """BERT's masking of visual words (VideoBERT): each is picked with probability `prob`, one at least, and is to be
    restored. It is hidden with probability `mask_share`, becomes a random visual word with `random_share`, else stays.
    """

    prob: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    at_least_one: bool = True

    def __post_init__(self) -> None:
        require(0 < self.prob <= 1, "prob", "a number above 0 and at most 1")
        require(0 <= self.mask_share <= 1, "mask_share", "a number in [0, 1]")
        rest = round(1 - self.mask_share, 9)
        require(0 <= self.random_share <= rest, "random_share", f"a number in [0, {rest:g}]")

    def __call__(self, frames: Frames, rng: Generator) -> Frames:
        """With `picked` and `code_labels`; `codes` changed."""
        assert frames.codes is not None, "visual words are of families that read them"
        picked = drawn(frames.length, self.prob, self.at_least_one, rng)
        fate = rng.random(frames.length)
        other = rng.integers(frames.vocabulary, size=frames.length)
        codes = np.where(picked & (fate < self.mask_share + self.random_share), other, frames.codes)
        codes = np.where(picked & (fate < self.mask_share), HIDDEN, codes)
        labels = np.where(picked, frames.codes, IGNORE)
        return frames._replace(codes=codes, picked=picked, code_labels=labels)


def drawn(count: int, prob: float, at_least_one: bool, rng: Generator) -> NDArray[np.bool_]:
    """[count] which places are picked, each with probability `prob`."""
    picked = rng.random(count) < prob
    if at_least_one and count and not picked.any():
        picked[rng.integers(count)] = True
    return picked


@dataclass(frozen=True)
class PoolFrames:
    """Features become one row, the greatest of each number over time: what HowTo100M's family would take from them."""

    def __call__(self, frames: Frames, rng: Generator) -> Frames:
        """With one frame."""
        return frames._replace(feats=frames.feats.max(axis=0, keepdims=True))


@dataclass(frozen=True)
class FrameView:
    """One view of a clip: a crop of its pixels, or all of them resized to a square; then the operations in the order
    that they stand here. What is drawn for pixels is drawn once for all frames."""

    random_crop: RandomCrop | None = None
    random_resized_crop: RandomResizedCrop | None = None
    color_jitter: ColorJitter | None = None
    grayscale: Grayscale | None = None
    blur: Blur | None = None
    flip: Flip | None = None
    skip_frames: SkipFrames | None = None
    pool_frames: PoolFrames | None = None
    mask_frames: MaskFrames | None = None
    mask_words: MaskWords | None = None
    shuffle_frames: ShuffleFrames | None = None

    def __post_init__(self) -> None:
        alone = not (self.random_crop and self.random_resized_crop)
        require(alone, "random_crop", "left out beside random_resized_crop")
        require(not (self.mask_frames and self.shuffle_frames), "shuffle_frames", "left out beside mask_frames")

    def crop(self, height: int, width: int, size: int, rng: Generator) -> Crop:
        """Which part of a clip of these sides it shows, [size, size]."""
        crop = self.random_crop or self.random_resized_crop
        return crop(height, width, size, rng) if crop else Crop(0, 0, height, width, (size, size))

    def __call__(self, frames: Frames, rng: Generator) -> Frames:
        """The frames changed; `rng` draws all that is drawn."""
        for augment in (self.color_jitter, self.grayscale, self.blur, self.flip):
            if augment is not None and frames.pixels:
                start, changed = rng.bit_generator.state, []
                for frame in frames.feats.copy():  # another view may show the same ones
                    rng.bit_generator.state = start
                    changed.append(augment(frame, rng))
                frames = frames._replace(feats=np.stack(changed))
        for operation in (self.skip_frames, self.pool_frames, self.mask_frames, self.mask_words, self.shuffle_frames):
            if operation is not None:
                frames = operation(frames, rng)
        return frames
