"""Masked words: what is hidden of a text and what the labels then hold. Texts are int64 [L]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.augment import require
from vlscale.errors import ConfigError
from vlscale.types import IGNORE

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Vocabulary(Protocol):
    """What masking needs to know of a tokenizer; None is a token that it does not have."""

    pad: int
    cls: int | None
    sep: int | None
    mask: int | None
    vocab_size: int

    @property
    def continues(self) -> Flags:
        """[V] pieces that go on with the word before them."""
        ...

    @property
    def function_words(self) -> Flags:
        """[V] words with little meaning of their own (`the`, `of`), punctuation and special tokens."""
        ...

    @property
    def ordinary(self) -> Ids:
        """[W] the ids that stand for text: neither special nor unused."""
        ...


@dataclass(frozen=True)
class Count:
    """An exact number to hide of n: n * `share`, rounded half to even, within `least` and `most` (VLP: 0.15, 1, 3)."""

    share: float = 0.15
    least: int = 1
    most: int = 3

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", "a number above 0 and at most 1")
        require(self.least >= 0, "least", "a whole number from 0 on")
        require(self.most >= max(self.least, 1), "most", f"a whole number from {max(self.least, 1)} on")

    def __call__(self, n: int) -> int:
        """How many of n."""
        return min(self.most, max(self.least, round(self.share * n)))


@dataclass(frozen=True)
class MaskTokens:
    """BERT's masking: each token is picked with probability `prob`; the labels hold what was there.

    A picked token becomes [MASK] with probability `mask_share`, a uniform id of `random_from` with `random_share`
    (`all` of [0, vocabulary), special ids included, as in ALBEF; only those of `words` in UNITER), else stays.
    [PAD], [CLS] and [SEP] are never picked, but for the last [SEP] where `separator` says so (VLP).

    - `words`: `whole` picks all pieces of a word together, and every "token" here is then a word.
    - `content_only`: function words and punctuation are not picked (English; after ERNIE-ViL's idea that words with
      meaning teach more). Of a text of nothing else nothing is picked.
    - `count`: that many are picked, uniformly, in place of `prob`; n counts the text's tokens.
    - `at_least_one`: if no token was picked one is, uniformly; in ALBEF such a text adds no term. `fallback: first`
      takes the first one instead, and makes it [MASK] (UNITER, data/mlm.py).
    """

    prob: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    at_least_one: bool = True
    fallback: Literal["random", "first"] = "random"
    words: Literal["pieces", "whole"] = "pieces"
    content_only: bool = False
    random_from: Literal["all", "words"] = "all"
    separator: bool = False
    count: Count | None = None

    def __post_init__(self) -> None:
        require(0 < self.prob <= 1, "prob", "a number above 0 and at most 1")
        require(0 <= self.mask_share <= 1, "mask_share", "a number in [0, 1]")
        rest = round(1 - self.mask_share, 9)
        require(0 <= self.random_share <= rest, "random_share", f"a number in [0, {rest:g}]")

    def __call__(self, ids: Ids, vocabulary: Vocabulary, rng: Generator) -> tuple[Ids, Ids]:
        """(ids [L] with masks, labels [L] with IGNORE wherever nothing is predicted).

        Raises:
            ConfigError: the vocabulary has no mask token, or does not tell whole words.
        """
        text = (ids != vocabulary.pad) & (ids != vocabulary.cls) & (ids != vocabulary.sep)
        word = self._words(ids, text, vocabulary)
        open_ = self._open(ids, text, vocabulary)
        draws = rng.random((2, len(ids)))
        if self.count is None:
            picked = open_ & (draws[0, word] < self.prob)
        else:
            words = np.unique(word[open_])
            number = self.count(len(np.unique(word[text])))
            picked = open_ & np.isin(word, words[np.argsort(draws[0, words])[:number]])
        if self.at_least_one and not picked.any() and open_.any():
            words = np.unique(word[open_])
            picked = open_ & (word == (words[0] if self.fallback == "first" else rng.choice(words)))
            if self.fallback == "first":
                draws[1, picked] = -1.0  # below every share: [MASK]
        labels = np.where(picked, ids, IGNORE)
        masked = np.where(picked & (draws[1] < self.mask_share), mask_token(vocabulary), ids)
        swapped = picked & (draws[1] >= self.mask_share) & (draws[1] < self.mask_share + self.random_share)
        if swapped.any():
            pool = vocabulary.ordinary if self.random_from == "words" else None
            drawn = rng.integers(vocabulary.vocab_size if pool is None else len(pool), size=int(swapped.sum()))
            masked[swapped] = drawn if pool is None else pool[drawn]
        return masked, labels

    def check(self, vocabulary: Vocabulary) -> None:
        """ConfigError if the vocabulary has no mask token, or does not tell whole words where they are asked for."""
        mask_token(vocabulary)
        if self.words == "whole" or self.content_only:
            _ = vocabulary.continues

    def _words(self, ids: Ids, text: Flags, vocabulary: Vocabulary) -> NDArray[np.intp]:
        """[L] the place of the first token of each token's word, which stands for the word."""
        places = np.arange(len(ids))
        if self.words == "pieces":
            return places
        return np.maximum.accumulate(np.where(_inside(ids, text, vocabulary), 0, places))

    def _open(self, ids: Ids, text: Flags, vocabulary: Vocabulary) -> Flags:
        """[L] what may be picked."""
        open_ = text.copy()
        if self.content_only:
            inside = _inside(ids, text, vocabulary)
            alone = ~inside & ~np.append(inside[1:], False)  # `the` as a piece of a longer word is another word
            open_ &= ~(vocabulary.function_words[ids] & alone)
        if self.separator:
            open_[np.flatnonzero(ids == vocabulary.sep)[-1:]] = True
        return open_


@dataclass(frozen=True)
class Write:
    """What a decoder writes from left to right: it reads [CLS] and the words, and the labels hold the word that comes
    next in each place, at last [SEP].

    Of what it reads each word but the last is hidden with probability `prob`, as `MaskTokens` does it (UniVL: 0.15,
    dataloader_howto100m.py); 0 = none.
    """

    prob: float = 0.15

    def __post_init__(self) -> None:
        require(0 <= self.prob <= 1, "prob", "a number in [0, 1]")

    def __call__(self, ids: Ids, vocabulary: Vocabulary, rng: Generator) -> tuple[Ids, Ids]:
        """(ids [L - 1] without the last, labels [L - 1]) of a text [L] that ends in [SEP]."""
        read = ids[:-1].copy()
        if self.prob:
            read[:-1], _ = MaskTokens(prob=self.prob, at_least_one=False)(read[:-1], vocabulary, rng)
        return read, ids[1:].copy()

    def check(self, vocabulary: Vocabulary) -> None:
        """ConfigError if words are to be hidden and the vocabulary has no mask token."""
        if self.prob:
            mask_token(vocabulary)


def _inside(ids: Ids, text: Flags, vocabulary: Vocabulary) -> Flags:
    """[L] tokens that go on with the word before them; behind a special token a word begins."""
    inside: Flags = vocabulary.continues[ids] & text
    inside[1:] &= text[:-1]
    return inside


def mask_token(vocabulary: Vocabulary) -> int:
    """The id that hides a token; ConfigError if the vocabulary has none."""
    if vocabulary.mask is None:
        raise ConfigError(
            "the vocabulary has no mask token, so no word of a text can be hidden; take mask_tokens and the "
            "objectives that read masked texts out, or give a text.vocab with [MASK]"
        )
    return vocabulary.mask
