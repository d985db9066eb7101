"""SOHO's visual dictionary (Huang et al. 2021, arXiv 2104.03135, section 3.2): each cell of a picture's grid takes the
value of its nearest entry, and entries follow the cells that chose them by moving averages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn.moving import Moving

SMOOTHING = 1e-5  # added to each entry's count (van den Oord et al. 2017, released code), so that none divides by zero
ROWS = 4096  # cells compared with the whole dictionary at a time


class Dictionary(Moving):
    """K entries of width D, none of them a parameter.

    The entries are those of the last step while a step is made, in however many micro-batches. The authors' code
    moves them inside each forward pass instead, between finding the nearest entry and taking its value: twice per
    update in the released configuration, which accumulates two passes.

    Args:
        codes: K.
        width: D.
        decay: share that the moving averages keep in a step.
    """

    table: Tensor  # [K, D] the entries
    size: Tensor  # [K] moving average of how many cells chose an entry in a step
    total: Tensor  # [K, D] moving average of the sum of these cells
    used: Tensor  # [K] cells that chose an entry since the start

    def __init__(self, codes: int, width: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("table", torch.randn(codes, width))
        self.register_buffer("size", torch.zeros(codes))
        self.register_buffer("total", torch.zeros(codes, width))
        self.register_buffer("used", torch.zeros(codes))

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Cells [B, R, D] -> (values of their entries [B, R, D], codes [B, R] int64); in training they are noted.

        The values' gradient goes to the cells as it is (straight through).
        """
        codes = self.nearest(cells)
        if self.training and torch.is_grad_enabled():
            self.note(self.sums(cells, codes))
        return self.quantised(cells, codes), codes

    @torch.no_grad()
    def nearest(self, cells: Tensor) -> Tensor:
        """[B, R, D] -> [B, R] int64: the entry at the least Euclidean distance, of equals the first."""
        lengths = self.table.square().sum(dim=1)  # [K]
        found = []
        for rows in torch.split(cells.detach().flatten(0, 1).float(), ROWS):
            # |x - d|^2 = |x|^2 + |d|^2 - 2 x.d; zero entries are at exactly equal distances, whatever |x|^2 is
            distance = torch.addmm(rows.square().sum(dim=1, keepdim=True) + lengths, rows, self.table.T, alpha=-2)
            found.append(distance.argmin(dim=1))
        return torch.cat(found).view(cells.shape[:2])

    @torch.no_grad()
    def sums(self, cells: Tensor, codes: Tensor) -> Tensor:
        """[K * (1 + D)] fp32: how many cells chose each entry, then the sums of these cells."""
        rows, chosen = cells.detach().flatten(0, 1).float(), codes.flatten()
        counts = torch.zeros_like(self.size).index_add_(0, chosen, torch.ones_like(rows[:, 0]))
        sums = torch.zeros_like(self.total).index_add_(0, chosen, rows)
        return torch.cat([counts, sums.flatten()])

    def quantised(self, cells: Tensor, codes: Tensor) -> Tensor:
        """The entries' values in place of the cells, with the cells' gradient, [B, R, D]."""
        values = F.embedding(codes, self.table).to(cells.dtype)
        return cells + (values - cells).detach()

    def moved(self, sums: Tensor) -> dict[str, Tensor]:
        """Averages of counts and sums; an entry is the ratio of the two, its count smoothed."""
        counts, cells = torch.split(sums, [self.size.numel(), self.total.numel()])
        size = torch.lerp(counts, self.size, self.decay)
        total = torch.lerp(cells.view_as(self.total), self.total, self.decay)
        whole = size.sum()
        smooth = (size + SMOOTHING) / (whole + len(size) * SMOOTHING) * whole
        return {"table": total / smooth[:, None], "size": size, "total": total, "used": self.used + counts}


def same_code(codes: Tensor, picked: Tensor, mask: Tensor | None) -> Tensor:
    """All cells that share the code of their picture's picked cell; neighbours are alike, and would tell.

    Args:
        codes: [B, R] int64.
        picked: [B, R] bool, at most one cell of a picture; none = nothing is hidden.
        mask: [B, R] bool, True = a cell of the picture; None = all. A picked cell of padding hides nothing.

    Returns:
        [B, R] bool.
    """
    picked = picked if mask is None else picked & mask
    code = codes.gather(1, picked.long().argmax(dim=1, keepdim=True))  # [B, 1]
    hidden = (codes == code) & picked.any(dim=1, keepdim=True)
    return hidden if mask is None else hidden & mask
