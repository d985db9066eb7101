"""BERT's parts (Devlin et al. 2019): embeddings, layers and the masked-word head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.nn.transformer import PostNormBlock

NORM_EPS = 1e-12  # bert-base-uncased config: layer_norm_eps
INIT_STD = 0.02  # Devlin et al. 2019, released code: initializer_range
PAD = 0  # id of [PAD] in the uncased vocabulary


def init_normal(module: nn.Module) -> None:
    """BERT's start: N(0, 0.02) for matrices and tables, 0 for biases. For `Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised. The row `pad` receives no gradient here."""

    def __init__(
        self,
        vocab: int,
        width: int,
        max_positions: int,
        segments: int,
        dropout: float,
        eps: float = NORM_EPS,
        pad: int | None = PAD,
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab, width, padding_idx=pad)
        self.position = nn.Embedding(max_positions, width)
        self.segment = nn.Embedding(segments, width)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """ids [B, L] int64, segments [B, L] int64 (None = all 0) -> [B, L, D]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        segments = torch.zeros_like(ids) if segments is None else segments
        hidden = self.word(ids) + self.position(positions) + self.segment(segments)
        out: Tensor = self.dropout(self.norm(hidden))
        return out


def bert_layers(
    number: int, width: int, heads: int, inner: int, dropout: float, context_width: int | None = None
) -> list[PostNormBlock]:
    """`number` BERT layers at their start; with `context_width` each has a cross-attention."""
    layers = [PostNormBlock(width, heads, inner, NORM_EPS, dropout, context_width) for _ in range(number)]
    for layer in layers:
        layer.apply(init_normal)
    return layers


class WordHead(nn.Module):
    """BERT's masked-word head: dense, GELU, LayerNorm, then the tied word embedding and a bias of its own."""

    def __init__(self, width: int, vocab: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(vocab))
        self.apply(init_normal)

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """hidden [..., D], word_embedding [V, D] -> logits [..., V]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_embedding, self.bias)


class TiedHead(nn.Module):
    """A masked-word head that is the tied word embedding alone (SOHO)."""

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """hidden [..., D], word_embedding [V, D] -> logits [..., V]."""
        return F.linear(hidden, word_embedding)
