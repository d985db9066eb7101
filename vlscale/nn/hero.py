"""HERO's parts beside its transformers (Li et al. 2020, arXiv 2005.00200): what reads frames, places and queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlscale.nn.attention import Attention, attention_mask
from vlscale.nn.bert import NORM_EPS, init_normal

EPS = 1e-5  # of every LayerNorm outside the layers, whose own is BERT's (model/embed.py, model/layers.py)


class FrameProjection(nn.Module):
    """Features normalised and projected; a hidden frame's (zero by its view) have a learned vector added before."""

    def __init__(self, feats: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.mask = nn.Embedding(1, feats)
        self.norm = nn.LayerNorm(feats, EPS)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(feats, width)
        self.apply(init_normal)

    def forward(self, feats: Tensor, picked: Tensor | None) -> Tensor:
        """feats [B, T, F], picked [B, T] bool -> [B, T, D]."""
        feats = feats.to(self.projection.weight.dtype)
        if picked is not None:
            vector = self.mask(torch.zeros(1, dtype=torch.int64, device=feats.device))
            feats = feats + picked[..., None] * vector
        out: Tensor = self.projection(self.dropout(self.norm(feats)))
        return out


class Places(nn.Module):
    """States with their place added, normalised."""

    def __init__(self, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        places = torch.arange(hidden.shape[1], device=hidden.device)
        out: Tensor = self.dropout(self.norm(hidden + self.position(places)))
        return out


class QueryEncoder(nn.Module):
    """A text's states as one vector: projected, one block of attention, then their mean by a learned score
    (section 3.2, query encoder; model/modeling_utils.py)."""

    def __init__(self, width: int, heads: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, width)
        self.places = Places(positions, width, dropout)
        self.attention = Attention(width, heads, width, dropout)
        self.attention_norm = nn.LayerNorm(width, NORM_EPS)
        self.score = nn.Linear(width, 1, bias=False)
        self.apply(init_normal)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [N, L, D], mask [N, L] bool -> [N, D]; 0 of a text without a word."""
        hidden = self.places(self.projection(self.dropout(self.norm(hidden))).relu())
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, hidden, attention_mask(mask))))
        scores = self.score(hidden)[..., 0].float().masked_fill(~mask, torch.finfo(torch.float32).min)
        shares = (scores.softmax(dim=1) * mask).to(hidden.dtype)
        return torch.einsum("nl,nld->nd", shares, hidden)
