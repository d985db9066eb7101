"""Parts of networks in which words and regions are one sequence: who sees whom, and the pair as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlscale.nn.bert import init_normal
from vlscale.types import Stream


def real(stream: Stream) -> Tensor:
    """[B, L or R] bool, True = a word or region, False = padding."""
    if stream.mask is not None:
        return stream.mask
    return torch.ones(stream.hidden.shape[:2], dtype=torch.bool, device=stream.hidden.device)


def left_to_right(mask: Tensor, words: Tensor) -> Tensor:
    """What `attention.attend` takes where a text is read beside a picture (VLP, Zhou et al. 2020, released code).

    Every position sees the picture; a word also sees itself and the words before it; no region sees a word, nor
    does padding.

    Args:
        mask: [B, T] bool, True = no padding.
        words: [T] bool, True = a place of the text, False = one of the picture.

    Returns:
        [B, 1, T, T] bool; row = who looks, column = who is seen.
    """
    places = torch.arange(len(words), device=mask.device)
    earlier = words[:, None] & (places[:, None] >= places)  # [T, T]
    seen = mask[:, None, :] & (~words | (earlier & mask[:, :, None]))
    return seen[:, None]


class Pooler(nn.Module):
    """tanh of a linear map of the first state, [CLS] (Devlin et al. 2019, released code)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.apply(init_normal)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]."""
        out: Tensor = self.dense(hidden[:, 0]).tanh()
        return out
