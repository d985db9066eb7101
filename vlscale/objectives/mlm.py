"""Masked language modelling over fused states, soft labels by the momentum twin (ALBEF, equations 3, 7)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.nn.bert import TiedHead, WordHead
from vlscale.nn.momentum import softening
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import IGNORE, Batch, Loss


@dataclass(frozen=True)
class Config:
    """Options."""

    weight: float = 1.0
    text: str = "masked"  # view
    visual: str = "clean"  # view
    momentum_visual: str | None = None  # view that the twin sees; None = the same (TCL: a second augmentation)
    soften: float = 0.4  # share of the twin's distribution in the targets (configs/Pretrain.yaml: alpha)
    soften_warmup: int = 0  # steps from 0 to that share; the authors take one epoch
    scope: Literal["global", "rank"] = "global"  # one mean over the step's tokens, or one per rank (authors)
    # tied: the word embedding alone, without a parameter (SOHO). A family of visual words has a head for both
    head: Literal["bert", "tied"] = "bert"
    vocabulary: Literal["joint", "own"] = "joint"  # where there are visual words: whether a word might be one of them
    legacy_token_axis: bool = False  # distil over tokens, not words: the authors' code before March 2022


class Mlm(Objective):
    """Restore hidden words from the other words and the picture."""

    needs = frozenset({"text", "visual", "fuse"})
    uneven = True
    alone = "text"
    head: WordHead | TiedHead | None  # None = the family's
    head_twin: WordHead | TiedHead | None

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.momentum = config.soften > 0
        self.twin_view = config.momentum_visual or config.visual
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        if self.momentum:
            self.views |= {f"visual.{self.twin_view}"}
        self.width, self.vocab = family.dims.fused, family.dims.vocab
        self.own = self.vocab - family.inputs.codes if config.vocabulary == "own" else self.vocab
        if "visual_words" in family.offers:
            self.head = None
        elif config.head == "bert":
            self.head = WordHead(self.width, self.vocab, family.dims.norm_eps)
        else:
            self.head = TiedHead()
        twin = self.momentum and self.head is not None
        self.head_twin = copy.deepcopy(self.head).requires_grad_(False) if twin else None  # type: ignore[union-attr]

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """(1 - share) * hard + share * soft cross-entropy, mean over labelled tokens, [] fp32; 0 if none."""
        labels = batch.text[self.config.text].labels
        assert labels is not None, "the masked view carries labels"
        picked = labels != IGNORE
        words, hidden = labels[picked], self._hidden(enc, self.config.visual)  # [M], [B, L, D]
        logits = self._logits(self.head, enc.family, hidden[picked])  # [M, V]
        terms = max(len(words), 1)
        hard = F.cross_entropy(logits, words, reduction="sum") / terms
        metrics = {
            "mlm/hard": hard.detach(),
            "mlm/accuracy": (logits.detach().argmax(dim=1) == words).sum() / terms,
        }
        told = {"mlm/accuracy": words}
        if not self.momentum:
            return Loss(hard, metrics, told)
        log_words = F.log_softmax(logits, dim=1)
        if self.config.legacy_token_axis:
            every = self._logits(self.head, enc.family, hidden)  # [B, L, V]
            log_words = F.log_softmax(every, dim=1)[picked]
        soft = -(log_words * self._soft_labels(enc, picked)).sum() / terms
        metrics["mlm/soft"] = soft.detach()
        share = softening(enc.step, self.config.soften, self.config.soften_warmup)
        return Loss((1 - share) * hard + share * soft, metrics, told)

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 labelled tokens; None with `scope: rank`."""
        labels = batch.text[self.config.text].labels
        assert labels is not None, "the masked view carries labels"
        return (labels != IGNORE).sum() if self.config.scope == "global" else None

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """The head and its momentum copy; the family's moves with the family."""
        return [(self.head, self.head_twin)] if self.head is not None and self.head_twin is not None else []

    def passes(self) -> dict[str, float]:
        """Masked text, picture and their fusion, also by the twin if it gives soft labels."""
        own, twin = self._passes(self.config.visual), self._passes(self.twin_view)
        return dict.fromkeys(own + [f"momentum.{name}" for name in twin if self.momentum], 1.0)

    def _passes(self, visual: str) -> list[str]:
        text = self.config.text
        return [f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"]

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on labelled tokens, and the twin's."""
        labels = batch.text[self.config.text].labels
        assert labels is not None, "the masked view carries labels"
        dense = self.width if self.config.head == "bert" else 0
        each = 2 * self.width * (dense + self.vocab)
        picked = int((labels != IGNORE).sum()) * each
        return picked + (labels.numel() * each if self.config.legacy_token_axis else 0), (
            picked if self.momentum else 0
        )

    def _logits(self, head: nn.Module | None, family: FamilyLike, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] fp32."""
        if head is None:
            logits = family.token_logits(hidden)[..., : self.own]
        else:
            logits = head(hidden, family.word_embedding.weight)
        return logits.float()

    def _hidden(self, enc: EncodingsLike, visual: str) -> Tensor:
        hidden = enc.fused(self.config.text, visual).text
        assert hidden is not None, "a family that offers `fuse` fills Fused.text"
        return hidden

    @torch.no_grad()
    def _soft_labels(self, enc: EncodingsLike, picked: Tensor) -> Tensor:
        hidden = self._hidden(enc.momentum, self.twin_view)[picked]  # first: its passes release the table under ZeRO-3
        return self._logits(self.head_twin, enc.momentum.family, hidden).softmax(dim=1)


build = Mlm
