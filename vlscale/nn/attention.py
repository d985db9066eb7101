"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) in the two published parameter layouts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(Q K' / sqrt(width of a head)) V over `heads` heads.

    Args:
        query: [B, Lq, D].
        key: [B, Lk, D].
        value: [B, Lk, D].
        heads: number of heads, a divisor of D.
        mask: bool, broadcastable to [B, heads, Lq, Lk], True = may be seen; None = all.
        dropout: probability that a weight is dropped; 0 outside training.

    Returns:
        [B, Lq, D]; 0 for a query that may see nothing (a picture without regions), which no gradient passes.
    """
    width = query.shape[2] // heads
    query, key, value = (part.view(*part.shape[:2], heads, width).transpose(1, 2) for part in (query, key, value))
    if query.device.type == "cpu" and query.dtype != torch.float32 and query.requires_grad:
        out = _products(query, key, value, mask, dropout)
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The same as two matrix products around a softmax.

    For training in 16 bits on a CPU: torch 2.13's fused kernel has a backward pass there that took 5 to 8 times
    as long ([64, 4, 65, 32] bf16, two cores with AMX: 48 ms against 6 ms, forward and backward together).
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)  # the kernel reads and writes 16 bits and computes in fp32
    out = F.dropout(weights, dropout, training=dropout > 0) @ value
    return out if mask is None else out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)


def attention_mask(mask: Tensor | None, causal: bool = False) -> Tensor | None:
    """What `attend` takes, from a padding mask [B, L] (True = token).

    [B, 1, 1, L]; with `causal`, where a position sees only itself and those before it, [B, 1, L, L].
    """
    if mask is None:
        return None
    seen = mask[:, None, None, :]
    if causal:
        seen = seen & causal_mask(mask.shape[1], mask.device)
    return seen


def causal_mask(length: int, device: torch.device) -> Tensor:
    """What `attend` takes where a position sees itself and those before it, padding included: [L, L] bool."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class SelfAttention(nn.Module):
    """Self-attention with query, key and value in one matrix, as in ViT and CLIP checkpoints."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; `mask` as in `attend`."""
        query, key, value = self.qkv(hidden).chunk(3, dim=2)
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.output(attend(query, key, value, self.heads, mask, dropout))
        return out


class Attention(nn.Module):
    """Attention with separate query, key and value matrices, as in BERT checkpoints; `context` may be another
    sequence of another width (cross-attention)."""

    def __init__(self, width: int, heads: int, context_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden [B, Lq, D], context [B, Lk, Dc] -> [B, Lq, D]; `mask` as in `attend`."""
        query, key, value = self.query(hidden), self.key(context), self.value(context)
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.output(attend(query, key, value, self.heads, mask, dropout))
        return out
