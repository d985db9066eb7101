"""Max-margin ranking of clips and captions (Karpathy et al. 2014; HowTo100M, Miech et al. 2019, equation 2), where
other clips of the same video may weigh more than other videos'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlscale import distributed
from vlscale.errors import ConfigError, DataError
from vlscale.nn import contrast
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective, embed_of
from vlscale.types import Batch, Loss

BLOCK = 2**22  # scores that are held at once


@dataclass(frozen=True)
class Config:
    """Options; the defaults are HowTo100M's (args.py)."""

    weight: float = 1.0
    text: str = "clean"  # view with one caption of each clip
    visual: str = "clean"  # view with one clip or several of each video
    margin: float = 0.1
    # Where videos have several clips, the share of a clip's own video in the weight of all pairs (hard_negative_rate);
    # None = every pair weighs the same (negative_weighting 0)
    same_video: float | None = 0.5
    normalize: bool = False  # what is embedded gets unit length first (UniVL, whose embeddings have any)
    scope: Literal["rank", "global"] = "global"  # pairs: of this micro-batch, or of the whole step

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ConfigError(f"objectives.margin.margin should be at least 0 (got {self.margin})")
        if self.same_video is not None and not 0 <= self.same_video < 1:
            raise ConfigError(
                f"objectives.margin.same_video should be from 0 and below 1, or null (got {self.same_video})"
            )


class Weights(NamedTuple):
    """Of a pair from one video, and of any other."""

    same: float
    other: float


class Margin(Objective):
    """Every caption is nearer to its clip than to others by a margin, and every clip to its caption.

    With s_ij = caption i . clip j of N pairs, B videos of n clips, margin m:
    1 / N^2 * sum_ij w_ij * ( max(0, m + s_ij - s_ii) + max(0, m + s_ij - s_jj) ). The diagonal takes part, as in the
    authors' code (loss.py:33-39), and adds a constant. w_ij = B h for two clips of one video, B (1 - h) / (B - 1) for
    others, h = `same_video`: their mean is 1. Scores are made in blocks where there are many, and then made again in
    the backward pass.
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
        """Captions and clips, [b, n, E] each."""
        return self._embeds(enc, batch)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean over own clips, captions and their pairs, [] fp32."""
        captions, clips = shared or self._embeds(enc, batch)  # [G, n, E]
        videos, number = clips.shape[:2]
        weights = self.pair_weights(videos, number)
        first = enc.first if shared else 0
        own_captions, own_clips = (each.narrow(0, first, len(batch)).flatten(0, 1) for each in (captions, clips))
        right = (own_captions.float() * own_clips.float()).sum(dim=1)  # [r]
        video = torch.arange(videos, device=clips.device).repeat_interleave(number)
        hinges = partial(_hinges, margin=self.config.margin, weights=weights)
        own = video[first * number : (first + len(batch)) * number]
        to_clips, best = _sum(hinges, own_captions, clips.flatten(0, 1), right, own, video)
        to_captions, _ = _sum(hinges, own_clips, captions.flatten(0, 1), right, own, video)
        loss = (to_clips + to_captions) / (len(right) * len(video))
        found = right.detach() >= best - 1e-5 * (1 + best.abs())  # rounding apart, its own clip is the best
        return Loss(loss, {"margin/accuracy": found.float().mean()})

    def passes(self) -> dict[str, float]:
        """Clips and captions alone."""
        return {f"encode_text:{self.config.text}": 1.0, f"encode_visual:{self.config.visual}": 1.0}

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """Own captions with all clips, and own clips with all captions."""
        ranks = distributed.world_size() if self.whole else 1
        clips = len(batch.visual[self.config.visual].feats)
        return 2 * 2 * clips * clips * ranks * self.embed, 0

    def _embeds(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, Tensor]:
        """Captions and clips, [b, n, E] each."""
        captions, clips = embed_of(enc.text(self.config.text)), embed_of(enc.visual(self.config.visual))
        if len(captions) != len(clips):
            raise DataError(
                f"objectives.margin reads {len(captions)} captions (view '{self.config.text}') for {len(clips)} clips; "
                f"give every clip one caption (views.pairs.clips.candidates=1)"
            )
        if self.config.normalize:
            captions, clips = (F.normalize(each.float(), dim=1) for each in (captions, clips))
        return captions.view(len(batch), -1, captions.shape[1]), clips.view(len(batch), -1, clips.shape[1])

    def pair_weights(self, videos: int, number: int) -> Weights:
        """Of a batch of so many videos with so many clips each."""
        rate = self.config.same_video
        if rate is None or number == 1:
            return Weights(1.0, 1.0)
        if videos == 1:
            raise DataError(
                f"objectives.margin.same_video={rate} weighs other videos' clips against the own, but a step sees one "
                "video; write data.batch=2 or more (with scope=rank data.micro_batch too), or "
                "objectives.margin.same_video=null"
            )
        return Weights(videos * rate, videos * (1 - rate) / (videos - 1))


def _sum(
    hinges: Callable[..., tuple[Tensor, Tensor]],
    rows: Tensor,
    columns: Tensor,
    right: Tensor,
    row_video: Tensor,
    column_video: Tensor,
) -> tuple[Tensor, Tensor]:
    """[] all hinges of rows [r, E] against columns [N, E], and each row's greatest score [r]."""
    size = max(1, BLOCK // len(rows))
    run: Any = hinges if size >= len(columns) else partial(checkpoint, hinges, use_reentrant=False)
    parts = [
        run(rows, columns[start : start + size], right, row_video, column_video[start : start + size])
        for start in range(0, len(columns), size)
    ]
    totals, best = zip(*parts, strict=True)
    return torch.stack(totals).sum(), torch.stack(best).amax(dim=0)


def _hinges(
    rows: Tensor,
    columns: Tensor,
    right: Tensor,
    row_video: Tensor,
    column_video: Tensor,
    margin: float,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    scores = contrast.logits(rows, columns, torch.ones(1, device=rows.device))  # [r, c]
    same = row_video[:, None] == column_video
    weight = torch.where(same, weights.same, weights.other)
    return (weight * (margin + scores - right[:, None]).relu()).sum(), scores.detach().amax(dim=1)


build = Margin
