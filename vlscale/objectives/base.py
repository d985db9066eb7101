"""The contract of an objective: it asks encodings and returns a loss; what it keeps are queues, moved by the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from vlscale.nn.queue import KeyQueue, QueueOptions
from vlscale.nn.temperature import Temperature
from vlscale.types import Batch, Dims, Fused, Inputs, Keys, Loss, Stream, Visual


class FamilyLike(Protocol):
    """What an objective may see of a family."""

    offers: frozenset[str]
    dims: Dims
    inputs: Inputs
    temperature: Temperature  # of families that offer `temperature`, as are the next two
    text_proj: nn.Module  # [..., D] states -> [..., E]
    visual_proj: nn.Module

    @property
    def word_embedding(self) -> nn.Embedding:
        """The table [V, D] that word heads are tied to."""
        ...

    @property
    def region_projection(self) -> nn.Linear:
        """The layer F -> D that region features enter by; of families that offer `tied_regions`."""
        ...

    @property
    def code_table(self) -> Tensor:
        """[K, D] what `Stream.codes` number; of families that offer `codes`."""
        ...

    def frame_keys(self, visual: Visual) -> Tensor:
        """[B, T, F] what hidden frames are told apart by; of families that offer `frames`."""
        ...

    def token_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] over words, then visual words; of families that offer `visual_words`."""
        ...

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """See `families.base.Family.fuse`."""
        ...

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `families.base.Family.flops`."""
        ...


class EncodingsLike(Protocol):
    """What an objective asks: each pass is computed when first asked for and then kept for the step.

    Samples of the step's whole batch are numbered in global order: micro-batch by micro-batch, in each of them
    rank by rank. G is their number.
    """

    step: int  # optimizer step being made, from 1
    first: int  # number of this micro-batch's first sample in the step's whole batch
    alone: bool  # whether it is its rank's only micro-batch in this step

    @property
    def family(self) -> FamilyLike:
        """The network behind these encodings (the twin's, for `momentum`)."""
        ...

    @property
    def momentum(self) -> EncodingsLike:
        """The same encodings by the momentum twin, without gradient."""
        ...

    def text(self, view: str) -> Stream:
        """Text alone."""
        ...

    def visual(self, view: str) -> Stream:
        """Pictures alone."""
        ...

    def fused(self, text_view: str, visual_view: str, causal: bool = False) -> Fused:
        """Both together; or one alone, where the other's view is empty (of families that offer `alone`)."""
        ...

    def decoded(self, target_view: str, text_view: str, visual_view: str, length: int = 0) -> Tensor:
        """States [B, L, D] of a text read from left to right beside the fused two, padded to `length` if that is more;
        of families that offer `decode`."""
        ...

    def rows(self, kind: str, view: str, chosen: Tensor) -> Stream:
        """Rows [n] int64 (numbers in the step's whole batch) of a stream, from wherever they are, with
        gradient; `kind` is `text` or `visual`. hidden [n, L or R, D]; no embed. All ranks take part."""
        ...

    def uniforms(self, salt: int) -> Tensor:
        """[B] fp64 in [0, 1): draws that depend on (seed, step, salt, number in the whole batch) alone."""
        ...

    def chance(self, salt: int) -> float:
        """A draw in [0, 1) that depends on (seed, step, salt) alone: the same on all ranks and in all micro-batches."""
        ...

    def queue(self, name: str) -> KeyQueue:
        """The queue that the objective named in `queues`."""
        ...


class Objective(nn.Module):
    """One training objective, with its own heads (built from `family.dims`) and configuration.

    An objective's file holds `Config` (frozen dataclass with at least `weight: float`), the class, and
    `build(config, family) -> Objective`.
    """

    needs: frozenset[str] = frozenset()  # what it asks of a family: text, visual, fuse, embed, ...
    momentum: bool = False  # whether it asks `enc.momentum`
    whole: bool = False  # whether it looks at the step's whole batch (`scope: global`): `share` then gives something
    # of: text.clean, text.masked, visual.clean, ... (`data.views`); and pairs.mismatch, pairs.swap_tags, pairs.answers:
    # what a batch holds of mismatched pairs, foreign tags and answered questions
    views: frozenset[str] = frozenset()
    # whether micro-batches may differ in their number of samples (`data.batching`): not where samples are compared with
    # one another or drawn for by their number; `count` then tells what each micro-batch weighs
    uneven: bool = False
    alone: str = ""  # `text` or `visual`: the modality that it can be asked of alone (`tasks.<name>.modality`)
    fields: frozenset[str] = frozenset()  # of `Visual`, what a detector must have said: classes, class_probs, ...

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """What every rank and micro-batch needs of this one, [b, ...] each, of the same shape everywhere.

        Of objectives that are `whole`. All of it travels in one message. `share` asks for every stream of its
        own network that `forward` will ask for: a step of several micro-batches encodes them all before any
        loss is made.
        """
        return ()

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """The loss of one micro-batch on one rank; changes nothing.

        `shared` is what all gave in `share`, [G, ...] each, with gradient where it had one.
        """
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor | None:
        """[] number of terms that the mean in `forward` ranges over, where the step's whole batch shares one
        mean (so that padding, micro-batches and ranks do not change it); None = each micro-batch of each rank
        counts the same."""
        return None

    def queues(self) -> Mapping[str, tuple[QueueOptions, int]]:
        """{name: (options, width of a key)} of the queues that it contrasts with; objectives that give the same
        name share the queue."""
        return {}

    def keys(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...]) -> Mapping[str, Keys]:
        """This micro-batch's new keys for each queue; they enter after the step's last backward."""
        return {}

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum) pairs of own modules that the momentum update moves along with the family's."""
        return []

    def limits(self) -> list[tuple[nn.Parameter, float, float]]:
        """(parameter, least, greatest): kept within bounds after every optimizer step, e.g. a temperature."""
        return []

    def passes(self) -> dict[str, float]:
        """Passes through the family that this objective asks for, in micro-batches (FLOPs accounting).

        `verb:view` (`encode_text:masked`, `encode_visual:clean`, `fuse:masked:clean`) is shared and counted
        once however many objectives ask; a bare `verb` is this objective's own and adds up. The twin's passes
        have `momentum.` in front.
        """
        return {}

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """Multiply-add FLOPs of one forward pass of the objective's own products on this micro-batch:
        (with gradient, without). Reads `batch`, so hand it over before it moves to a device."""
        return 0, 0


def embed_of(stream: Stream) -> Tensor:
    """The embedding [B, E] of a stream, which a family that offers `embed` has made."""
    assert stream.embed is not None, "a family that offers `embed` fills Stream.embed"
    return stream.embed
