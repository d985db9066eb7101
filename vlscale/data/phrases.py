"""The texts of samples, cleaned, tokenised and counted: who reads texts reads them here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vlscale.data.answers import normal_answer
from vlscale.data.clip_windows import Timed
from vlscale.data.samples import BrokenSampleError, sentences, tags, timed_sentences
from vlscale.data.shards import Shards
from vlscale.data.text import Fitted, Ids, Tokenizer, clean_text, first_words
from vlscale.types import IGNORE

MAX_KEPT = 16 << 20  # bytes of token ids that a process keeps: some 30,000 captions
SHARDS = 32  # at least so many are looked into
FEW = 0.05  # share of the texts that may be cut without a word about it
BESIDE_IDS = 350  # bytes that a text takes beside its ids: array, tuple, list and dictionary entry


class Words(NamedTuple):
    """A caption, or a question with its answer, as it goes to the tokenizer."""

    text: str
    lost: int  # words that `max_words` took away
    answer: str | None = None


def read_sentences(shards: Shards, i: int, max_words: int, questions: bool = False) -> list[Words]:
    """The captions of sample `i`, then its questions if they are asked for; `max_words` as in `clean_text`.

    BrokenSampleError if the sample has no text, or one of which the clean-up leaves nothing.
    """
    found = []
    for text, answer in sentences(shards, i, questions):
        whole = clean_text(text, max_words)
        if not whole:
            reason = f"the caption {text!r} is nothing but punctuation; write a text or leave it out"
            raise BrokenSampleError(shards.shard(i), shards.key(i), reason)
        kept = first_words(whole, max_words)
        found.append(Words(kept, 0 if kept == whole else len(whole.split()) - max_words, answer))
    return found


def read_timed(shards: Shards, i: int, max_words: int, needed: bool = True) -> list[Timed]:
    """The sentences of the clip of sample `i`, cleaned; those of which nothing is left are left out.

    BrokenSampleError as of `timed_sentences`, or if that leaves none where a text is `needed`.
    """
    found = timed_sentences(shards, i, needed)
    cleaned = [each._replace(text=clean_text(each.text, max_words)) for each in found]
    kept = [each for each in cleaned if each.text]
    if needed and not kept:
        reason = f"its sentence {found[0].text!r} is nothing but punctuation, as all of them are; leave it out"
        raise BrokenSampleError(shards.shard(i), shards.key(i), reason)
    return kept or cleaned


def read_tags(shards: Shards, i: int, max_words: int) -> str:
    """The names of the objects of sample `i`, cleaned as captions are; however many they are, all of them."""
    return clean_text(tags(shards, i), max_words)


def spread(shards: Shards, most: int) -> Iterator[int]:
    """All samples, or at most `most` of them: runs of as many from each of some shards, which are spread over all.

    A source that comes last is seen as one that comes first, and of shards in a store few are asked for.
    """
    if len(shards) <= most:
        yield from range(len(shards))
        return
    count = len(shards.paths)
    asked = min(most, max(SHARDS, -(-count * most // len(shards))))
    chosen = np.unique(np.linspace(0, count - 1, asked).astype(int)).tolist()
    for shard in chosen:
        start = shards.start(shard)
        yield from range(start, min(start + most // len(chosen), shards.start(shard + 1)))


def every_text(
    shards: Shards, numbers: Iterable[int], max_words: int, *, questions: bool = False, named: bool = False
) -> Iterator[str]:
    """The texts of these samples as the tokenizer gets them, such as a vocabulary is built from: captions, and
    questions and tags (`named`) if they are asked for. Samples that cannot be used are passed over.
    """
    for i in numbers:
        try:
            yield from [words.text for words in read_sentences(shards, i, max_words, questions)]
            if named:
                yield read_tags(shards, i, max_words)
        except BrokenSampleError:
            continue


class Cut(NamedTuple):
    """How far some texts are too long; `FEW` of them are longer than `words` and `length`."""

    fraction: float  # of the texts that lose words
    lost: float  # share of all words that are lost
    words: int  # of a text, before anything is cut
    length: int  # in tokens, special ones counted


def measure_cut(
    shards: Shards, looked_at: Iterable[int], tokenizer: Tokenizer, max_words: int, questions: bool = False
) -> Cut:
    """What of the texts of these samples `max_words` and the tokenizer's length cut off; unusable ones are left out."""
    counts, lengths, lost = [], [], []
    for i in looked_at:
        try:
            found = read_sentences(shards, i, min(max_words, 0), questions)
        except BrokenSampleError:
            continue
        for whole in found:
            kept = first_words(whole.text, max_words)
            counts.append(len(whole.text.split()))
            lengths.append(tokenizer.needed(whole.text))
            lost.append(counts[-1] - len(kept.split()) + tokenizer.fit(kept).lost)
    if not counts:
        return Cut(0.0, 0.0, 0, 0)
    words, length = (int(np.quantile(each, 1 - FEW, method="higher")) for each in (counts, lengths))
    return Cut(float(np.mean(np.array(lost) > 0)), sum(lost) / sum(counts), words, length)


class Phrase(NamedTuple):
    """A caption, or a question."""

    ids: Ids  # [L]
    lost: int  # words that did not fit
    answer: int = IGNORE  # its number; IGNORE of a caption, and of an answer that is in no list
    asked: bool = False  # whether it is a question


class Texts:
    """The token ids of every text of a sample.

    The first of them are kept, up to `MAX_KEPT` bytes: an epoch comes back to a sample only after all others, so that
    a cache that forgets would never have the one it is asked for. Memory stays flat after that.
    """

    def __init__(self, shards: Shards, tokenizer: Tokenizer, max_words: int, answers: Mapping[str, int] | None) -> None:
        """`answers` numbers the answers that count; None = questions are left out."""
        self._shards = shards
        self._tokenizer = tokenizer
        self._max_words = max_words
        self._answers = answers
        self._kept: dict[int, list[Phrase]] = {}
        self._tags: dict[int, Phrase] = {}
        self._room = MAX_KEPT

    def __call__(self, i: int) -> list[Phrase]:
        """Captions, then questions. BrokenSampleError if the sample has no text that is left after clean-up."""
        found = self._kept.get(i)
        if found is None:
            found = self._encode(i)
            if self._fits(found):
                self._kept[i] = found
        return found

    def timed(self, i: int, needed: bool = True) -> list[Timed]:
        """The sentences of a clip: see `read_timed`."""
        return read_timed(self._shards, i, self._max_words, needed)

    def fit(self, text: str) -> Fitted:
        """The token ids of a clean text that was put together, and how many words did not fit."""
        kept = first_words(text, self._max_words)
        ids, lost = self._tokenizer.fit(kept)
        return Fitted(ids, lost + (0 if kept == text else len(text.split()) - self._max_words))

    def tags(self, i: int) -> Phrase:
        """[CLS] names of the objects [SEP]; nothing between where none is named."""
        found = self._tags.get(i)
        if found is None:
            found = Phrase(*self._tokenizer.fit(read_tags(self._shards, i, self._max_words)))
            if self._fits([found]):
                self._tags[i] = found
        return found

    def _fits(self, phrases: list[Phrase]) -> bool:
        """Whether there is room for them, which is then taken."""
        size = sum(phrase.ids.nbytes + BESIDE_IDS for phrase in phrases)
        fits = size <= self._room
        self._room -= size if fits else 0
        return fits

    def _encode(self, i: int) -> list[Phrase]:
        phrases = []
        for text, lost, answer in read_sentences(self._shards, i, self._max_words, self._answers is not None):
            fitted = self._tokenizer.fit(text)
            phrases.append(Phrase(fitted.ids, lost + fitted.lost, self._number(answer), answer is not None))
        return phrases

    def _number(self, answer: str | None) -> int:
        if answer is None or self._answers is None:
            return IGNORE
        return self._answers.get(normal_answer(answer), IGNORE)
