"""Masked words: what is hidden of a text and what the labels then hold. Texts are int64 [L]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.augment import require
from vlscale.types import IGNORE

Ids = NDArray[np.int64]


class Vocabulary(Protocol):
    """What masking needs to know of a tokenizer."""

    pad: int
    cls: int
    sep: int
    mask: int
    vocab_size: int


@dataclass(frozen=True)
class MaskTokens:
    """BERT's masking: each token is picked with probability `prob`; the labels hold what was there.

    A picked token becomes [MASK] with probability `mask_share`, a uniform id in [0, vocabulary) with
    `random_share` (special ids included, as in ALBEF), else stays. [PAD], [CLS] and [SEP] are never picked.
    If no token was picked and `at_least_one` holds, one is, uniformly; in ALBEF such a text adds no term.
    """

    prob: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    at_least_one: bool = True

    def __post_init__(self) -> None:
        require(0 < self.prob <= 1, "prob", "a number above 0 and at most 1")
        require(0 <= self.mask_share <= 1, "mask_share", "a number in [0, 1]")
        rest = round(1 - self.mask_share, 9)
        require(0 <= self.random_share <= rest, "random_share", f"a number in [0, {rest:g}]")

    def __call__(self, ids: Ids, vocabulary: Vocabulary, rng: Generator) -> tuple[Ids, Ids]:
        """(ids [L] with masks, labels [L] with IGNORE wherever nothing is predicted)."""
        open_ = (ids != vocabulary.pad) & (ids != vocabulary.cls) & (ids != vocabulary.sep)
        draws = rng.random((2, len(ids)))
        picked = open_ & (draws[0] < self.prob)
        if self.at_least_one and not picked.any() and open_.any():
            picked[rng.choice(np.flatnonzero(open_))] = True
        labels = np.where(picked, ids, IGNORE)
        masked = np.where(picked & (draws[1] < self.mask_share), vocabulary.mask, ids)
        swapped = picked & (draws[1] >= self.mask_share) & (draws[1] < self.mask_share + self.random_share)
        if swapped.any():
            masked[swapped] = rng.integers(vocabulary.vocab_size, size=int(swapped.sum()))
        return masked, labels
