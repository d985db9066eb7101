"""The contract of an objective: it asks encodings, returns a loss, and changes state only in `commit`."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor, nn

from vlscale.nn.temperature import Temperature
from vlscale.types import Batch, Dims, Fused, Inputs, Loss, Stream


class FamilyLike(Protocol):
    """What an objective may see of a family."""

    dims: Dims
    inputs: Inputs
    temperature: Temperature

    @property
    def word_embedding(self) -> nn.Embedding:
        """The table [V, D] that word heads are tied to."""
        ...

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """See `families.base.Family.fuse`."""
        ...


class EncodingsLike(Protocol):
    """What an objective asks: each pass is computed when first asked for and then kept for the step."""

    step: int  # optimizer step being made, from 1

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
        """Both together."""
        ...


class Objective(nn.Module):
    """One training objective, with its own heads (built from `family.dims`), queues and configuration.

    An objective's file holds `Config` (frozen dataclass with at least `weight: float`), the class, and
    `build(config, family) -> Objective`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()  # what it asks of a family: text, visual, fuse, embed, ...
    momentum: bool = False  # whether it asks `enc.momentum`
    views: frozenset[str] = frozenset()  # of: text.clean, text.masked, visual.clean, ...

    def forward(self, enc: EncodingsLike, batch: Batch) -> Loss:
        """The loss of one micro-batch on one rank; changes nothing."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor | None:
        """[] number of terms that the mean in `forward` ranges over, where the step's whole batch shares one
        mean (so that padding, micro-batches and ranks do not change it); None = each micro-batch of each rank
        counts the same."""
        return None

    def commit(self) -> None:
        """Move what the objective keeps (push the queue). Called once per micro-batch, after backward."""

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
