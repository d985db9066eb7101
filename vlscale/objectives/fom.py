"""Frame order modelling (HERO, Li et al. 2020, arXiv 2005.00200, section 3.3): of frames that changed places among
themselves, where each belongs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.nn.region_head import RegionHead, hidden_regions
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss, Visual


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "shuffled"  # view
    places: int = 100  # classes of the head: the most frames of a clip (config/pretrain-tv-16gpu.json: max_clip_len)
    scope: Literal["global", "rank"] = "global"  # one mean over the step's shuffled frames, or one per rank (authors)


class Fom(Objective):
    """A class for every place in time; asked wherever a frame was chosen, also where it has stayed."""

    needs = frozenset({"text", "visual", "fuse", "regions", "frame_order"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        if config.places < family.inputs.frames:
            raise ConfigError(
                f"objectives.fom.places is {config.places}, but a clip may have family.frames {family.inputs.frames}; "
                f"give at least as many places"
            )
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        width = family.dims.visual
        self.head = RegionHead(width, config.places, eps=family.dims.norm_eps, inner=2 * width)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Cross-entropy of the right place, mean over chosen frames, [] fp32; 0 if none was chosen."""
        labels = self.labels(batch)
        logits = self.logits(enc, hidden_regions(self._visual(batch)))
        terms = max(len(labels), 1)
        loss = F.cross_entropy(logits, labels, reduction="sum") / terms
        right = (logits.detach().argmax(dim=1) == labels).sum() / terms
        return Loss(loss, {"fom/accuracy": right}, {"fom/accuracy": labels})

    def logits(self, enc: EncodingsLike, picked: Tensor) -> Tensor:
        """[M, places] fp32 of the places where `picked` [B, T]."""
        states = enc.fused(self.config.text, self.config.visual).visual
        assert states is not None, "a family that offers `regions` fills Fused.visual"
        out: Tensor = self.head(states[picked])
        return out.float()

    def labels(self, batch: Batch) -> Tensor:
        """[M] int64, where the frame belongs that now stands at each chosen place."""
        visual = self._visual(batch)
        assert visual.order is not None, "the shuffled view says where each frame has gone"
        return visual.order.argsort(dim=1)[hidden_regions(visual)]

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 chosen frames; None with `scope: rank`."""
        return hidden_regions(self._visual(batch)).sum() if self.config.scope == "global" else None

    def passes(self) -> dict[str, float]:
        """Text, frames and their fusion."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on chosen frames."""
        return self.head.flops(int(hidden_regions(self._visual(batch)).sum())), 0

    def _visual(self, batch: Batch) -> Visual:
        return batch.visual[self.config.visual]


build = Fom
