"""Contrast of regions as their surroundings tell them (CVLP, Shi et al. 2020, arXiv 2007.13135)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.nn.lxmert import WideHead
from vlscale.nn.queue import QueueOptions
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Keys, Loss, Visual, lengthened


@dataclass(frozen=True)
class Config(QueueOptions):
    """Options. Queue length, temperature and which regions count are not in the paper; the defaults are MoCo's and
    all regions. The authors' code (gao-peng-cuhk/CVLP-) has a queue of 30 batches, 0.07, all regions, and a head."""

    queue_start: Literal["random", "empty"] = "empty"  # as the paper says
    weight: float = 1.0
    text: str = "masked"  # view, of both networks
    visual: str = "masked"  # view
    momentum_visual: str = "clean"  # view that the twin sees: no region hidden
    temperature: float = 0.07  # fixed, as in MoCo
    regions: Literal["all", "masked"] = "all"  # which regions ask for their key
    embed: int = 0  # width that a head maps states to before they meet; 0 = no head (the paper tells of none)


class RegionNce(Objective):
    """Each region, some hidden, finds its own state by the twin, which sees all, among keys of earlier steps.

    Negatives are the queue's alone. It takes the twin's states of all regions. A padded region neither asks nor
    is a key: so that every picture gives as many keys, another region of the same picture (which has one)
    enters twice instead.
    """

    needs = frozenset({"text", "visual", "fuse", "regions", "detector"})
    momentum = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        if config.queue == 0:
            raise ConfigError("objectives.region_nce has queue=0, so nothing to contrast with; give a queue")
        self.config = config
        self.weight = config.weight
        self.width = config.embed or family.dims.visual
        self.head = WideHead(family.dims.visual, config.embed) if config.embed else None
        self.head_twin = copy.deepcopy(self.head).requires_grad_(False) if self.head is not None else None
        self.regions = family.inputs.regions  # of every picture: as many rows on each rank
        views = {f"visual.{config.visual}", f"visual.{config.momentum_visual}"}
        self.views = frozenset({f"text.{config.text}", *views})

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean cross-entropy over the regions that count, [] fp32; 0 while the queue is empty."""
        counted = self._counted(batch).flatten()  # [B * R]
        queries = self._states(enc, self.config.visual, self.head)  # [B * R, D]
        keys = self._states(enc.momentum, self.config.momentum_visual, self.head_twin)
        temperature = torch.full((1,), self.config.temperature, device=queries.device)
        alike = (queries * keys).sum(dim=1)
        positives = alike / temperature
        # all rows, for a sharded queue wants as many from each rank
        others = enc.queue("regions").log_sum_exp(queries, temperature)
        terms = torch.logaddexp(positives, others) - positives
        number = counted.sum().clamp(min=1)
        cosine = alike.detach().masked_fill(~counted, 0.0).sum() / number
        return Loss(terms.masked_fill(~counted, 0.0).sum() / number, {"region_nce/cosine": cosine})

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 regions that count."""
        return self._counted(batch).sum()

    def queues(self) -> Mapping[str, tuple[QueueOptions, int]]:
        """States of regions."""
        return {"regions": (self.config, self.width)}

    def keys(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...]) -> Mapping[str, Keys]:
        """The twin's states, picture by picture."""
        keys = self._states(enc.momentum, self.config.momentum_visual, self.head_twin)
        real = self._real(batch.visual[self.config.momentum_visual])
        pictures, regions = real.shape
        places = torch.arange(regions, device=keys.device).expand(pictures, -1)
        found = (~real).int().argsort(dim=1, stable=True)  # real regions first
        again = found.gather(1, places % real.sum(dim=1, keepdim=True).clamp(min=1))
        chosen = torch.where(real, places, again)
        rows = (chosen + torch.arange(pictures, device=keys.device)[:, None] * regions).flatten()
        return {"regions": Keys(keys[rows].detach(), None, whole=False)}

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """The head and its momentum copy."""
        return [(self.head, self.head_twin)] if self.head is not None and self.head_twin is not None else []

    def passes(self) -> dict[str, float]:
        """Masked text and regions and their fusion; by the twin with regions as they are."""
        text, visual, twin = self.config.text, self.config.visual, self.config.momentum_visual
        own = [f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"]
        keys = [f"encode_text:{text}", f"encode_visual:{twin}", f"fuse:{text}:{twin}"]
        return dict.fromkeys(own + [f"momentum.{name}" for name in keys], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The similarities to the queue; the head, and the twin's for queries' keys and for the queue's."""
        rows = len(batch) * self.regions  # padding asks too
        head = self.head.flops(rows) if self.head is not None else 0
        return 2 * rows * self.config.queue * self.width + head, 2 * head

    def _counted(self, batch: Batch) -> Tensor:
        """[B, R] bool."""
        visual = batch.visual[self.config.visual]
        if self.config.regions == "all":
            return self._real(visual)
        assert visual.picked is not None, "the masked view says which regions are hidden"
        return self._filled(visual.picked) & self._real(visual)

    def _states(self, enc: EncodingsLike, visual: str, head: nn.Module | None) -> Tensor:
        """[B * R, D or `embed`] fp32, unit length; R is the family's greatest number of regions."""
        states = enc.fused(self.config.text, visual).visual
        assert states is not None, "a family that offers `regions` fills Fused.visual"
        states = head(states) if head is not None else states
        return F.normalize(self._filled(states).float().flatten(0, 1), dim=1)

    def _real(self, visual: Visual) -> Tensor:
        """[B, R] bool, True = a region, False = padding."""
        if visual.mask is not None:
            return self._filled(visual.mask)
        real = torch.ones(visual.feats.shape[:2], dtype=torch.bool, device=visual.feats.device)
        return self._filled(real)

    def _filled(self, rows: Tensor) -> Tensor:
        """[B, R, ...] with as many regions on every rank."""
        return lengthened(rows, max(self.regions, rows.shape[1]))


build = RegionNce
