"""What objectives over hidden regions share: which regions count, and the head that restores them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.nn.bert import NORM_EPS, init_normal
from vlscale.types import Visual


def hidden_regions(visual: Visual) -> Tensor:
    """[B, R] bool, True = a real region that is hidden and to be restored."""
    assert visual.picked is not None, "the masked view says which regions are hidden"
    return visual.picked if visual.mask is None else visual.picked & visual.mask


class RegionHead(nn.Module):
    """Dense, GELU, LayerNorm, then a linear layer; or a matrix that lives elsewhere, and a bias of its own.

    ViLBERT's and UNITER's heads for classes and features (Lu et al. 2019; Chen et al. 2020, released codes); `inner` =
    the width between the two, where it is another.
    """

    def __init__(
        self, width: int, out: int, tied: bool = False, eps: float = NORM_EPS, inner: int | None = None
    ) -> None:
        super().__init__()
        self.out = out
        self.dense = nn.Linear(width, inner or width)
        self.norm = nn.LayerNorm(inner or width, eps)
        if tied:
            self.bias = nn.Parameter(torch.zeros(out))
        else:
            self.decoder = nn.Linear(inner or width, out)
        self.apply(init_normal)

    def forward(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        """hidden [..., D], matrix [out, D] of a tied head -> [..., out]."""
        hidden = self.norm(F.gelu(self.dense(hidden)))
        if matrix is not None:
            return F.linear(hidden, matrix, self.bias)
        out: Tensor = self.decoder(hidden)
        return out

    def flops(self, rows: int) -> int:
        """FLOPs of one forward pass over so many regions."""
        return 2 * rows * self.dense.out_features * (self.dense.in_features + self.out)
