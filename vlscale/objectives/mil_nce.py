"""MIL-NCE (Miech et al. 2020, arXiv 1912.06430, equation 1): a clip and its bag of candidate captions, against the
other clips' bags; and UniVL's joint objective (Luo et al. 2020, arXiv 2002.06353, released code)."""

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
    """Options. UniVL: anchors middle, positives once, scope rank."""

    weight: float = 1.0
    text: str = "clean"  # view with K rows for each clip, the rows of one clip together (K from the batch)
    visual: str = "clean"  # view
    # which clips are compared: each, whose bag are its own captions; or of a sample's n clips that with number n // 2,
    # whose bag are the captions of all n
    anchors: Literal["each", "middle"] = "each"
    # what of a bag's own clips stands beside its captions: they are counted there again, or left out
    positives: Literal["twice", "once"] = "twice"
    scope: Literal["rank", "global"] = "global"  # columns: of this micro-batch, or of the whole step
    gradient: Literal["exact", "authors"] = "exact"  # theirs is 1 / ranks of it: they never sum it over ranks


class MilNce(Objective):
    """Clip i finds one of its captions among all captions, and they find clip i among all clips, in one softmax.

    With s_ijk = clip i . caption k of clip j: mean over i of
    log( sum_jk exp s_ijk + sum_jk exp s_jik ) - log sum_k exp s_iik.
    A clip's own captions stand in both sums, as in the authors' code (loss.py, where it is intended), so the
    least value is log 2; with `positives: once` the second sum has j != i, and the least value is 0. Plain dot products
    of what the family embeds: no temperature.

    With `anchors: middle` i is the middle clip of a sample (a video), s_iik ranges over the captions of all its clips,
    the second sum over i's own captions alone, and j != i there means clips of other samples.
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
        """Clips [b, n, E] and their captions [b, n, K, E]."""
        return self._embeds(enc, batch)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean over own clips that are compared, [] fp32."""
        clips, captions = shared or self._embeds(enc, batch)  # [G, n, E], [G, n, K, E]
        own = slice(enc.first, enc.first + len(batch)) if shared else slice(None)
        numbers = torch.arange(clips.shape[:2].numel(), device=clips.device).view(clips.shape[:2])
        anchors, texts, ids = (each[own] for each in (clips.float(), captions.float(), numbers))
        bags = texts
        if self.config.anchors == "middle":
            middle = slice(clips.shape[1] // 2, clips.shape[1] // 2 + 1)
            numbers = numbers[:, :1].expand(numbers.shape)  # clips of one sample are alike
            anchors, texts, ids, bags = anchors[:, middle], texts[:, middle], ids[:, :1], bags.flatten(1, 2)[:, None]
        anchors, texts, ids, bags = (each.flatten(0, 1) for each in (anchors, texts, ids, bags))
        ones = torch.ones(1, device=clips.device)
        of_clip, best = contrast.log_sum_exp(anchors, captions.flatten(0, 2), ones)
        apart = None
        if self.config.positives == "once":
            apart = (ids.repeat_interleave(texts.shape[1]), numbers.flatten())
        of_captions, _ = contrast.log_sum_exp(texts.flatten(0, 1), clips.flatten(0, 1), ones, apart=apart)
        positives = (anchors[:, None] * bags).sum(dim=2)  # [N, K]
        everything = torch.logaddexp(of_clip, of_captions.view(len(anchors), -1).logsumexp(dim=1))
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
        captions, clips = len(batch.text[self.config.text].ids), len(batch.visual[self.config.visual].feats)
        share = len(batch) / clips if self.config.anchors == "middle" else 1.0  # of the clips that are compared
        return int(2 * 2 * clips * ranks * captions * self.embed * share), 0

    def _embeds(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, Tensor]:
        """Clips [b, n, E] and captions [b, n, K, E]."""
        clips, captions = embed_of(enc.visual(self.config.visual)), embed_of(enc.text(self.config.text))
        if len(captions) % len(clips):
            raise DataError(
                f"objectives.mil_nce reads {len(captions)} captions (view '{self.config.text}') for {len(clips)} "
                f"clips; give every clip the same number of candidates"
            )
        clips = clips.view(len(batch), -1, clips.shape[1])
        return clips, captions.view(*clips.shape[:2], -1, captions.shape[1])


build = MilNce
