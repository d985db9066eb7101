"""Language reconstruction: a decoder writes the text anew from what the other modules made of text and frames (UniVL,
Luo et al. 2020, arXiv 2002.06353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from vlscale.nn.bert import PAD, WordHead
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import IGNORE, Batch, Loss


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    target: str = "target"  # view that is written: what the decoder reads, and as labels the word after each place
    text: str = "masked"  # view beside which it is written
    visual: str = "masked"  # view
    # counted: behind its end a text goes on with [PAD] to the family's `text_length`, and that is learned too, as the
    # authors' code does it (their padding is 0 and what they leave out is -1)
    padding: Literal["ignored", "counted"] = "ignored"
    scope: Literal["global", "rank"] = "global"  # one mean over the step's words, or one per rank (authors)


class Caption(Objective):
    """Tell every next word from the words before it, some of them hidden, and from what was fused."""

    needs = frozenset({"text", "visual", "fuse", "decode"})
    uneven = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"text.{config.target}", f"text.{config.text}", f"visual.{config.visual}"})
        self.length = family.inputs.text_length if config.padding == "counted" else 0
        self.head = WordHead(family.dims.fused, family.dims.vocab, family.dims.norm_eps)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Cross-entropy, mean over the words and [SEP] of the target, and with `padding: counted` over all places
        behind them too, [] fp32; 0 if there is no word."""
        labels = self._labels(batch)
        states = enc.decoded(self.config.target, self.config.text, self.config.visual, self.length)  # [B, L, D]
        counted = labels != IGNORE
        words = counted
        if self.length:
            labels = F.pad(labels, (0, states.shape[1] - labels.shape[1]), value=IGNORE)
            words = labels != IGNORE
            counted, labels = words | True, labels.masked_fill(~words, PAD)
        logits = self.head(states[counted], enc.family.word_embedding.weight).float()  # [M, V]
        wanted, told = labels[counted], words[counted]
        right = (logits.detach().argmax(dim=1) == wanted)[told].sum() / max(int(told.sum()), 1)
        value = F.cross_entropy(logits, wanted, reduction="sum") / max(len(wanted), 1)
        return Loss(value, {"caption/accuracy": right}, {"caption/accuracy": wanted[told]})

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 places that count; None with `scope: rank`."""
        if self.config.scope == "rank":
            return None
        labels = self._labels(batch)
        return labels.new_tensor(len(labels) * self._places(labels)) if self.length else (labels != IGNORE).sum()

    def passes(self) -> dict[str, float]:
        """Text, frames and their fusion, then the decoder."""
        target, text, visual = self.config.target, self.config.text, self.config.visual
        fused = [f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"]
        return dict.fromkeys([*fused, f"decode:{target}:{text}:{visual}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head in the places that count."""
        labels, width = self._labels(batch), self.head.dense.in_features
        places = len(labels) * self._places(labels) if self.length else int((labels != IGNORE).sum())
        return places * 2 * width * (width + len(self.head.bias)), 0

    def _places(self, labels: Tensor) -> int:
        """Of one text, with `padding: counted`."""
        return max(self.length, labels.shape[1])

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.text[self.config.target].labels
        assert labels is not None, "what a decoder writes carries labels: give the view `write`"
        return labels


build = Caption
