"""Masked region modelling by noise-contrastive estimation (ViLBERT's visual target 2: facebookresearch/
vilbert-multi-task, vilbert/vilbert.py; the loss of van den Oord et al. 2018, arXiv 1807.03748, equation 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.nn.contrast import NEVER
from vlscale.nn.region_head import RegionHead, hidden_regions
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss, Visual, lengthened

SALT = 5  # of the draws; smaller ones are taken
BLOCK = 2**24  # numbers of the features that are gathered at once: 64 MiB of fp32


@dataclass(frozen=True)
class Config:
    """Options. Negatives are drawn anew for each hidden region, and one may be drawn twice."""

    weight: float = 1.0
    text: str = "masked"  # view
    visual: str = "masked"  # view
    across: int = 89  # negatives from other samples: 0.7 of the authors' num_negative 128, rounded down
    inside: int = 38  # negatives from the same sample: 0.3 of it
    padding: Literal["excluded", "drawn"] = "excluded"  # whether padding may be a negative; authors: drawn
    # drawn from this micro-batch, whose mean counts as any other's (authors), or from the whole step's batch; that
    # holds its samples x regions x F features on every rank
    scope: Literal["rank", "global"] = "rank"


class MrmNce(Objective):
    """Which of many features is the hidden region's, by dot products without temperature.

    `region_nce` is another loss: it compares states with the twin's of earlier steps.
    """

    fields = frozenset({"targets"})
    needs = frozenset({"text", "visual", "fuse", "regions", "detector"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        if config.across < 0 or config.inside < 0 or config.across + config.inside == 0:
            raise ConfigError(
                f"objectives.mrm_nce has across={config.across} and inside={config.inside}; give at least one negative"
            )
        self.config = config
        self.weight = config.weight
        self.whole = config.scope == "global"
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.regions = family.inputs.regions
        self.head = RegionHead(family.dims.visual, family.dims.feats)

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """Features as they were before hiding [b, R, F], and which may be drawn [b, R] bool; no gradient."""
        enc.text(self.config.text), enc.visual(self.config.visual)
        return self._pool(batch)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Cross-entropy of the hidden region's own feature among negatives, mean over hidden regions, [] fp32; 0 if
        none is hidden.

        Raises:
            ConfigError: negatives from other samples are asked for, and there is one sample.
        """
        logits = self.logits(enc, batch, shared)
        terms = max(len(logits), 1)
        found = (logits.detach()[:, 1:].amax(dim=1) < logits.detach()[:, 0]).sum() / terms
        chance = (1 / (logits.detach() != NEVER).sum(dim=1)).sum() / terms
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        loss = F.cross_entropy(logits, labels, reduction="sum") / terms
        return Loss(loss, {"mrm_nce/accuracy": found, "mrm_nce/chance": chance})

    def logits(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Tensor:
        """[M, 1 + across + inside] fp32, the own feature first, `NEVER` where there is none to draw."""
        pool, drawable = shared or self._pool(batch)  # [G, R, F], [G, R]
        if len(pool) < 2 and self.config.across:
            raise ConfigError(
                "objectives.mrm_nce draws negatives from other samples and got one sample; set data.micro_batch to "
                "at least 2, objectives.mrm_nce.across=0, or (with more ranks or steps) objectives.mrm_nce.scope=global"
            )
        states = enc.fused(self.config.text, self.config.visual).visual
        assert states is not None, "a family that offers `regions` fills Fused.visual"
        picked = hidden_regions(self._visual(batch))
        own = torch.arange(len(picked), device=picked.device) + (enc.first if self.whole else 0)
        index, exists = negatives(self.draw(enc, len(picked)), drawable, own, self.config.across)
        sample, region = picked.nonzero(as_tuple=True)
        itself = own[sample] * pool.shape[1] + region
        predicted = self.head(states[picked]).float()
        columns = torch.cat([itself[:, None], index[sample, region]], dim=1)
        products: Tensor = _Products.apply(predicted, pool.flatten(0, 1), columns)  # type: ignore[no-untyped-call]
        return products.masked_fill(~F.pad(exists[sample, region], (1, 0), value=True), NEVER)

    def draw(self, enc: EncodingsLike, samples: int) -> Tensor:
        """[b, R, across + across + inside] fp64 in [0, 1), by (seed, step, number in the whole batch) alone: which
        sample, which of its regions, which region of the same sample."""
        uniforms = enc.uniforms(SALT)
        shape = (self.regions, 2 * self.config.across + self.config.inside)
        seeds = (uniforms * 2**53).long().tolist()
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        return torch.stack(drawn).to(uniforms.device)

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 hidden regions; None with `scope: rank`."""
        return hidden_regions(self._visual(batch)).sum() if self.whole else None

    def passes(self) -> dict[str, float]:
        """Text, regions and their fusion."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on hidden regions and the dot products."""
        hidden = int(hidden_regions(self._visual(batch)).sum())
        columns = 1 + self.config.across + self.config.inside
        return self.head.flops(hidden) + 2 * hidden * columns * self.head.out, 0

    def _pool(self, batch: Batch) -> tuple[Tensor, Tensor]:
        visual = self._visual(batch)
        assert visual.targets is not None, "the masked view carries the features it hid"
        real = torch.ones(visual.targets.shape[:2], dtype=torch.bool, device=visual.targets.device)
        if self.config.padding == "excluded" and visual.mask is not None:
            real = visual.mask
        return lengthened(visual.targets, self.regions), lengthened(real, self.regions)

    def _visual(self, batch: Batch) -> Visual:
        return batch.visual[self.config.visual]


def negatives(draws: Tensor, drawable: Tensor, own: Tensor, across: int) -> tuple[Tensor, Tensor]:
    """Regions that stand against each region, as the authors draw them: uniform over the other samples and then over
    that one's regions; and uniform over the sample's other regions. The last takes the place of one's own.

    Args:
        draws: [b, R, 2 * across + inside] in [0, 1).
        drawable: [G, R] bool.
        own: [b] int64, the samples' numbers among the G.
        across: how many come from other samples.

    Returns:
        [b, R, across + inside] int64, sample * R + region; and bool, False = there is none to draw.
    """
    rows, slots, others = draws.tensor_split((across, 2 * across), dim=2)
    number, regions = drawable.shape
    counts = drawable.sum(dim=1)  # [G]
    order = (~drawable).int().argsort(dim=1, stable=True)  # [G, R], those that may be drawn first
    place = drawable.cumsum(dim=1)[own] - 1  # [b, R], of a region among its sample's
    me = own[:, None, None]
    row = _choose(rows, torch.tensor(number - 1, device=draws.device))
    row = torch.where(row == me, number - 1, row)
    there = order[row, _choose(slots, counts[row])]
    rest = (counts[own] - 1)[:, None, None]
    here = _choose(others, rest)
    here = torch.where(here == place[:, :, None], rest.clamp(min=0), here)
    index = torch.cat([row * regions + there, me * regions + order[me, here]], dim=2)
    exists = torch.cat([counts[row] > 0, (rest > 0).expand(here.shape)], dim=2)
    return index, exists


def _choose(draws: Tensor, number: Tensor) -> Tensor:
    """Numbers from 0 to `number` - 1, and 0 where there is none."""
    return torch.minimum((draws * number).long(), number - 1).clamp(min=0)


class _Products(torch.autograd.Function):
    """queries [M, F] fp32, keys [C, F], index [M, N] int64 -> dot products [M, N] fp32, gradient to queries alone.

    Some rows at a time, for the gathered keys [M, N, F] are far larger than all else.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(keys, index)
        products = queries.new_empty(index.shape)
        with torch.autocast(queries.device.type, enabled=False):
            for rows in _blocks(keys, index):
                products[rows] = torch.einsum("mf,mnf->mn", queries[rows], keys[index[rows]].float())
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        keys, index = ctx.saved_tensors
        found = gradient.new_empty(len(index), keys.shape[1])
        with torch.autocast(gradient.device.type, enabled=False):
            for rows in _blocks(keys, index):
                found[rows] = torch.einsum("mn,mnf->mf", gradient[rows], keys[index[rows]].float())
        return found, None, None


def _blocks(keys: Tensor, index: Tensor) -> list[slice]:
    step = max(1, BLOCK // (index.shape[1] * keys.shape[1]))
    return [slice(start, start + step) for start in range(0, len(index), step)]


build = MrmNce
