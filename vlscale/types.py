"""The plain data that flows through the house.

Shape legend, used in every file: B samples of a micro-batch, L text tokens, R regions or patches,
T frames, D hidden width, E width of the shared embedding, V vocabulary, C channels, H x W pixels.

What crosses a module call is a tensor, tuple, NamedTuple, list or dict, because ZeRO-3 attaches its hooks
only inside those; only the input `Batch` is a dataclass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names in our files
IGNORE = -100  # label of a position that no loss counts
HIDDEN = -1  # visual word of a frame that is hidden: [MASK]

# How a region's place is told (`vlscale.data.regions` has the formulas); W x H are the picture's pixels.
Geometry = Literal[
    "",  # the family reads no regions
    "corners",  # x1/W y1/H x2/W y2/H: LXMERT, CVLP
    "corners_area",  # and the share of the picture's area: ViLBERT
    "corners_size",  # corners, then w/W h/H: OSCAR
    "corners_size_area",  # and the share of the area: UNITER
    "extent_area_score",  # corners in the greatest coordinates of any box, area, the detector's confidence: VLP
]


class Text(NamedTuple):
    """One view of the captions. `labels` decides what counts: `IGNORE` wherever nothing is predicted.

    B rows, or a multiple of them where a sample has several texts: see `Batch`. A row that a sample lacks is padding.
    """

    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool, True = token, False = padding
    labels: Tensor | None = None  # [B, L] int64
    segments: Tensor | None = None  # [B, L] int64
    spans: Tensor | None = None  # [B, 2] int64, the frames of its sample that it goes with: first, one past the last


class Visual(NamedTuple):
    """One view of the pictures, regions or frames; what a family does not use is None. For frames read T for R."""

    # uint8 pixels [B, 3, H, W] (floating = already normalised), regions [B, R, F], frames' features [B, T, F] or
    # pixels [B, T, 3, H, W]; F is 0 where there are only `codes`
    feats: Tensor
    mask: Tensor | None = None  # [B, R] bool, True = real; None = all real
    boxes: Tensor | None = None  # [B, R, 4..7]
    picked: Tensor | None = None  # [B, R] bool, hidden positions that an objective restores
    targets: Tensor | None = None  # [B, R, F]
    classes: Tensor | None = None  # [B, R] int64, the detector's best class
    class_probs: Tensor | None = None  # [B, R, classes], the detector's distribution
    codes: Tensor | None = None  # [B, T] int64, visual words, `HIDDEN` where one is
    code_labels: Tensor | None = None  # [B, T] int64, the visual word to restore, else IGNORE
    order: Tensor | None = None  # [B, T] int64, the place that each frame is moved to (HERO's frame order modelling)
    class_confidence: Tensor | None = None  # [B, R], how sure the detector is of `classes`
    attributes: Tensor | None = None  # [B, R] int64, the detector's best attribute
    attribute_confidence: Tensor | None = None  # [B, R]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. Views are keyed `clean`, `masked`, `augmented`, ...: `data.views` has them all.

    A sample may have several rows in a view, the same number for every sample, its own next to one another: clips of
    one video, and candidate captions or sentences of each. All of its other fields count samples.
    """

    text: dict[str, Text]
    visual: dict[str, Visual]
    pair_id: Tensor  # [B] int64, equal for samples of the same picture
    keys: tuple[str, ...] = ()  # sample keys, in order
    positions: tuple[int, ...] = ()  # of the samples in the endless stream that the loader serves
    lost_words: tuple[int, ...] = ()  # of each sample, for which the family has no room
    task: str = "all"
    matched: Tensor | None = None  # [B] bool, None = every pair matches
    # [B] bool or int64: 0 = all its own, 1 = another picture's tags, 2 = another picture's words; None = all 0
    tags_swapped: Tensor | None = None
    answers: Tensor | None = None  # [B] int64, the answer where the text is a question, else IGNORE; None = no question

    def __len__(self) -> int:
        return self.pair_id.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device` (asynchronously from pinned memory)."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def masks(self) -> list[Tensor]:
        """Which places of the batch are filled: of the words, then of the regions or cells, of every view."""
        words = [text.mask for text in self.text.values()]
        return words + [visual.mask for visual in self.visual.values() if visual.mask is not None]

    def first(self, count: int) -> Batch:
        """The first `count` samples, with all their rows."""
        along = {name: getattr(self, name)[:count] for name in ("keys", "positions", "lost_words")}
        return replace(self.each(lambda tensor: tensor[: len(tensor) // len(self) * count]), **along)

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed; a tensor that several views share is changed once."""
        made: dict[int, Tensor] = {}

        def once(value: Any) -> Any:
            if isinstance(value, Tensor) and id(value) not in made:
                made[id(value)] = change(value)
            return made[id(value)] if isinstance(value, Tensor) else value

        return replace(
            self,
            text={view: Text(*map(once, fields)) for view, fields in self.text.items()},
            visual={view: Visual(*map(once, fields)) for view, fields in self.visual.items()},
            pair_id=once(self.pair_id),
            matched=once(self.matched),
            tags_swapped=once(self.tags_swapped),
            answers=once(self.answers),
        )


class Stream(NamedTuple):
    """One encoded modality."""

    hidden: Tensor  # [B, L or R, D]
    mask: Tensor | None  # [B, L or R] bool; None = all real
    embed: Tensor | None = None  # [B, E] fp32, of families that offer `embed`; unit length if they offer `temperature`
    codes: Tensor | None = None  # [B, R] int64; only from families that offer `codes`
    picked: Tensor | None = None  # [B, R] bool, positions that were hidden; where the family decides, not the view
    spans: Tensor | None = None  # [B, 2] of `Text`; only from families that read them
    order: Tensor | None = None  # [B, T] of `Visual`; only from families that read it
    skip: Tensor | None = None  # [B, T, D] what joins `hidden` behind the first layers of `fuse` (HERO)
    # [B, T, F] what hidden frames are told apart by, before any was hidden; where encoding makes it on the way, as a
    # tower does, else `Family.frame_keys` tells
    keys: Tensor | None = None


class Fused(NamedTuple):
    """Both modalities after they have met."""

    text: Tensor | None  # [B, L, D]
    visual: Tensor | None  # [B, R, D]
    pooled: Tensor | None  # [B, D], the pair as one vector


class Loss(NamedTuple):
    """What an objective returns: its mean over `Objective.count(batch)` terms, and figures to log."""

    value: Tensor  # [] fp32
    metrics: dict[str, Tensor]  # name -> detached scalar, averaged over micro-batches and ranks
    labels: dict[str, Tensor] | None = None  # name of a share of right answers -> the right ones [N] int64


@dataclass(frozen=True)
class Dims:
    """The widths that objectives build their heads from."""

    text: int
    visual: int
    fused: int
    embed: int = 0
    vocab: int = 0
    feats: int = 0  # F of a detector's region features, or of frames'
    classes: int = 0  # of the detector, background counted where it has one
    pooled: int = 0  # of Fused.pooled, where it differs from `fused`
    frame_keys: int = 0  # of what hidden frames are told apart by, where it differs from `feats`
    norm_eps: float = 1e-12  # of a word head's LayerNorm


class Marks(NamedTuple):
    """Token ids that a family puts into its sequences itself."""

    cls: int
    sep: int
    mask: int
    video_start: int  # no word's


@dataclass(frozen=True)
class Inputs:
    """What a family wants to be fed, told to the data plane."""

    image_size: int  # pixels of the square picture; 0 = no pixels
    text_length: int  # longest text in tokens, special tokens counted
    separator: bool  # whether a text ends in [SEP]
    regions: int = 0  # most regions of a picture; 0 = the family reads pixels
    feats: int = 0  # F of a region's or frame's features
    boxes: int = 0  # numbers that describe a region's place (4..7)
    classes: int = 0  # of the detector
    geometry: Geometry = ""  # which numbers those are
    tags: bool = False  # whether the names of a picture's objects stand behind each text: words [SEP] tags [SEP]
    fields: frozenset[str] = frozenset()  # of `Visual`, beside feats, mask and boxes, that the family reads
    frames: int = 0  # most frames of a clip; 0 = the family reads no clips. With `image_size` pixels, else `feats`
    window: int = 1  # frames that a tower makes one place of; the first tells whether it is real and hidden
    codes: int = 0  # how many visual words there are, which the family reads in place of features
    sentences: int = 0  # most texts of a sample, each with its `spans`; 0 = as many as the recipe's clips have
    words: bool = False  # whether its tokens are whole words (`data.words`)
    marks: Marks | None = None  # what the vocabulary must number so
    any_size: bool = False  # whether pictures may have any shape, with `Visual.mask` of cells of 64 x 64 pixels


class Moment(NamedTuple):
    """Which micro-batch of which step is being made; the same on every rank."""

    step: int  # optimizer step, from 1
    seed: int = 0  # the run's
    number: int = 0  # micro-batch of the step, from 0
    of: int = 1  # micro-batches per rank and step


class Keys(NamedTuple):
    """New entries of a key queue."""

    keys: Tensor  # [N, E] unit length, detached
    ids: Tensor | None  # [N] int64 pair ids; None where nobody asks for them: they need not travel
    whole: bool  # True = already the whole step's, in global order and the same on every rank


class Pass(NamedTuple):
    """What one pass of the model over a micro-batch gives."""

    losses: dict[str, Loss]  # by objective
    keys: dict[str, Keys]  # by queue: what waits for `PretrainModel.commit`
    delivered: Tensor | None = None  # [] zero, whose backward brings kept gradients to the encoders (`two_pass`)


def lengthened(tensor: Tensor, length: int) -> Tensor:
    """[B, L, ...] with zeros (False) after L up to `length`."""
    missing = length - tensor.shape[1]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((tensor.shape[0], missing, *tensor.shape[2:]))], dim=1)
