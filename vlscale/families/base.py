"""The contract of a family: it encodes; it knows nothing of losses, data or the run."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual


class Family(nn.Module):
    """A published system's network, entered by method (never by call), so that objectives share its passes.

    A bare parameter lives in a small module with a `forward` of its own: ZeRO-3 gathers what belongs to a
    module when that module is called. No parameter is zero-dimensional.

    A family's file also holds `Config` (frozen dataclass), `build(config) -> Family`, `tiny() -> Config`
    (its miniature) and `PUBLISHED` (renames from the authors' checkpoint names).
    """

    offers: ClassVar[frozenset[str]] = frozenset()  # of: text, visual, fuse, embed, decode, codes
    dims: Dims
    inputs: Inputs
    word_embedding: nn.Embedding

    def encode_text(self, text: Text) -> Stream:
        """Text alone, up to where the modalities first meet. hidden [B, L, D], embed [B, E] if offered."""
        raise NotImplementedError

    def encode_visual(self, visual: Visual) -> Stream:
        """Pictures, regions or frames alone. hidden [B, R, D], embed [B, E] if offered."""
        raise NotImplementedError

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """Both modalities together; `causal` lets a text position see only positions before it."""
        raise NotImplementedError

    def decode(self, text: Text, fused: Fused) -> Stream:
        """Left-to-right generation from the fused states."""
        raise NotImplementedError

    def flops(self, text_tokens: int) -> dict[str, int]:
        """Multiply-add FLOPs (2 per MAC) of ONE forward pass of one sample, by verb.

        Keys are `encode_text`, `encode_visual`, `fuse`: matrix products only (linear layers, convolutions,
        attention scores and values), which is what `torch.utils.flop_counter` counts. `text_tokens` is the
        padded text length L.
        """
        raise NotImplementedError
