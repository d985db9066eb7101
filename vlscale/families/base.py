"""The contract of a family: it encodes; it knows nothing of losses, data or the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlscale.errors import ConfigError
from vlscale.nn.temperature import Temperature
from vlscale.nn.video import FrameTower
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual


class Rename(NamedTuple):
    """Where a published tensor goes. `vlscale.weights` applies it, both ways.

    The way back spells `source` out: of `(?:a|b)` it writes the first, `(?:a)?` it leaves out, and groups get what
    stands in our name.
    """

    source: str  # regular expression for the whole published name
    targets: tuple[str, ...] = ()  # ours (`\1` = group 1), where present; () = knowingly unused
    change: Callable[[Tensor, torch.Size], Tensor] | None = None  # (tensor, our shape) -> tensor of our shape
    part: tuple[int, int] = (0, 1)  # (i, n): fills the i-th of n equal parts of our first axis
    optional: bool = False  # the model may lack every target (a twin, an objective's head)
    back: Callable[[Tensor], Tensor] | None = None  # undoes `change`, of a whole tensor; None = nothing to undo
    joined: bool = False  # the way back stacks the targets of one network, in their order
    rows: Literal["all", "first", "last"] = "all"  # which of our rows it fills: as many as it has; the others stay


class Renames(NamedTuple):
    """A table of renames; the first whose source matches counts."""

    rows: tuple[Rename, ...] = ()
    fills: str = ".*"  # regular expression: parameters of ours that the published file must fill


class Size(NamedTuple):
    """A number of a family's `Config` that the shapes of published tensors tell."""

    key: str  # of `Config`
    source: str  # regular expression for whole published names
    axis: int | None = None  # the length of that axis; None = how many different values group 1 has
    # (that number, `Config` as known so far) -> value, or None where it does not tell it; a ConfigError asks for it
    change: Callable[[int, Mapping[str, Any]], Any] | None = None


def bert_sizes(prefix: str, layers: str = "layers") -> tuple[Size, ...]:
    """What a BERT tells whose names begin with `prefix` (a regular expression); `layers` = our key for its depth."""
    table = prefix + r"embeddings\.{}_embeddings\.weight"
    return (
        Size("vocab", table.format("word"), 0),
        Size("hidden", table.format("word"), 1),
        Size("max_positions", table.format("position"), 0),
        Size("segments", table.format("token_type"), 0),
        Size("intermediate", prefix + r"encoder\.layer\.0\.intermediate\.dense\.weight", 0),
        Size(layers, prefix + r"encoder\.layer\.(\d+)\..*"),
    )


def check_divides(config: object, *pairs: tuple[str, str]) -> None:
    """ConfigError unless, of each (whole, part), the number of `config` named first is a multiple of the second."""
    for whole, part in pairs:
        if getattr(config, whole) % getattr(config, part):
            raise ConfigError(
                f"family.{whole} {getattr(config, whole)} is not a multiple of "
                f"family.{part} {getattr(config, part)}; choose sizes that divide"
            )


def check_positions(text_length: int, max_positions: int) -> None:
    """ConfigError if a text is longer than the table of positions."""
    if text_length > max_positions:
        raise ConfigError(f"family.text_length {text_length} exceeds family.max_positions {max_positions}")


class Family(nn.Module):
    """A published system's network, entered by method (never by call), so that objectives share its passes.

    A bare parameter lives in a small module with a `forward` of its own: ZeRO-3 gathers what belongs to a
    module when that module is called. No parameter is zero-dimensional.

    A family's file also holds `Config` (frozen dataclass), `build(config) -> Family`, `tiny() -> Config`
    (its miniature), `PUBLISHED` (renames from the authors' checkpoint names to `PretrainModel`'s) and `SIZES` (what
    the shapes in those checkpoints tell).
    """

    # of: text, visual, fuse, regions (`fuse` gives visual states), detector (they are a detector's: `Visual.classes`),
    # embed (`Stream.embed`), temperature (`temperature`, `text_proj`, `visual_proj`; embeds of unit length), codes,
    # tied_regions (`region_projection`), single_stream (words and regions pass one stack: their states compare),
    # frames (visual places are frames in time: `frame_keys`), frame_order (`fuse` puts them where `Visual.order` says),
    # decode, alone (`fuse` takes one modality alone), queries (`pooled` of a text alone compares with visual states),
    # pairs (`fuse` takes any text row beside any clip row),
    # visual_words (reads `Visual.codes`; `token_logits`; the word embedding has their rows too, behind the words'),
    # causal (`fuse` can read a text from left to right, and no state of it has seen what comes later)
    offers: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()  # keys of `flops` whose pass learns nothing and has no backward
    published: ClassVar[Renames] = Renames()  # the authors' checkpoints
    init_text: Renames = Renames()  # the text tower's usual start, e.g. bert-base-uncased
    init_vision: ClassVar[Renames] = Renames()  # the image tower's usual start, e.g. DeiT
    init_codebook: Renames = Renames()  # `launchers/visual_words.py grow`: the visual words' rows
    dims: Dims
    inputs: Inputs
    temperature: Temperature  # of families that offer `temperature`, as are the next two; call it for [1] fp32
    text_proj: nn.Module  # [..., D] states -> [..., E]
    visual_proj: nn.Module
    tower: FrameTower  # of families that can read pixels in place of features

    @property
    def word_embedding(self) -> nn.Embedding:
        """The table [V, D] that word heads are tied to."""
        raise NotImplementedError

    @property
    def region_projection(self) -> nn.Linear:
        """The layer F -> D that region features enter by, which feature heads are tied to; if `tied_regions`."""
        raise NotImplementedError

    @property
    def code_table(self) -> Tensor:
        """[K, D] what `Stream.codes` number; of families that offer `codes`."""
        raise NotImplementedError

    def token_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] fused states -> [..., V] over words, then visual words; of families that offer `visual_words`."""
        raise NotImplementedError

    def pick(self, visual: Visual, cell: Tensor, kept: Tensor) -> Tensor:
        """What to hide of pictures whose view does not say, [B, R] bool; of families that offer `codes`.

        `cell` and `kept` are uniform draws [B] in [0, 1), the same however the step's batch is cut.
        """
        raise NotImplementedError

    def encode_text(self, text: Text) -> Stream:
        """Text alone, up to where the modalities first meet. hidden [B, L, D], embed [B, E] if offered."""
        raise NotImplementedError

    def encode_visual(self, visual: Visual) -> Stream:
        """Pictures, regions or frames alone. hidden [B, R, D], embed [B, E] if offered."""
        raise NotImplementedError

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """Both modalities together, or one alone where the family offers `alone`; `causal` lets a text position see
        only positions before it."""
        raise NotImplementedError

    def frame_keys(self, visual: Visual) -> Tensor:
        """[B, T, F] what hidden frames are told apart by, of a view that hides none; if `frames`."""
        raise NotImplementedError

    def decode(self, text: Text, fused: Fused, mask: Tensor) -> Tensor:
        """States [B, L, D] of a text that is read from left to right and sees all that was fused, of which `mask`
        [B, L' + R] (words, then regions or frames) says what is real; of families that offer `decode`."""
        raise NotImplementedError

    def flops(self, text_tokens: int) -> dict[str, int]:
        """Multiply-add FLOPs (2 per MAC) of ONE forward pass of one sample, by verb.

        Keys are `encode_text`, `encode_visual`, `fuse`, `decode`, and `tower` (what makes features of pixels before
        the rest of `encode_visual`), where it can be frozen alone: matrix products only (linear layers, convolutions,
        attention scores and values), which is what `torch.utils.flop_counter` counts. `text_tokens` is the
        padded text length L.
        """
        raise NotImplementedError

    def flops_of(self, text_tokens: int, height: int, width: int) -> dict[str, int]:
        """`flops` with pictures of height x width pixels; differs only where a family reads any size."""
        return self.flops(text_tokens)
