"""Masked region classification against the detector's distribution (ViLBERT, Lu et al. 2019, arXiv 1908.02265,
section 2.2; UNITER's MRC-kl, Chen et al. 2020, arXiv 1909.11740, section 3.2)."""

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
    # the sum of all terms over hidden regions (ViLBERT), or over hidden regions x classes (UNITER)
    reduction: Literal["regions", "elements"] = "regions"
    scope: Literal["global", "rank"] = "global"  # one mean over the step's hidden regions, or one per rank (authors)


class MrcKl(Objective):
    """What the detector saw in a hidden region, as its whole distribution (background counted where it has one)."""

    fields = frozenset({"class_probs"})
    needs = frozenset({"text", "visual", "fuse", "regions", "detector"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.head = RegionHead(family.dims.visual, family.dims.classes)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """KL divergence of the head's distribution from the detector's, mean over hidden regions, [] fp32; 0 if
        none is hidden."""
        visual = self._visual(batch)
        assert visual.class_probs is not None, "the masked view carries the detector's distributions"
        picked = hidden_regions(visual)
        targets = visual.class_probs[picked].float()  # [M, classes]
        logits = self.logits(enc, picked)
        terms = F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="sum")
        regions = max(len(targets), 1)
        best = targets.argmax(dim=1)  # [M] the detector's
        agreed = (logits.detach().argmax(dim=1) == best).sum() / regions
        number = regions * self.head.out if self.config.reduction == "elements" else regions
        return Loss(terms / number, {"mrc_kl/accuracy": agreed}, {"mrc_kl/accuracy": best})

    def logits(self, enc: EncodingsLike, picked: Tensor) -> Tensor:
        """[M, classes] fp32 of the regions where `picked` [B, R]."""
        states = enc.fused(self.config.text, self.config.visual).visual
        assert states is not None, "a family that offers `regions` fills Fused.visual"
        out: Tensor = self.head(states[picked]).float()
        return out

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


build = MrcKl
