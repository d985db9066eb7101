"""Masked region classification by the detector's best class (UNITER, Chen et al. 2020, arXiv 1909.11740,
section 3.2)."""

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
    # the best of the detector's distribution but for class 0, its background (UNITER), or `Visual.classes`
    labels: Literal["best_object", "detector"] = "best_object"
    scope: Literal["global", "rank"] = "global"  # one mean over the step's hidden regions, or one per rank (authors)


class Mrc(Objective):
    """The class that the detector gave a hidden region; the background is a class of the head and never a label."""

    needs = frozenset({"text", "visual", "fuse", "regions", "detector"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.fields = frozenset({"classes" if config.labels == "detector" else "class_probs"})
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.head = RegionHead(family.dims.visual, family.dims.classes)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Cross-entropy, mean over hidden regions, [] fp32; 0 if none is hidden."""
        picked = hidden_regions(self._visual(batch))
        labels = self.labels(batch, picked)
        logits = self.logits(enc, picked)
        regions = max(len(labels), 1)
        right = (logits.detach().argmax(dim=1) == labels).sum() / regions
        loss = F.cross_entropy(logits, labels, reduction="sum") / regions
        return Loss(loss, {"mrc/accuracy": right}, {"mrc/accuracy": labels})

    def labels(self, batch: Batch, picked: Tensor) -> Tensor:
        """[M] int64 of the regions where `picked` [B, R]."""
        visual = self._visual(batch)
        if self.config.labels == "detector":
            assert visual.classes is not None, "the masked view carries the detector's classes"
            return visual.classes[picked]
        assert visual.class_probs is not None, "the masked view carries the detector's distributions"
        return visual.class_probs[picked][:, 1:].argmax(dim=1) + 1

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


build = Mrc
