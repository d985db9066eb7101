"""Masked region feature regression (UNITER, Chen et al. 2020, arXiv 1909.11740, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from vlscale.nn.region_head import RegionHead, hidden_regions
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss, Visual


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "masked"  # view
    # the head's last matrix: its own, or the one that features enter the family by, transposed (UNITER)
    decoder: Literal["own", "tied"] = "own"
    # the sum of squares over hidden regions x feature width (UNITER), or over hidden regions
    reduction: Literal["regions", "elements"] = "elements"
    # the sum of squares of a region's error (UNITER), or its root, whose mean is over hidden regions (HERO's MFFR)
    error: Literal["squared", "norm"] = "squared"
    scope: Literal["global", "rank"] = "global"  # one mean over the step's hidden regions, or one per rank (authors)


class Mrfr(Objective):
    """The detector's features of a hidden region, from the other regions and the words."""

    fields = frozenset({"targets"})
    needs = frozenset({"text", "visual", "fuse", "regions"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.tied = config.decoder == "tied"
        if self.tied:
            self.needs = self.needs | {"tied_regions"}
        self.head = RegionHead(family.dims.visual, family.dims.feats, self.tied, family.dims.norm_eps)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Error, mean over hidden regions (and features), [] fp32; 0 if none is hidden."""
        visual = self._visual(batch)
        assert visual.targets is not None, "the masked view carries the features it hid"
        picked = hidden_regions(visual)
        targets = visual.targets[picked].float()  # [M, F]
        features, regions = self.features(enc, picked), max(len(targets), 1)
        if self.config.error == "norm":
            return Loss((features - targets).norm(dim=1).sum() / regions, {})
        terms = F.mse_loss(features, targets, reduction="sum")
        number = regions * self.head.out if self.config.reduction == "elements" else regions
        return Loss(terms / number, {})

    def features(self, enc: EncodingsLike, picked: Tensor) -> Tensor:
        """[M, F] fp32 of the regions where `picked` [B, R]."""
        states = enc.fused(self.config.text, self.config.visual).visual
        assert states is not None, "a family that offers `regions` fills Fused.visual"
        hidden = states[picked]  # first: the passes release the tied matrix under ZeRO-3
        out: Tensor = self.head(hidden, enc.family.region_projection.weight.T) if self.tied else self.head(hidden)
        return out.float()

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 hidden regions; None with `scope: rank`."""
        return hidden_regions(self._visual(batch)).sum() if self.config.scope == "global" else None

    def passes(self) -> dict[str, float]:
        """Text, regions and their fusion."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on hidden regions."""
        return self.head.flops(int(hidden_regions(self._visual(batch)).sum())), 0

    def _visual(self, batch: Batch) -> Visual:
        return batch.visual[self.config.visual]


build = Mrfr
