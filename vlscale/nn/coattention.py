"""Co-attention of two streams (ViLBERT, Lu et al. 2019, arXiv 1908.02265, section 2.1, figure 2b), and what runs two
streams in turns."""

from __future__ import annotations

from torch import Tensor, nn

from vlscale.nn.attention import attend
from vlscale.nn.transformer import Mlp, Stack


class ContextAttention(nn.Module):
    """Queries of one stream over keys and values of another; `inner` is the width that they are compared in."""

    def __init__(self, width: int, context_width: int, inner: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(context_width, inner)
        self.value = nn.Linear(context_width, inner)
        self.output = nn.Linear(inner, width)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden [B, Lq, D], context [B, Lk, Dc] -> [B, Lq, D]; `mask` as in `attention.attend`."""
        query, key, value = self.query(hidden), self.key(context), self.value(context)
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.output(attend(query, key, value, self.heads, mask, dropout))
        return out


class CoattentionBlock(nn.Module):
    """One stream's half of a co-attention layer: norm(x + attention(x, other)), then norm(x + mlp(x)).

    A layer is two of them, one per stream, and each reads the other stream as it was before the layer. So the
    halves do not depend on each other, and both are ordinary blocks of a `Stack`.
    """

    def __init__(
        self, width: int, context_width: int, inner: int, heads: int, mlp: int, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention = ContextAttention(width, context_width, inner, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, mlp)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden [B, Lq, D], context [B, Lk, Dc] -> [B, Lq, D]; `mask` of the context, as in `attention.attend`."""
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, context, mask)))
        out: Tensor = self.mlp_norm(hidden + self.dropout(self.mlp(hidden)))
        return out


class Sections(Stack):
    """A stack that runs section by section, because blocks of other stacks stand in between."""

    def section(self, start: int, stop: int, hidden: Tensor, *context: Tensor | None) -> Tensor:
        """Blocks `start` to `stop - 1`, by the numbers in their names: [B, L, D] -> [B, L, D]."""
        kept = dict(zip(self.blocks, self.kept or (True,) * len(self.blocks), strict=True))
        for name in map(str, range(start, stop)):
            if kept[name]:
                hidden = self.run_block(self.blocks[name], hidden, *context)
        return hidden
