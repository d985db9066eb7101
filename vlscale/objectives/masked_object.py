"""Masked object prediction: the detector's classes, attributes and features (LXMERT, Tan and Bansal 2019, arXiv
1908.07490, section 3.1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.nn.bert import NORM_EPS, init_normal
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss, Visual

PARTS = ("objects", "attributes", "features")
READ = {
    "objects": {"classes", "class_confidence"},
    "attributes": {"attributes", "attribute_confidence"},
    "features": {"targets"},
}


@dataclass(frozen=True)
class Config:
    """Options; the defaults are the authors' (src/lxrt/modeling.py)."""

    weight: float = 1.0
    text: str = "masked"  # view
    visual: str = "masked"  # view
    parts: tuple[str, ...] = PARTS  # VisualConfig: visual_losses
    attribute_classes: int = 400  # VisualConfig: attr_id_num
    scale: float = 1 / 0.15  # on every part: means range over all regions, of which 0.15 are hidden
    labelled: Literal["all", "hidden"] = "all"  # regions that objects and attributes are told of (the paper: hidden)
    scope: Literal["global", "rank"] = "global"  # one mean over the step's regions, or one per rank (authors)


class MaskedObject(Objective):
    """What a detector says of each region: its class and attribute, weighed by how sure it is, and its feature.

    Features are restored where they were hidden. Classes and attributes are told of every region: the authors weigh
    by the detector's confidence alone, so a region that was not hidden counts as much.
    """

    needs = frozenset({"text", "visual", "fuse", "regions", "detector"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        unknown = sorted(set(config.parts) - set(PARTS))
        if unknown or not config.parts:
            raise ConfigError(
                f"objectives.masked_object.parts is {list(config.parts)}; name some of {', '.join(PARTS)}"
            )
        self.config = config
        self.weight = config.weight
        self.fields = frozenset().union(*(READ[part] for part in config.parts))
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        sizes = (family.dims.classes, config.attribute_classes, family.dims.feats)
        outputs = {part: size for part, size in zip(PARTS, sizes, strict=True) if part in config.parts}
        self.head = ObjectHead(family.dims.visual, outputs)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """The sum of the parts, each `scale` times its mean over all real regions, [] fp32; 0 if there is none."""
        visual = self._visual(batch)
        states = enc.fused(self.config.text, self.config.visual).visual
        assert states is not None, "a family that offers `regions` fills Fused.visual"
        real = real_regions(visual)
        assert visual.picked is not None, "the masked view says which regions are hidden"
        hidden = visual.picked[real]  # [M]
        made = self.head(states[real], hidden)
        regions = max(len(hidden), 1)
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        labels: dict[str, Tensor] = {}
        for part, out in made.items():
            if part == "features":
                terms[part] = feature_terms(out, visual, real).sum()
            else:
                told = label_terms(out, visual, real, part)
                terms[part] = (told * hidden if self.config.labelled == "hidden" else told).sum()
                name = f"masked_object/{part}_accuracy"  # of what is hidden
                labels[name] = detected(visual, part)[0][real][hidden]
                right = out.detach()[hidden].argmax(dim=1) == labels[name]
                metrics[name] = right.sum() / max(len(right), 1)
        values = {part: self.config.scale * term / regions for part, term in terms.items()}
        metrics |= {f"masked_object/{part}": value.detach() for part, value in values.items()}
        return Loss(torch.stack(list(values.values())).sum(), metrics, labels)

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 real regions; None with `scope: rank`."""
        return real_regions(self._visual(batch)).sum() if self.config.scope == "global" else None

    def passes(self) -> dict[str, float]:
        """Text, regions and their fusion."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on real regions, its features on hidden ones."""
        visual = self._visual(batch)
        real = real_regions(visual)
        assert visual.picked is not None, "the masked view says which regions are hidden"
        return self.head.flops(int(real.sum()), int((visual.picked & real).sum())), 0

    def _visual(self, batch: Batch) -> Visual:
        return batch.visual[self.config.visual]


class ObjectHead(nn.Module):
    """Dense, GELU and LayerNorm that all parts share, then one linear layer per part."""

    def __init__(self, width: int, outputs: dict[str, int]) -> None:
        super().__init__()
        self.outputs = outputs
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.decoders = nn.ModuleDict({part: nn.Linear(width, size) for part, size in outputs.items()})
        self.apply(init_normal)

    def forward(self, states: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """states [M, D], hidden [M] bool -> {part: [M, classes] fp32; features: [H, F] fp32 of the hidden ones}."""
        told = self.norm(F.gelu(self.dense(states)))
        return {
            part: decoder(told[hidden] if part == "features" else told).float()
            for part, decoder in self.decoders.items()
        }

    def flops(self, regions: int, hidden: int) -> int:
        """FLOPs of one forward pass over so many regions."""
        width = self.dense.in_features
        told = sum((hidden if part == "features" else regions) * size for part, size in self.outputs.items())
        return 2 * width * (regions * width + told)


def label_terms(logits: Tensor, visual: Visual, real: Tensor, part: str) -> Tensor:
    """Cross-entropy times the detector's confidence, [M], of the regions where `real` [B, R]."""
    labels, confidence = detected(visual, part)
    return F.cross_entropy(logits, labels[real], reduction="none") * confidence[real].float()


def detected(visual: Visual, part: str) -> tuple[Tensor, Tensor]:
    """The detector's best `objects` or `attributes` [B, R] int64, and how sure it is of them [B, R]."""
    objects = part == "objects"
    labels = visual.classes if objects else visual.attributes
    confidence = visual.class_confidence if objects else visual.attribute_confidence
    assert labels is not None, f"the view carries the detector's {part}"
    assert confidence is not None, f"the view carries how sure the detector is of its {part}"
    return labels, confidence


def feature_terms(features: Tensor, visual: Visual, real: Tensor) -> Tensor:
    """Smooth L1 (Girshick 2015, equation 3), mean over the feature's numbers, [H], of hidden regions."""
    assert visual.picked is not None, "the masked view says which regions are hidden"
    assert visual.targets is not None, "the masked view carries the features it hid"
    targets = visual.targets[visual.picked & real].float()
    return F.smooth_l1_loss(features, targets, reduction="none").mean(dim=1)


def real_regions(visual: Visual) -> Tensor:
    """[B, R] bool, True = a region, False = padding."""
    if visual.mask is not None:
        return visual.mask
    return torch.ones(visual.feats.shape[:2], dtype=torch.bool, device=visual.feats.device)


build = MaskedObject
