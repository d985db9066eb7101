"""Masked visual modelling: the dictionary codes of hidden cells (SOHO, Huang et al. 2021, arXiv 2104.03135, 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss


@dataclass(frozen=True)
class Config:
    """Options. What is hidden is the family's to draw (`family.mask_prob`), or the data's (`Visual.picked`)."""

    weight: float = 1.0
    text: str = "masked"  # view
    visual: str = "masked"  # view
    # rank: the mean over a micro-batch's hidden cells (authors); global: over all of the step's, which are known only
    # after every picture has been encoded, so that a step of several micro-batches encodes twice
    scope: Literal["rank", "global"] = "rank"


class Mvm(Objective):
    """Which dictionary entry a hidden cell had, by the cosine of its state with every entry.

    It has no parameter and no temperature: with K entries the loss stays above ln(1 + (K - 1) / e^2).
    """

    needs = frozenset({"text", "visual", "fuse", "codes"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.whole = config.scope == "global"
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.width, self.codes = family.code_table.shape[1], family.code_table.shape[0]

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """How many cells each picture hides, [b] int64."""
        enc.text(self.config.text)
        return (self._hidden(enc)[0].sum(dim=1),)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Cross-entropy, mean over hidden cells, [] fp32; 0 if none is hidden."""
        hidden, codes = self._hidden(enc)
        labels = codes[hidden]  # [M]
        logits = self.logits(enc, hidden)
        terms = hidden.sum().clamp(min=1).float()
        right = (logits.detach().argmax(dim=1) == labels).sum() / terms
        if shared:  # the mean of this over micro-batches and ranks is the mean over the step's cells
            terms = shared[0].sum().clamp(min=1) * (len(codes) / len(shared[0]))
        loss = F.cross_entropy(logits, labels, reduction="sum") / terms
        return Loss(loss, {"mvm/accuracy": right}, {"mvm/accuracy": labels})

    def logits(self, enc: EncodingsLike, hidden: Tensor) -> Tensor:
        """[M, K] fp32 cosines of the states where `hidden` [B, R] with the dictionary's entries."""
        states = enc.fused(self.config.text, self.config.visual).visual
        assert states is not None, "a family that offers `codes` fills Fused.visual"
        rows = F.normalize(states[hidden].float(), dim=1)
        return rows @ F.normalize(enc.family.code_table.float(), dim=1).T

    def passes(self) -> dict[str, float]:
        """The shared ones."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The cosines of one cell per picture: how many share its code is known after the lookup alone."""
        return 2 * len(batch) * self.width * self.codes, 0

    def _hidden(self, enc: EncodingsLike) -> tuple[Tensor, Tensor]:
        """Where cells are hidden [B, R] bool, and all codes [B, R]."""
        stream = enc.visual(self.config.visual)
        assert stream.codes is not None, "a family that offers `codes` fills Stream.codes"
        assert stream.picked is not None, "the masked view is drawn by `Family.pick`, or picked by the data"
        return stream.picked, stream.codes


build = Mvm
