"""Contrast of pairs that a cross encoder scores: every text beside every clip of the batch (CBT's cross-modal NCE, Sun
et al. 2019, arXiv 1906.05743; UniVL's alignment, Luo et al. 2020, arXiv 2002.06353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.nn.bert import init_normal
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss, Stream


@dataclass(frozen=True)
class Config:
    """Options. CBT: direction video_to_text, hidden as wide as the model; UniVL: both views masked."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "clean"  # view
    direction: Literal["text_to_video", "video_to_text"] = "text_to_video"  # what asks, and among what
    hidden: int = 0  # width of a layer with GELU between the pair's vector and its score; 0 = none
    block: int = 0  # pairs fused at once, made again in the backward pass; 0 = all at once, kept
    # the others of this micro-batch (CBT and UniVL: of a rank), or of the whole step
    scope: Literal["rank", "global"] = "rank"


class PairNce(Objective):
    """-log softmax at a text's own clip, of the scores of all clips beside it; or the other way round.

    Every row of a sample counts by itself: other clips of the same video are negatives, as in UniVL.

    N own rows and C columns cost N * C fusion passes, whose activations are the largest thing in memory; with `block`
    only those of so many pairs are held at a time, for a second pass in the backward. Scores are N * C numbers.
    """

    needs = frozenset({"text", "visual", "fuse", "pairs"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        for name in ("hidden", "block"):
            if (value := getattr(config, name)) < 0:
                raise ConfigError(f"objectives.pair_nce.{name} should be at least 0 (got {value})")
        self.config = config
        self.weight = config.weight
        self.whole = config.scope == "global"
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.asks_text = config.direction == "text_to_video"
        self.family = (family,)  # in a tuple: it is the model's submodule, not ours
        width = family.dims.pooled or family.dims.fused
        self.dense = nn.Linear(width, config.hidden) if config.hidden else None
        self.score = nn.Linear(config.hidden or width, 1)
        self.apply(init_normal)

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """The pair ids [b], which tell how many samples there are."""
        enc.text(self.config.text), enc.visual(self.config.visual)
        return (batch.pair_id,)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean cross-entropy over own rows, [] fp32.

        Raises:
            ConfigError: there are not as many texts as clips.
        """
        scores, first = self.scores(enc, batch, shared)
        right = torch.arange(first, first + len(scores), device=scores.device)
        found = scores.detach().gather(1, right[:, None])
        others = scores.detach().scatter(1, right[:, None], float("-inf"))
        metrics = {
            "pair_nce/accuracy": (others < found).all(dim=1).float().mean(),
            "pair_nce/chance": torch.full((), 1 / scores.shape[1], device=scores.device),
        }
        return Loss(F.cross_entropy(scores, right), metrics)

    def scores(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> tuple[Tensor, int]:
        """[N, C] fp32 of own rows beside all columns, and the column that is row 0's own."""
        text, visual = enc.text(self.config.text), enc.visual(self.config.visual)
        rows, first = len(visual.hidden), 0
        if len(text.hidden) != rows:
            raise ConfigError(
                f"objectives.pair_nce pairs {len(text.hidden)} texts (view '{self.config.text}') with {rows} clips; "
                "give every clip one text (views.pairs.clips.candidates=1)"
            )
        if shared:
            everyone = torch.arange(len(shared[0]) * rows // len(batch), device=shared[0].device)
            first = enc.first * rows // len(batch)
            if self.asks_text:
                visual = enc.rows("visual", self.config.visual, everyone)
            else:
                text = enc.rows("text", self.config.text, everyone)
        asked, asking = (visual, text) if self.asks_text else (text, visual)
        columns = len(asked.hidden)
        pairs = torch.arange(len(asking.hidden) * columns, device=batch.pair_id.device)
        pooled = []
        for part in torch.split(pairs, self.config.block or len(pairs)):
            own, other = part // columns, part % columns
            places = (own, other) if self.asks_text else (other, own)
            run = _again if self.config.block and torch.is_grad_enabled() else _pooled
            pooled.append(run(enc.family, text, visual, *places))
        hidden = torch.cat(pooled)
        hidden = hidden if self.dense is None else F.gelu(self.dense(hidden))
        return self.score(hidden).view(-1, columns).float(), first

    def passes(self) -> dict[str, float]:
        """Texts and clips alone; those that fuse them are in `head_flops`, for their number is the batch's."""
        return {f"encode_text:{self.config.text}": 1.0, f"encode_visual:{self.config.visual}": 1.0}

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """All pairs fused, and the head on them."""
        texts = batch.text[self.config.text].ids
        columns = len(texts) * (distributed.world_size() if self.whole else 1)
        fuse = self.family[0].flops(texts.shape[1])["fuse"]
        head = 2 * self.score.in_features
        if self.dense is not None:
            head += 2 * self.dense.in_features * self.dense.out_features
        return len(texts) * columns * (fuse + head), 0


def _pooled(family: FamilyLike, text: Stream, visual: Stream, texts: Tensor, clips: Tensor) -> Tensor:
    """[n, D] of the pairs (texts[i], clips[i])."""
    pooled = family.fuse(_rows(text, texts), _rows(visual, clips)).pooled
    assert pooled is not None, "a family that offers `fuse` fills Fused.pooled"
    return pooled


def _again(family: FamilyLike, text: Stream, visual: Stream, texts: Tensor, clips: Tensor) -> Tensor:
    """The same, made again in the backward pass in place of being kept."""
    out: Tensor = checkpoint(_pooled, family, text, visual, texts, clips, use_reentrant=False)
    return out


def _rows(stream: Stream, index: Tensor) -> Stream:
    return Stream(stream.hidden[index], None if stream.mask is None else stream.mask[index])


build = PairNce
