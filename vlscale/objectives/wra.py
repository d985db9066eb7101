"""Word-region alignment by optimal transport (UNITER, Chen et al. 2020, arXiv 1909.11740, section 3.2), whose plan
IPOT finds (Xie et al. 2018, arXiv 1802.04307, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn.single_stream import real
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss

NORM_LEAST = 1e-5  # of a state, in the cosine (UNITER model/ot.py)


@dataclass(frozen=True)
class Config:
    """Options. UNITER adds it to matching with a weight of 0.1."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "clean"  # view
    beta: float = 0.5  # the cost's scale in the kernel (UNITER model/ot.py, as are the next two)
    iterations: int = 50
    scalings: int = 1  # of both marginals in each iteration


class Alignment(NamedTuple):
    """What transport finds between the words and the regions of each pair."""

    cost: Tensor  # [B, L, R] fp32, 1 - cosine; 0 at padding
    plan: Tensor  # [B, L, R] fp32, how much of a word goes to a region, sums to 1; 0 at padding; detached
    distance: Tensor  # [B] fp32


class Wra(Objective):
    """Words (special tokens among them) move to regions cheaply in a pair that matches, dearly in one that does not.

    It reads `Batch.matched`, as matching with the loader's negatives does; without it every pair matches.
    """

    needs = frozenset({"text", "visual", "fuse", "regions", "single_stream"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}", "pairs.mismatch"})
        self.width = family.dims.visual

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """(sum of distances that match - sum of the others) / B, [] fp32; all of it in fp32."""
        distance = self.align(enc).distance
        matched = torch.ones_like(distance, dtype=torch.bool) if batch.matched is None else batch.matched
        with torch.no_grad():
            means = [(distance * part).sum() / part.sum().clamp(min=1) for part in (matched, ~matched)]
        metrics = {"wra/matched": means[0], "wra/mismatched": means[1]}
        return Loss(torch.where(matched, distance, -distance).mean(), metrics)

    def align(self, enc: EncodingsLike) -> Alignment:
        """Of every pair; the gradient takes the plan as given."""
        c = self.config
        fused = enc.fused(c.text, c.visual)
        assert fused.text is not None, "a family that offers `fuse` fills Fused.text"
        assert fused.visual is not None, "a family that offers `regions` fills Fused.visual"
        words, regions = real(enc.text(c.text)), real(enc.visual(c.visual))
        with torch.autocast(fused.text.device.type, enabled=False):
            cost = cosine_cost(fused.text.float(), fused.visual.float(), words, regions)
            plan = transport_plan(cost.detach(), words, regions, c.beta, c.iterations, c.scalings)
            return Alignment(cost, plan, (cost * plan).sum(dim=(1, 2)))

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 pairs."""
        return torch.tensor(len(batch), device=batch.pair_id.device)

    def passes(self) -> dict[str, float]:
        """Text, regions and their fusion."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The cosines; two products of the plan with a vector for each scaling."""
        ids, feats = batch.text[self.config.text].ids, batch.visual[self.config.visual].feats
        pairs = 2 * len(ids) * ids.shape[1] * feats.shape[1]
        return pairs * self.width, pairs * 2 * self.config.iterations * self.config.scalings


def cosine_cost(text: Tensor, visual: Tensor, words: Tensor, regions: Tensor) -> Tensor:
    """1 - cosine of every word with every region.

    Args:
        text: states [B, L, D] fp32.
        visual: states [B, R, D] fp32.
        words: [B, L] bool, True = token.
        regions: [B, R] bool, True = region.

    Returns:
        [B, L, R] fp32, 0 at padding.
    """
    text, visual = (F.normalize(states, dim=2, eps=NORM_LEAST) for states in (text, visual))
    cost = 1 - text @ visual.transpose(1, 2)
    return cost.masked_fill(~(words[:, :, None] & regions[:, None, :]), 0.0)


@torch.no_grad()
def transport_plan(
    cost: Tensor, words: Tensor, regions: Tensor, beta: float = 0.5, iterations: int = 50, scalings: int = 1
) -> Tensor:
    """The plan between two uniform distributions that IPOT finds; the region marginal holds only in the limit.

    Args:
        cost: [B, L, R] fp32.
        words: [B, L] bool, True = token.
        regions: [B, R] bool, True = region.
        beta: the proximal term's weight.
        iterations: proximal steps.
        scalings: of the regions', then the words' marginal, in each step.

    Returns:
        [B, L, R] fp32, without gradient, 0 at padding; each word sends 1 / (words of its text). All 0 for a text
        or a picture of nothing.
    """
    real = words[:, :, None] & regions[:, None, :]
    kernel = (-cost / beta).exp().masked_fill(~real, 0.0)
    plan = real.to(cost.dtype)
    number = words.sum(dim=1, keepdim=True), regions.sum(dim=1, keepdim=True)  # [B, 1] each
    word_scale = (words / number[0].clamp(min=1)).to(cost.dtype)  # [B, L]
    for _ in range(iterations):
        step = kernel * plan
        for _ in range(scalings):
            region_scale = _scale(torch.einsum("blr,bl->br", step, word_scale), number[1])
            word_scale = _scale(torch.einsum("blr,br->bl", step, region_scale), number[0])
        plan = word_scale[:, :, None] * step * region_scale[:, None, :]
    return plan


def _scale(mass: Tensor, number: Tensor) -> Tensor:
    """What brings each mass [B, N] to 1 / number [B, 1]; padding has none and keeps none."""
    scale = 1 / (number * mass)
    return scale.masked_fill(mass <= 0, 0.0)


build = Wra
