"""Seeded views of a sample: what is done to the picture and to the text before the model sees them, and which text
and which picture stand together.

Every operation is a frozen dataclass of its options, applied by calling it with a generator of the sample's
own, so that the result depends on the sample and its position only. Pictures are uint8 RGB [H, W, 3], texts
int64 [L].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.augment import (
    Blur,
    ColorJitter,
    Flip,
    Grayscale,
    KeepRatio,
    OptionError,
    RandAugment,
    RandomResizedCrop,
    require,
)
from vlscale.data.decode import Crop, Pixels
from vlscale.data.masking import Ids, MaskTokens, Vocabulary
from vlscale.data.regions import Floats, MaskRegions
from vlscale.errors import ConfigError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class VisualView:
    """One view of the pictures: a crop, its own shape, or plain resize, then the others in the order that they stand
    here."""

    random_resized_crop: RandomResizedCrop | None = None
    keep_ratio: KeepRatio | None = None  # of families that read pictures of any size
    color_jitter: ColorJitter | None = None
    grayscale: Grayscale | None = None
    blur: Blur | None = None
    flip: Flip | None = None
    rand_augment: RandAugment | None = None

    def __post_init__(self) -> None:
        alone = not (self.keep_ratio and self.random_resized_crop)
        require(alone, "keep_ratio", "left out beside random_resized_crop, which makes squares")

    def crop(self, height: int, width: int, size: int, rng: Generator) -> Crop:
        """Which part of a picture of these sides it shows: [size, size], or [h, w] with `keep_ratio`."""
        if self.keep_ratio:
            return self.keep_ratio(height, width)
        if self.random_resized_crop:
            return self.random_resized_crop(height, width, size, rng)
        return Crop(0, 0, height, width, (size, size))

    def __call__(self, pixels: Pixels, rng: Generator) -> Pixels:
        """The part [h, w, 3] changed."""
        for operation in (self.color_jitter, self.grayscale, self.blur, self.flip, self.rand_augment):
            if operation is not None:
                pixels = operation(pixels, rng)
        return pixels


@dataclass(frozen=True)
class RegionView:
    """One view of a detector's regions: as they are, or some of them hidden."""

    mask_regions: MaskRegions | None = None

    def __call__(
        self, feats: Floats, other: Callable[[Generator], Floats | None], rng: Generator
    ) -> tuple[Floats, NDArray[np.bool_] | None]:
        """(features [R, F], picked [R] or None where nothing is hidden)."""
        return self.mask_regions(feats, other, rng) if self.mask_regions else (feats, None)


@dataclass(frozen=True)
class TextView:
    """One view of the captions: as they are, or masked."""

    mask_tokens: MaskTokens | None = None

    def __call__(self, ids: Ids, vocabulary: Vocabulary, rng: Generator) -> tuple[Ids, Ids | None]:
        """(ids [L], labels [L] or None where nothing is predicted)."""
        return self.mask_tokens(ids, vocabulary, rng) if self.mask_tokens else (ids, None)


@dataclass(frozen=True)
class Mismatch:
    """With probability `prob` the text, or the picture, is that of another sample, drawn from all others.

    `labels` blanked: such a pair restores neither words nor regions (ViLBERT's --objective 1); LXMERT, ViLBERT
    and SOHO replace the text and keep the labels, UNITER replaces the picture.
    """

    prob: float = 0.5
    replace: Literal["text", "picture"] = "text"
    labels: Literal["kept", "blanked"] = "kept"

    def __post_init__(self) -> None:
        require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")


@dataclass(frozen=True)
class SwapTags:
    """With probability `tags` the tags, with `words` the words, are those of another picture.

    `source` of foreign tags: another picture's tags, or with equal chance its words (the released OSCAR).
    OSCAR: tags 0.5, either; OSCAR+: tags 0.25 and words 0.25.
    """

    tags: float = 0.5
    words: float = 0.0
    source: Literal["tags", "either"] = "tags"

    def __post_init__(self) -> None:
        require(0 <= self.tags <= 1, "tags", "a number in [0, 1]")
        rest = round(1 - self.tags, 9)
        require(0 <= self.words <= rest, "words", f"a number in [0, {rest:g}]")


@dataclass(frozen=True)
class Answers:
    """A sample's questions stand beside its captions, one of all drawn per access (LXMERT)."""


@dataclass(frozen=True)
class Views:
    """The views that a task builds of every sample, by name (`clean`, `masked`, `augmented`), and its pairs."""

    visual: Mapping[str, VisualView] = field(default_factory=dict)
    regions: Mapping[str, RegionView] = field(default_factory=dict)  # in the place of `visual`, of such families
    text: Mapping[str, TextView] = field(default_factory=dict)
    mismatch: Mismatch | None = None
    swap_tags: SwapTags | None = None
    answers: Answers | None = None

    def keep_ratio(self) -> dict[str, KeepRatio]:
        """{view: how} of those whose pictures keep their shape."""
        return {name: view.keep_ratio for name, view in self.visual.items() if view.keep_ratio}


VIEW_NAMES = ("clean", "masked", "augmented")
PAIRS = {"mismatch": Mismatch, "swap_tags": SwapTags, "answers": Answers}


def parse(views: Mapping[str, Mapping[str, Any] | None], regions: bool = False) -> Views:
    """A recipe's `views` as operations; `regions`: of a family that reads them.

    {"text.masked": {"mask_tokens": {"prob": 0.15}}, "visual.clean": {}, "pairs.mismatch": {"prob": 0.5}}: a name
    is the modality and the view, each operation has its options, and what is not written has its default.
    ConfigError names the wrong key.
    """
    visual: dict[str, VisualView] = {}
    seen: dict[str, RegionView] = {}
    text: dict[str, TextView] = {}
    pairs: dict[str, Any] = {}
    known = [f"{modality}.{view}" for modality in ("visual", "text") for view in VIEW_NAMES]
    known += [f"pairs.{name}" for name in PAIRS]
    for name, operations in views.items():
        if name not in known:
            raise ConfigError(f"views.{name} is not a view{did_you_mean(str(name), known)}")
        modality, _, view = name.partition(".")
        if modality == "visual" and regions:
            seen[view] = _build(RegionView, operations, f"views.{name}", "operation")
        elif modality == "visual":
            visual[view] = _build(VisualView, operations, f"views.{name}", "operation")
        elif modality == "text":
            text[view] = _build(TextView, operations, f"views.{name}", "operation")
        else:
            pairs[view] = _build(PAIRS[view], operations, f"views.{name}", "option")
    return Views(visual, seen, text, **pairs)


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
    except OptionError as error:
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
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{where}: should be {' or '.join(map(str, get_args(hint)))} (got {value!r})")
    expected = {bool: "true or false", int: "a whole number", float: "a number"}
    raise ConfigError(f"{where}: should be {expected.get(hint, 'a list of two numbers')} (got {value!r})")
