"""Transformer blocks, and the stack that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.nn.attention import Attention, SelfAttention

RunBlock = Callable[..., Tensor]


def call_block(block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Run a block and keep its activations for the backward pass."""
    out: Tensor = block(*inputs)
    return out


class Stack(nn.Module):
    """Blocks run in order. `run_block(block, *inputs)` decides how their activations are kept.

    Args:
        blocks: modules [B, L, D], *context -> [B, L, D].
        first: number that the first block carries in parameter names, so that one published sequence of
            layers can be cut into two stacks.
        once: the stack runs once for each view of its modality, and its input carries a gradient; only then
            is re-entrant checkpointing exact (see `vlscale.recompute`).

    `kept` says which blocks run, one flag each, None = all; the others are the identity. Under ZeRO 3 every rank
    must keep the same ones.
    """

    def __init__(self, blocks: Iterable[nn.Module], first: int = 0, once: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(first + number): block for number, block in enumerate(blocks)})
        self.once = once
        self.run_block: RunBlock = call_block
        self.kept: tuple[bool, ...] | None = None

    def forward(self, hidden: Tensor, *context: Tensor | None) -> Tensor:
        """[B, L, D] -> [B, L, D]; every block is handed the same `context`."""
        for block, kept in zip(self.blocks.values(), self.kept or (True,) * len(self.blocks), strict=True):
            if kept:
                hidden = self.run_block(block, hidden, *context)
        return hidden


@torch.no_grad()
def scale_matrices(module: nn.Module, factor: float) -> None:
    """Multiply the weights of all linear layers, as they start."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.mul_(factor)


def layer_flops(tokens: int, width: int, inner: int) -> int:
    """FLOPs of one layer of self-attention and MLP over one sample's `tokens`; see `Family.flops`."""
    products = 4 * width * width + 2 * width * inner  # query, key, value, output; the two of the MLP
    return 2 * tokens * products + 2 * 2 * tokens * tokens * width


def quick_gelu(hidden: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), near GELU (Hendrycks and Gimpel 2016, section 2): what OpenAI's CLIP was trained with."""
    return hidden * (1.702 * hidden).sigmoid()


class Mlp(nn.Module):
    """Linear, activation (GELU by erf), linear."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.fc2(self.activation(self.fc1(hidden)))
        return out


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): ViT (Dosovitskiy et al. 2021, equations 2 and 3)."""

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        eps: float,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps)
        self.attention = SelfAttention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, inner, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; `mask` as in `attention.attend`."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), mask))
        out: Tensor = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return out


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), norm(x + mlp(x)): BERT (Devlin et al. 2019, after Vaswani et al. 2017, 3.1).

    With `context_width` a cross-attention of the same form stands between the two (ALBEF's fusion layers).
    """

    def __init__(
        self, width: int, heads: int, inner: int, eps: float, dropout: float, context_width: int | None = None
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, width, dropout)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.crosses = context_width is not None
        if context_width is not None:
            self.cross_attention = Attention(width, heads, context_width, dropout)
            self.cross_norm = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, inner)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden [B, L, D], context [B, R, Dc] -> [B, L, D]; masks as in `attention.attend`."""
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, hidden, mask)))
        if self.crosses:
            met = self.cross_attention(hidden, context, context_mask)
            hidden = self.cross_norm(hidden + self.dropout(met))
        out: Tensor = self.mlp_norm(hidden + self.dropout(self.mlp(hidden)))
        return out
