"""Image question answering as a pretext: the question is the text, its answer one of a table's (LXMERT, Tan and
Bansal 2019, arXiv 1908.07490, section 3.1.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn.lxmert import WideHead
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import IGNORE, Batch, Fused, Loss


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    text: str = "masked"  # view
    visual: str = "masked"  # view
    answers: int = 9500  # data/lxmert/all_ans.json
    scope: Literal["global", "rank"] = "global"  # one mean over the step's answers, or one per rank (authors)


class Answer(Objective):
    """The answer of those pairs whose text is a question about this picture, from the pair as one vector."""

    needs = frozenset({"text", "visual", "fuse"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}", "pairs.answers"})
        self.head = WideHead(family.dims.pooled or family.dims.fused, config.answers)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Cross-entropy, mean over pairs with an answer, [] fp32; 0 if there is none."""
        labels = _labels(batch)
        asked = labels != IGNORE
        answers = labels[asked]
        logits = self.logits(enc.fused(self.config.text, self.config.visual), asked)
        pairs = max(len(answers), 1)
        right = (logits.detach().argmax(dim=1) == answers).sum() / pairs
        loss = F.cross_entropy(logits, answers, reduction="sum") / pairs
        return Loss(loss, {"answer/accuracy": right}, {"answer/accuracy": answers})

    def logits(self, fused: Fused, asked: Tensor) -> Tensor:
        """[N, answers] fp32 of the pairs where `asked` [B]."""
        assert fused.pooled is not None, "a family that offers `fuse` fills Fused.pooled"
        out: Tensor = self.head(fused.pooled[asked]).float()
        return out

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 pairs with an answer; None with `scope: rank`."""
        return (_labels(batch) != IGNORE).sum() if self.config.scope == "global" else None

    def passes(self) -> dict[str, float]:
        """Text, regions and their fusion."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on pairs with an answer."""
        return self.head.flops(int((_labels(batch) != IGNORE).sum())), 0


def _labels(batch: Batch) -> Tensor:
    return batch.answers if batch.answers is not None else torch.full_like(batch.pair_id, IGNORE)


build = Answer
