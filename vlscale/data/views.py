"""Seeded views of a sample: what is done to the picture and to the text before the model sees them, and which text
and which picture stand together.

Every operation is a frozen dataclass of its options, applied by calling it with a generator of the sample's
own, so that the result depends on the sample and its position only. Pictures are uint8 RGB [H, W, 3], texts
int64 [L].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
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
from vlscale.data.clip_windows import Clips
from vlscale.data.decode import Crop, Pixels
from vlscale.data.frames import FrameView
from vlscale.data.masking import Ids, MaskTokens, Vocabulary, Write
from vlscale.data.regions import Floats, MaskRegions
from vlscale.errors import ConfigError, did_you_mean
from vlscale.types import Inputs

T = TypeVar("T")
Draw = Callable[[str], Generator]  # the sample's generator for one purpose, such as `text.masked`


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

    @cached_property
    def changes(self) -> tuple[Callable[[Pixels, Generator], Pixels], ...]:
        """What is done to the part, in order."""
        listed = (self.color_jitter, self.grayscale, self.blur, self.flip, self.rand_augment)
        return tuple(operation for operation in listed if operation is not None)

    def __call__(self, pixels: Pixels, rng: Generator) -> Pixels:
        """The part [h, w, 3] changed, in its own memory or another."""
        for operation in self.changes:
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
class Queries:
    """So many of a video's sentences are asked for: they are empty in its other texts (HERO: data/vsm.py).

    Of a video with fewer the last one is repeated.
    """

    number: int = 5

    def __post_init__(self) -> None:
        require(self.number >= 1, "number", "a whole number from 1")


@dataclass(frozen=True)
class TextView:
    """One view of the captions: as they are, masked, or to be written by a decoder."""

    queries: Queries | None = None  # of the view `query`, whose rows are these; see `data.clip_samples`
    mask_tokens: MaskTokens | None = None
    write: Write | None = None  # of the view `target`
    start: Literal["cls", "sep"] = "cls"  # the token that a text begins with (HERO: sep where no word is restored)

    def __post_init__(self) -> None:
        require(not (self.write and self.mask_tokens), "write", "left out beside mask_tokens; write.prob hides words")

    @cached_property
    def changes(self) -> bool:
        """Whether it is anything but the caption as it is."""
        return self != TextView()

    def __call__(self, ids: Ids, vocabulary: Vocabulary, rng: Generator) -> tuple[Ids, Ids | None]:
        """(ids [L], labels [L] or None where nothing is predicted)."""
        if self.start == "sep" and vocabulary.cls is not None and vocabulary.sep is not None:
            ids = np.concatenate([[vocabulary.sep], ids[1:]])
        operation = self.mask_tokens or self.write
        return operation(ids, vocabulary, rng) if operation else (ids, None)


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
    """The views that a task builds of every sample, by name (`VIEW_NAMES`), and its pairs."""

    visual: Mapping[str, VisualView] = field(default_factory=dict)
    regions: Mapping[str, RegionView] = field(default_factory=dict)  # in the place of `visual`, of such families
    frames: Mapping[str, FrameView] = field(default_factory=dict)  # and of families that read clips
    text: Mapping[str, TextView] = field(default_factory=dict)
    mismatch: Mismatch | None = None
    swap_tags: SwapTags | None = None
    answers: Answers | None = None
    clips: Clips | None = None  # of families that read clips, always

    def keep_ratio(self) -> dict[str, KeepRatio]:
        """{view: how} of those whose pictures keep their shape."""
        return {name: view.keep_ratio for name, view in self.visual.items() if view.keep_ratio}


VIEW_NAMES = {
    "visual": ("clean", "masked", "augmented", "shuffled"),
    "text": ("clean", "masked", "augmented", "query", "target"),
}
OPERATIONS = {  # what a view is nothing without
    "text": {"masked": "mask_tokens", "query": "queries", "target": "write"},
    "regions": {"masked": "mask_regions"},
    "frames": {"masked": "mask_frames", "shuffled": "shuffle_frames"},
    "visual": {},  # a family picks what is hidden of pixels
}
PAIRS = {"mismatch": Mismatch, "swap_tags": SwapTags, "answers": Answers, "clips": Clips}


def parse(views: Mapping[str, Mapping[str, Any] | None], inputs: Inputs | None = None) -> Views:
    """A recipe's `views` as operations, of a family that reads `inputs` (None = pictures).

    {"text.masked": {"mask_tokens": {"prob": 0.15}}, "visual.clean": {}, "pairs.mismatch": {"prob": 0.5}}: a name
    is the modality and the view, each operation has its options, and what is not written has its default.
    ConfigError names the wrong key.
    """
    reads = _reads(inputs)
    clips = reads == "frames"
    kinds: dict[str, type] = {"frames": FrameView, "regions": RegionView, "visual": VisualView, "text": TextView}
    made: dict[str, Any] = {name: {} for name in kinds}
    pairs: dict[str, Any] = {"clips": Clips()} if clips else {}
    known = [f"{modality}.{view}" for modality, names in VIEW_NAMES.items() for view in names]
    known += [f"pairs.{name}" for name in PAIRS]
    for name, operations in views.items():
        if name not in known:
            raise ConfigError(f"views.{name} is not a view{did_you_mean(str(name), known)}")
        modality, _, view = name.partition(".")
        if modality == "pairs":
            pairs[view] = _build(PAIRS[view], operations, f"views.{name}", "option")
        else:
            kind = reads if modality == "visual" else modality
            made[kind][view] = _build(kinds[kind], operations, f"views.{name}", "operation")
    for view, text in made["text"].items():
        if text.queries is not None and view != "query":
            raise ConfigError(f"views.text.{view}.queries is for the view text.query; move it there")
    asked = [name for name in ("swap_tags", "answers") if clips and name in pairs]
    if asked:
        raise ConfigError(f"views.pairs.{asked[0]} is for families that read pictures, and this one reads clips")
    if "clips" in pairs and not clips:
        raise ConfigError("views.pairs.clips is for families that read clips, which this one does not; leave it out")
    if inputs is not None and clips:
        _check_clips(made["frames"], pairs["clips"], inputs)
    for kind, modality in ((reads, "visual"), ("text", "text")):
        for view, operation in _operations(modality, inputs).items():
            if view in made[kind] and getattr(made[kind][view], operation) is None:
                raise ConfigError(f"views.{modality}.{view} leaves all as it is; write {{{operation}: {{}}}}")
    return Views(**made, **pairs)


def _check_clips(frames: Mapping[str, FrameView], clips: Clips, inputs: Inputs) -> None:
    """ConfigError for what would do nothing to the clips that a family reads, or what it cannot be done to."""
    of_pixels = ("random_crop", "random_resized_crop", "color_jitter", "grayscale", "blur", "flip")
    wrong: dict[str, str] = {}
    if not inputs.image_size:
        wrong |= dict.fromkeys(of_pixels, "is of pixels, which this family does not read; leave it out")
    if inputs.image_size or inputs.codes:
        wrong["pool_frames"] = "is of features, which this family does not read; leave it out"
    if inputs.codes:
        wrong["mask_frames"] = "hides what this family does not read; of visual words write mask_words"
    else:
        wrong["mask_words"] = "hides what this family does not read; of frames write mask_frames"
    if inputs.sentences:
        whole = "takes frames away that sentences go with, and this family reads all of a video; leave it out"
        wrong |= dict.fromkeys(("skip_frames", "pool_frames"), whole)
    for view, operations in frames.items():
        for name, reason in wrong.items():
            if getattr(operations, name) is not None:
                raise ConfigError(f"views.visual.{view}.{name} {reason}")
    idle = {} if inputs.image_size else {"fps": "is of pixels, which this family does not read; leave it out"}
    if inputs.sentences:
        cut = ("number", "choice", "candidates", "least_seconds", "least_words", "longer_by", "join", "untimed_frames")
        idle |= dict.fromkeys(cut, "does nothing, for this family reads a video with all its sentences; leave it out")
    for name, reason in idle.items():
        if getattr(clips, name) != getattr(Clips(), name):
            raise ConfigError(f"views.pairs.clips.{name} {reason}")


def example(name: str, inputs: Inputs) -> str:
    """The least that a recipe may say of the view `name`, e.g. `{mask_tokens: {}}`."""
    modality, _, view = name.partition(".")
    operation = _operations(modality, inputs).get(view)
    return f"{{{operation}: {{}}}}" if operation else "{}"


def _reads(inputs: Inputs | None) -> str:
    """What of pictures or clips a family reads (None = pictures): frames, regions or visual."""
    if inputs is None:
        return "visual"
    return "frames" if inputs.frames else "regions" if inputs.regions else "visual"


def _operations(modality: str, inputs: Inputs | None) -> dict[str, str]:
    """{view: what it is nothing without}."""
    if modality == "visual" and inputs is not None and inputs.codes:
        return {**OPERATIONS["frames"], "masked": "mask_words"}
    return OPERATIONS.get(_reads(inputs) if modality == "visual" else modality, {})


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
