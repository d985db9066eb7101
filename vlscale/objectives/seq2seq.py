"""Masked words from the picture and the words before them (VLP, Zhou et al. 2020, arXiv 1909.11059)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.nn.bert import WordHead
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import IGNORE, Batch, Loss, Stream

READING = 3  # salt of the draw


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    text: str = "masked"  # view
    visual: str = "clean"  # view
    bidirectional: float = 0.0  # share of samples whose words see the whole text; drawn (authors: --bi_prob 0.25)
    drop_worst: float = 0.0  # this share of a micro-batch's samples, those of the largest losses, does not count
    scope: Literal["global", "rank"] = "global"  # one mean over the step's words, or one per rank (authors)


class Seq2Seq(Objective):
    """Restore hidden words when reading from left to right, and some samples' when seeing the whole text.

    Raises:
        ConfigError: a share outside its range, or worst samples dropped from a mean of the whole step.
    """

    needs = frozenset({"text", "visual", "fuse", "causal"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.weight = config.weight
        self.uneven = config.bidirectional in (0, 1) and not config.drop_worst
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.head = WordHead(family.dims.fused, family.dims.vocab, family.dims.norm_eps)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Cross-entropy, mean over the labelled words that count, [] fp32; 0 if there are none."""
        labels = _labels(batch, self.config.text)
        picked = labels != IGNORE  # [B, L]
        words = labels[picked]  # [M]
        hidden = self.states(enc)[picked]
        logits = self.head(hidden, enc.family.word_embedding.weight).float()  # [M, V]
        terms = F.cross_entropy(logits, words, reduction="none")
        right = (logits.detach().argmax(dim=1) == words).sum() / max(len(words), 1)
        value = self._mean(terms, picked) if self.config.drop_worst else terms.sum() / max(len(words), 1)
        return Loss(value, {"seq2seq/accuracy": right}, {"seq2seq/accuracy": words})

    def _mean(self, terms: Tensor, picked: Tensor) -> Tensor:
        """Of terms [M] over the samples with the smallest sums; `picked` [B, L] says whose they are."""
        number, rows = len(picked), picked.nonzero()[:, 0]
        sums = terms.new_zeros(number).index_add(0, rows, terms)
        kept, places = sums.topk(int(number * (1 - self.config.drop_worst)), largest=False)
        return kept.sum() / picked.sum(dim=1)[places].sum().clamp(min=1)

    def states(self, enc: EncodingsLike) -> Tensor:
        """[B, L, D], each sample read in its way."""
        text, visual, share = self.config.text, self.config.visual, self.config.bidirectional
        if share in (0, 1):
            return _words(enc.fused(text, visual, causal=share == 0).text)
        whole, found = self.whole_text(enc), []
        streams, orders = (enc.text(text), enc.visual(visual)), []
        for causal in (True, False):
            rows = (whole != causal).nonzero()[:, 0]
            # All ranks make both passes, so one without such a sample reads its first, and takes nothing from it.
            chosen = rows if len(rows) else rows.new_zeros(1)
            made = enc.family.fuse(_rows(streams[0], chosen), _rows(streams[1], chosen), causal)
            found.append(_words(made.text))
            orders.append(rows if len(rows) else rows.new_full((1,), len(whole)))  # sorts behind the samples
        return torch.cat(found)[torch.cat(orders).argsort()[: len(whole)]]

    def whole_text(self, enc: EncodingsLike) -> Tensor:
        """[B] bool, True = the sample's words see the whole text; the same however the step's batch is cut."""
        return enc.uniforms(READING) < self.config.bidirectional

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 labelled words; None with `scope: rank`."""
        return (_labels(batch, self.config.text) != IGNORE).sum() if self.config.scope == "global" else None

    def passes(self) -> dict[str, float]:
        """Masked text and picture, and a fusion of its own unless all see the whole text."""
        text, visual = self.config.text, self.config.visual
        fuse = f"fuse:{text}:{visual}" if self.config.bidirectional == 1 else "fuse"
        return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", fuse], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on labelled words."""
        width = self.head.dense.in_features
        return int((_labels(batch, self.config.text) != IGNORE).sum()) * 2 * width * (width + len(self.head.bias)), 0


def _check(config: Config) -> None:
    for name, value, end in (("bidirectional", config.bidirectional, "]"), ("drop_worst", config.drop_worst, ")")):
        if not (0 <= value < 1 or (value == 1 and end == "]")):
            raise ConfigError(f"objectives.seq2seq.{name} is {value}; choose a share in [0, 1{end}")
    if config.drop_worst and config.scope == "global":
        raise ConfigError(
            "objectives.seq2seq.drop_worst drops samples of a micro-batch, and how many words then count is not "
            "known before its loss; set objectives.seq2seq.scope=rank"
        )


def _labels(batch: Batch, view: str) -> Tensor:
    labels = batch.text[view].labels
    assert labels is not None, "the masked view carries labels"
    return labels


def _words(hidden: Tensor | None) -> Tensor:
    assert hidden is not None, "a family that offers `fuse` fills Fused.text"
    return hidden


def _rows(stream: Stream, chosen: Tensor) -> Stream:
    return Stream(stream.hidden[chosen], None if stream.mask is None else stream.mask[chosen])


build = Seq2Seq
