"""Video-subtitle matching (HERO, Li et al. 2020, arXiv 2005.00200, section 3.3): a sentence that was taken out of a
video finds the video among all (global), and its frames in it (local)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.nn.bert import init_normal
from vlscale.nn.single_stream import real
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import IGNORE, Batch, Loss, Text, lengthened

SALT = 6  # of the draw; smaller ones are taken
EPS = 1e-5  # least length in a cosine (model/pretrain.py)
KERNEL = 5  # frames that a boundary is told from (model/pretrain.py: conv_kernel_size)


@dataclass(frozen=True)
class Config:
    """Options; the defaults are the authors' for TV (config/pretrain-tv-16gpu.json, model/pretrain.py)."""

    weight: float = 1.0
    text: str = "clean"  # view without the sentences that are asked for
    visual: str = "clean"  # view
    query: str = "query"  # view of texts with the sentences that are asked for, as many for every video
    margin: float = 0.1  # of the hinge
    video_weight: float = 8.0  # lw_neg_ctx: a query against other videos
    query_weight: float = 8.0  # lw_neg_q: a video against other videos' queries
    span_weight: float = 0.01  # lw_st_ed: the local part
    span_share: float = 0.2  # of the steps that have it; 1 - drop_svmr_prob
    hard_from: int = 20000  # hard_negtiave_start_step; 0 = from the start
    hard_pool: int = 20  # so many of a row's negatives, those of the highest scores, are the hard ones
    hard_weight: float = 10.0  # of those, and the next of the others, once there are hard ones
    easy_weight: float = 0.1
    # whether the states of empty places behind a clip tell something of its last boundaries (authors: counted)
    padding: Literal["excluded", "counted"] = "excluded"
    scope: Literal["rank", "global"] = "global"  # negatives: of this micro-batch, or of the whole step


class Vsm(Objective):
    """Global: score = greatest cosine of a query with a video's frames; mean over queries of the mean over negatives of
    max(0, margin + its score - the right score), both ways. Local: cross-entropy of the first and of the last frame,
    each told from the series of dot products of the query with its video's frames by one convolution.

    A sentence asks for at least two frames, but at the end of its video. Samples of one `pair_id` are no negatives.
    """

    needs = frozenset({"text", "visual", "fuse", "regions", "queries"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        if not 0 <= config.span_share <= 1:
            raise ConfigError(f"objectives.vsm.span_share should be in [0, 1] (got {config.span_share:g})")
        if config.hard_pool < 1:
            raise ConfigError(f"objectives.vsm.hard_pool should be at least 1 (got {config.hard_pool})")
        self.config = config
        self.weight = config.weight
        self.whole = config.scope == "global"
        self.views = frozenset({f"text.{config.text}", f"text.{config.query}", f"visual.{config.visual}"})
        self.frames, width = family.inputs.frames, family.dims.visual
        self.query = nn.Linear(width, width)
        self.start = nn.Conv1d(1, 1, KERNEL, padding=KERNEL // 2, bias=False)
        self.end = nn.Conv1d(1, 1, KERNEL, padding=KERNEL // 2, bias=False)
        self.apply(init_normal)

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """Queries [b, Q, D] and which are real [b, Q]; frames [b, T, D] and which are real [b, T]; pair ids [b]."""
        asked = enc.fused(self.config.query, "").pooled
        states = enc.fused(self.config.text, self.config.visual).visual
        assert asked is not None, "a family that offers `queries` pools a text alone"
        assert states is not None, "a family that offers `regions` fills Fused.visual"
        mask = real(enc.visual(self.config.visual))
        exists = self._text(batch).mask.any(dim=1)
        rows = (len(batch), -1)
        most = max(self.frames, mask.shape[1])
        queries = asked.view(*rows, asked.shape[1])
        return queries, exists.view(rows), lengthened(states, most), lengthened(mask, most), batch.pair_id

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean over own queries, [] fp32; 0 if there is none."""
        queries, exists, frames, mask, ids = shared or self.share(enc, batch)
        own = slice(enc.first, enc.first + len(batch)) if shared else slice(None)
        number = queries.shape[1]
        mine = exists[own].flatten()  # [n], n = b * Q
        with torch.autocast(queries.device.type, enabled=False):
            to_videos = best_frame(queries[own].flatten(0, 1), frames, mask)  # [n, G]
            to_queries = best_frame(queries.flatten(0, 1), frames[own], mask[own]).T  # [b, G * Q]
        to_queries = to_queries.repeat_interleave(number, dim=0)  # [n, G * Q], of each query's video
        apart = (ids[own, None] != ids).repeat_interleave(number, dim=0)  # [n, G]
        video = torch.arange(len(ids), device=ids.device)[own].repeat_interleave(number)
        right = to_videos.gather(1, video[:, None])
        others = apart.repeat_interleave(number, dim=1) & exists.flatten()
        hard = enc.step > self.config.hard_from
        of_videos = self._hinge(right, to_videos, apart, hard)
        of_queries = self._hinge(right, to_queries, others, hard)
        drawn = self.config.span_weight > 0 and enc.chance(SALT) < self.config.span_share
        with torch.set_grad_enabled(drawn and torch.is_grad_enabled()):
            of_span = self._cross_entropy(batch, self.spans(queries[own], frames[own], mask[own]))
        c = self.config
        terms = c.video_weight * of_videos + c.query_weight * of_queries
        terms = terms + c.span_weight * of_span if drawn else terms
        total = mine.sum().clamp(min=1)
        found = right[:, 0] > to_videos.masked_fill(~apart, -2.0).amax(dim=1)
        parts = {"video": of_videos, "query": of_queries, "span": of_span, "accuracy": found.float()}
        metrics = {f"vsm/{name}": part.detach()[mine].sum() / total for name, part in parts.items()}
        return Loss(terms[mine].sum() / total, metrics, {"vsm/accuracy": video[mine]})

    def spans(self, queries: Tensor, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b * Q, T] fp32 of the first and of the last frame.

        Args:
            queries: [b, Q, D].
            frames: [b, T, D], of the queries' own videos.
            mask: [b, T] bool.
        """
        series = torch.einsum("bqd,btd->bqt", self.query(queries), frames)
        there = mask[:, None].expand(series.shape)
        if self.config.padding == "excluded":
            series = series * there
        series, there = series.flatten(0, 1), there.flatten(0, 1)
        least = torch.finfo(torch.float32).min
        first, last = (
            part(series[:, None])[:, 0].float().masked_fill(~there, least) for part in (self.start, self.end)
        )
        return first, last

    def ends(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first and the last frame of each query, [b * Q] int64 each; `IGNORE` where it has no frame."""
        spans, mask = self._text(batch).spans, batch.visual[self.config.visual].mask
        assert spans is not None, "queries say which frames they go with"
        assert mask is not None, "clips say which frames are real"
        first, past = spans.unbind(dim=1)
        last = mask.sum(dim=1).repeat_interleave(len(spans) // len(mask)) - 1
        end = torch.maximum(past - 1, first + 1).minimum(last)
        nowhere = (past <= first) | (first > last)
        return first.masked_fill(nowhere, IGNORE), end.masked_fill(nowhere, IGNORE)

    def _cross_entropy(self, batch: Batch, logits: tuple[Tensor, Tensor]) -> Tensor:
        """Of the first and of the last frame together, [b * Q] fp32."""
        first, end = self.ends(batch)
        of_first = F.cross_entropy(logits[0], first, reduction="none", ignore_index=IGNORE)
        return of_first + F.cross_entropy(logits[1], end, reduction="none", ignore_index=IGNORE)

    def _hinge(self, right: Tensor, scores: Tensor, exists: Tensor, hard: bool) -> Tensor:
        """Mean over negatives [n] fp32, of right [n, 1], scores [n, C] and which of them are negatives [n, C]."""
        terms = (self.config.margin + scores - right).clamp(min=0.0) * exists
        if hard:
            weights = torch.full_like(terms, self.config.easy_weight)
            most = scores.masked_fill(~exists, -2.0).topk(min(self.config.hard_pool, scores.shape[1]), dim=1).indices
            terms = terms * weights.scatter(1, most, self.config.hard_weight)
        return terms.sum(dim=1) / exists.sum(dim=1).clamp(min=1)

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 queries; None with `scope: rank`."""
        return self._text(batch).mask.any(dim=1).sum() if self.whole else None

    def passes(self) -> dict[str, float]:
        """Text and frames together, and the queries alone."""
        text, visual, query = self.config.text, self.config.visual, self.config.query
        names = [f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"]
        return dict.fromkeys([*names, f"encode_text:{query}", f"fuse:{query}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """Cosines of queries with the frames of all videos, and of all queries with own frames."""
        queries, width = len(self._text(batch).ids), self.query.in_features
        ranks = distributed.world_size() if self.whole else 1
        cosines = 2 * queries * len(batch) * ranks * self.frames
        return 2 * width * (cosines + queries * (width + self.frames)), 0

    def _text(self, batch: Batch) -> Text:
        return batch.text[self.config.query]


def best_frame(queries: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
    """[N, V] fp32, the greatest cosine of each query [N, D] with the frames [V, T, D] of each video, of which `mask`
    [V, T] says which are real; -1 of a video without frames."""
    queries, frames = (F.normalize(part.float(), dim=-1, eps=EPS) for part in (queries, frames))
    cosines = torch.einsum("nd,vtd->nvt", queries, frames)
    return cosines.masked_fill(~mask, -1.0).amax(dim=2)


build = Vsm
