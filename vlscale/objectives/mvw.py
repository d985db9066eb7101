"""Masked visual words: which of the codebook's words a hidden frame had (VideoBERT, Sun et al. 2019, arXiv 1904.01766;
elsewhere called masked frame modelling)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import IGNORE, Batch, Loss


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "masked"  # view
    vocabulary: Literal["joint", "own"] = "joint"  # the softmax: over words and visual words, or these alone
    scope: Literal["global", "rank"] = "global"  # one mean over the step's hidden visual words, or one per rank


class Mvw(Objective):
    """Restore hidden visual words from the others and the text, by the head that the family has for both."""

    needs = frozenset({"text", "visual", "fuse", "visual_words"})
    uneven = True
    alone = "visual"
    fields = frozenset({"code_labels"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.width, self.vocab = family.dims.fused, family.dims.vocab
        self.words = family.dims.vocab - family.inputs.codes  # rows of words, which stand before the visual ones

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Cross-entropy, mean over hidden visual words, [] fp32; 0 if none is hidden."""
        labels = self._labels(batch)
        picked = labels != IGNORE
        codes = labels[picked]  # [M]
        hidden = enc.fused(self.config.text, self.config.visual).visual
        assert hidden is not None, "a family that offers `visual_words` fills Fused.visual"
        logits = enc.family.token_logits(hidden[picked]).float()  # [M, V]
        first = self.words
        if self.config.vocabulary == "own":
            logits, first = logits[:, self.words :], 0
        terms = max(len(codes), 1)
        right = (logits.detach().argmax(dim=1) == codes + first).sum() / terms
        loss = F.cross_entropy(logits, codes + first, reduction="sum") / terms
        return Loss(loss, {"mvw/accuracy": right}, {"mvw/accuracy": codes})

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 hidden visual words; None with `scope: rank`."""
        return (self._labels(batch) != IGNORE).sum() if self.config.scope == "global" else None

    def passes(self) -> dict[str, float]:
        """The shared ones."""
        text, visual = self.config.text, self.config.visual
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on hidden visual words."""
        return 2 * int((self._labels(batch) != IGNORE).sum()) * self.width * (self.width + self.vocab), 0

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.visual[self.config.visual].code_labels
        assert labels is not None, "the masked view of visual words carries labels"
        return labels


build = Mvw
