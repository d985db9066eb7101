"""Whether words, object tags and regions belong together (OSCAR, Li et al. 2020, arXiv 2004.06165; OSCAR+, Zhang et
al. 2021, VinVL, arXiv 2101.00529)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.nn.bert import init_normal
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    text: str = "masked"  # view: the authors make both losses from one pass
    visual: str = "clean"  # view
    classes: Literal[2, 3] = 2  # 2: own or another's (OSCAR); 3: own, another's tags, another's words (OSCAR+)


class TagContrast(Objective):
    """Tell from the pooled pair what in it was taken from another picture (`Batch.tags_swapped`).

    Raises:
        ConfigError: neither 2 nor 3 classes.
    """

    needs = frozenset({"text", "visual", "fuse"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        if config.classes not in (2, 3):
            raise ConfigError(f"objectives.tag_contrast.classes is {config.classes}; write 2 (OSCAR) or 3 (OSCAR+)")
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}", "pairs.swap_tags"})
        self.head = nn.Linear(family.dims.pooled or family.dims.fused, config.classes)  # column 0 = all its own
        self.head.apply(init_normal)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean cross-entropy over B samples, [] fp32."""
        pooled = enc.fused(self.config.text, self.config.visual).pooled
        assert pooled is not None, "a family that offers `fuse` fills Fused.pooled"
        logits, labels = self.logits(pooled), self.labels(batch)
        right = (logits.detach().argmax(dim=1) == labels).float().mean()
        metrics, told = {"tag_contrast/accuracy": right}, {"tag_contrast/accuracy": labels}
        return Loss(F.cross_entropy(logits, labels), metrics, told)

    def logits(self, pooled: Tensor) -> Tensor:
        """[B, D] -> [B, classes] fp32."""
        out: Tensor = self.head(pooled).float()
        return out

    def labels(self, batch: Batch) -> Tensor:
        """[B] int64; with 2 classes whatever was changed is 1."""
        if batch.tags_swapped is None:
            return torch.zeros_like(batch.pair_id)
        return batch.tags_swapped.long().clamp(max=self.config.classes - 1)

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 pairs."""
        return torch.tensor(len(batch), device=batch.pair_id.device)

    def passes(self) -> dict[str, float]:
        """Text, picture and their fusion."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on B rows."""
        return 2 * len(batch) * self.head.in_features * self.head.out_features, 0


build = TagContrast
