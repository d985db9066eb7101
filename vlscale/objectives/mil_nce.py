"""MIL-NCE (Miech et al. 2020, equation 1): a clip and its bag of candidate captions, against the other clips' bags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.errors import DataError
from vlscale.nn import contrast
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective, embed_of
from vlscale.types import Batch, Loss


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    text: str = "clean"  # view with K rows for each clip, the rows of one clip together (K from the batch)
    visual: str = "clean"  # view
    scope: Literal["rank", "global"] = "global"  # columns: of this micro-batch, or of the whole step
    gradient: Literal["exact", "authors"] = "exact"  # theirs is 1 / ranks of it: they never sum it over ranks


class MilNce(Objective):
    """Clip i finds one of its captions among all captions, and they find clip i among all clips, in one softmax.

    With s_ijk = clip i . caption k of clip j: mean over i of
    log( sum_jk exp s_ijk + sum_jk exp s_jik ) - log sum_k exp s_iik.
    A clip's own captions stand in both sums, as in the authors' code (loss.py, where it is intended), so the
    least value is log 2. Plain dot products of what the family embeds: no temperature.
    """

    needs = frozenset({"text", "visual", "embed"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.whole = config.scope == "global"
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.embed = family.dims.embed

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """Clips [b, E] and their captions [b, K, E]."""
        return self._embeds(enc)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean over own clips, [] fp32."""
        clips, captions = shared or self._embeds(enc)  # [G, E], [G, K, E]
        first = enc.first if shared else 0
        own, bags = clips.narrow(0, first, len(batch)).float(), captions.narrow(0, first, len(batch)).float()
        ones = torch.ones(1, device=clips.device)
        of_clip, best = contrast.log_sum_exp(own, captions.flatten(0, 1), ones)
        of_captions, _ = contrast.log_sum_exp(bags.flatten(0, 1), clips, ones)
        positives = (own[:, None] * bags).sum(dim=2)  # [b, K]
        everything = torch.logaddexp(of_clip, of_captions.view(positives.shape).logsumexp(dim=1))
        loss = (everything - positives.logsumexp(dim=1)).mean()
        if self.config.gradient == "authors":
            loss = loss.detach() + (loss - loss.detach()) / distributed.world_size()
        found = positives.detach().amax(dim=1)
        right = found >= best - 1e-5 * (1 + best.abs())  # rounding apart, one of its captions is the best
        return Loss(loss, {"mil_nce/accuracy": right.float().mean()})

    def passes(self) -> dict[str, float]:
        """Clips and captions alone."""
        return {f"encode_text:{self.config.text}": 1.0, f"encode_visual:{self.config.visual}": 1.0}

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """Clips with all captions, and captions with all clips."""
        ranks = distributed.world_size() if self.whole else 1
        captions = len(batch.text[self.config.text].ids)
        return 2 * 2 * len(batch) * ranks * captions * self.embed, 0

    def _embeds(self, enc: EncodingsLike) -> tuple[Tensor, Tensor]:
        """Clips [b, E] and captions [b, K, E]."""
        clips, captions = embed_of(enc.visual(self.config.visual)), embed_of(enc.text(self.config.text))
        if len(captions) % len(clips):
            raise DataError(
                f"objectives.mil_nce reads {len(captions)} captions (view '{self.config.text}') for {len(clips)} "
                f"clips; give every clip the same number of candidates"
            )
        return clips, captions.view(len(clips), -1, captions.shape[1])


build = MilNce
