"""Which stretch of a video and which of its sentences make a clip: pure, of sentences, options and a generator.

A sentence is said from `start` to `end`, in seconds; one without a time goes with the whole video: [0, inf).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.augment import require

CLOSE = 1e-6  # relative: times of float32 and of float64 that mean the same


class Timed(NamedTuple):
    """A sentence of a video, or its caption."""

    text: str
    start: float = 0.0
    end: float = math.inf


class Window(NamedTuple):
    """A stretch of a video and the texts that go with it."""

    start: float  # seconds
    end: float
    texts: tuple[tuple[int, ...], ...]  # of each candidate caption the sentences whose words it has, in this order


@dataclass(frozen=True)
class Clips:
    """How clips are cut from a sample; the same for all of its views.

    - `number` of a sample (`n_pair`), by `choice`: each about a sentence drawn by itself, so that two may be the same
      (HowTo100M), or about `consecutive` sentences, one drawn group of `number` of them (UniVL).
    - `candidates`: captions of a clip, the sentences nearest in time (MIL-NCE: K).
    - A clip shorter than `least_seconds`, or of fewer words than `least_words`, grows by neighbouring sentences whose
      words are `appended` (HowTo100M: those said before too) or stand in their order (`prepended`, UniVL); with
      `longer_by: time` it is only widened (MIL-NCE).
    - `join`: the probability that the next sentence joins, and the next (VideoBERT).
    - `start`: of a stretch with more frames than the family reads, the `first` ones or a `random` run of them.
    - `fps`: frames taken of a second of pixels.
    - `untimed_frames`: most frames of a video whose text has no time; 0 = as many as the family reads (VideoBERT: 16).
    - `no_text`: the probability that all texts of a sample are empty, but for the view `target` (UniVL's EnhancedV).

    Families that read all sentences of a video (`Inputs.sentences`) take the whole of it as one clip.
    """

    number: int = 1
    choice: Literal["drawn", "consecutive"] = "drawn"
    candidates: int = 1
    least_seconds: float = 0.0
    least_words: int = 0
    longer_by: Literal["appended", "prepended", "time"] = "time"
    join: float = 0.0
    start: Literal["first", "random"] = "first"
    fps: float = 1.0
    untimed_frames: int = 0
    no_text: float = 0.0

    def __post_init__(self) -> None:
        for name in ("number", "candidates"):
            require(getattr(self, name) >= 1, name, "a whole number from 1")
        for name in ("least_seconds", "least_words", "untimed_frames"):
            require(getattr(self, name) >= 0, name, "a number from 0 on")
        require(self.fps > 0, "fps", "a number above 0")
        require(0 <= self.join < 1, "join", "a number from 0 on and below 1")
        require(0 <= self.no_text <= 1, "no_text", "a number in [0, 1]")
        words = self.least_words == 0 or self.longer_by != "time"
        require(words, "least_words", "left out with longer_by: time, which adds no words")
        one = self.candidates == 1 or (self.longer_by == "time" and not self.join)
        require(one, "candidates", "1 beside join, or longer_by of words: candidates are single sentences")


def windows(sentences: Sequence[Timed], options: Clips, rng: Generator) -> list[Window]:
    """The clips of a sample, `options.number` of them; `sentences` at least one, in the order of their starts."""
    return [window(sentences, i, options, rng) for i in centres(len(sentences), options, rng)]


def centres(count: int, options: Clips, rng: Generator) -> list[int]:
    """Which of `count` sentences the clips are about.

    `consecutive`: they are cut into groups of `number`, of which the last wraps round, and one is drawn
    (UniVL: dataloaders/dataloader_howto100m.py).
    """
    if options.choice == "drawn":
        return [int(i) for i in rng.integers(count, size=options.number)]
    first = options.number * int(rng.integers(-(-count // options.number)))
    return [(first + i) % count for i in range(options.number)]


def window(sentences: Sequence[Timed], i: int, options: Clips, rng: Generator) -> Window:
    """The clip about sentence `i`; `rng` draws only what `join` asks for."""
    if options.candidates > 1:
        start, end = widened(sentences[i].start, sentences[i].end, options.least_seconds)
        return Window(start, end, tuple((each,) for each in nearest(sentences, i, options.candidates)))
    last = i
    while options.join and last + 1 < len(sentences) and rng.random() < options.join:
        last += 1
    own = tuple(range(i, last + 1))
    if options.longer_by == "time":
        start, end = widened(sentences[i].start, _end(sentences, own), options.least_seconds)
        return Window(start, end, (own,))
    return grow(sentences, own, options.least_seconds, options.least_words, options.longer_by == "appended")


def grow(
    sentences: Sequence[Timed],
    own: Sequence[int],
    least_seconds: float,
    least_words: int = 0,
    appended: bool = True,
) -> Window:
    """The clip of neighbouring sentences `own`, longer by whole ones until it lasts and says enough.

    Of the two neighbours the one that makes the shorter span joins, on a tie the one before; where only words count
    (`least_seconds` 0), the one with fewer words. The words of one before stand behind those that are there
    (`appended`, HowTo100M: youtube_dataloader.py) or in front of them (UniVL: dataloader_howto100m.py).
    """
    order = list(own)
    first, last = order[0], order[-1]
    start, end = sentences[first].start, _end(sentences, order)
    words = sum(_words(sentences[i]) for i in order)
    while end - start < least_seconds or words < least_words:
        before, after = first > 0, last + 1 < len(sentences)
        if not (before or after):
            break
        if before and after:
            by_time = sentences[last + 1].end - start, end - sentences[first - 1].start
            by_words = _words(sentences[last + 1]), _words(sentences[first - 1])
            longer, shorter = by_time if least_seconds > 0 else by_words
            before = shorter <= longer
        if before:
            first -= 1
            start = sentences[first].start
            order.insert(len(order) if appended else 0, first)
            words += _words(sentences[first])
        else:
            last += 1
            end = sentences[last].end
            order.append(last)
            words += _words(sentences[last])
    return Window(start, end, (tuple(order),))


def nearest(sentences: Sequence[Timed], i: int, count: int) -> list[int]:
    """[count] the run of sentences about sentence `i` that spans least (MIL-NCE: video_loader.py).

    It grows one by one to the side that keeps the span shorter, to the later one on a tie. At the first sentence it
    goes on to the right, at the last one to the left; a video with fewer sentences repeats its ends.
    """
    first, last = i, i
    for found in range(1, count):
        if first == 0:
            break
        if last == len(sentences) - 1:
            first -= count - found
            break
        before = sentences[last].end - sentences[first - 1].start
        if before < sentences[last + 1].end - sentences[first].start:
            first -= 1
        else:
            last += 1
    return [min(max(first + j, 0), len(sentences) - 1) for j in range(count)]


def widened(start: float, end: float, least: float) -> tuple[float, float]:
    """[start, end) of at least `least` seconds about the same middle, not before 0 (MIL-NCE: video_loader.py)."""
    if end - start >= least:
        return start, end
    begin = max(0.0, start - (least - (end - start)) / 2)
    return begin, begin + least


def within(times: NDArray[np.floating[Any]], start: float, end: float) -> slice:
    """The frames of a stretch, where frame t lasts from `times[t]` to the next, at least one; at `fps` per second
    floor(start fps) .. floor(end fps), both of them (HowTo100M: youtube_dataloader.py). None where the stretch begins
    behind the last frame's end."""
    start, end = start + CLOSE * (1 + start), end + CLOSE * (1 + end)
    if start >= duration(times):
        return slice(len(times), len(times))
    first, stop = np.searchsorted(times, [start, end], side="right").tolist()
    return slice(max(0, first - 1), max(stop, first, 1))


def overlapping(times: NDArray[np.floating[Any]], start: float, end: float) -> slice:
    """The frames of which a part lies in [start, end) (HERO)."""
    found = within(times, start, end)
    stop = int(np.searchsorted(times, end - CLOSE * (1 + end), side="left"))
    return slice(found.start, max(found.start, stop))


def duration(times: NDArray[np.floating[Any]]) -> float:
    """Seconds until the last frame ends, which lasts as long as the one before."""
    if not len(times):
        return 0.0
    step = float(times[-1] - times[-2]) if len(times) > 1 else 1.0
    return float(times[-1]) + step


def _end(sentences: Sequence[Timed], own: Sequence[int]) -> float:
    return max(sentences[i].end for i in own)


def _words(sentence: Timed) -> int:
    return len(sentence.text.split())
