"""Pictures, or stretches of clips, with all their captions, as retrieval is measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlscale.data.clip_files import MAX_FRAMES, Footage
from vlscale.data.clip_windows import Clips, Timed, Window
from vlscale.data.clips import MAX_CLIP_PIXELS
from vlscale.data.collate import pad_texts, stack_frames, stack_pictures
from vlscale.data.decode import Crop, Pixels
from vlscale.data.frames import Frames
from vlscale.data.masking import Ids
from vlscale.data.phrases import Texts
from vlscale.data.samples import MAX_CAPTIONS, BrokenSampleError, Picture
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.types import Inputs, Text, Visual


@dataclass(frozen=True)
class RetrievalBatch:
    """Pictures with all their captions. P pictures or stretches of clips, C captions."""

    visual: Visual  # uint8 [P, 3, H, W]; of clips [P * windows, T, ...], a stretch's windows next to one another
    text: Text  # [C, L]
    owner: Tensor  # [C] int64, the number of each caption's picture in the data set
    index: Tensor  # [P] int64, the number of each picture in the data set
    windows: int = 1  # of a stretch, whose embeddings are averaged


def retrieval_batches(
    shards: Shards,
    tokenizer: Tokenizer,
    inputs: Inputs,
    *,
    batch: int,
    rank: int,
    world: int,
    max_words: int,
    limit: int,
) -> Iterator[RetrievalBatch]:
    """This rank's part of the first `limit` pictures (0 = all), un-augmented, each with all its captions.

    Rank r has the pictures r, r + world, ...; `batch` is the most pictures at a time. Every rank makes the
    same number of batches, so that passes with messages between ranks stay in step, provided that `batch` is
    above 1 and no rank is without pictures. A picture that cannot be used is left out.
    """
    texts = Texts(shards, tokenizer, max_words, None)
    num_pictures = min(limit or len(shards), len(shards))
    part = list(range(rank, num_pictures, world))
    largest = -(-num_pictures // world)
    num_batches = min(-(-largest // batch), len(part))
    for n in range(num_batches):
        pictures = part[n * len(part) // num_batches : (n + 1) * len(part) // num_batches]
        made = _retrieval_batch(shards, texts, pictures, inputs.image_size, tokenizer.pad)
        if made is not None:
            yield made


def _retrieval_batch(
    shards: Shards, texts: Texts, pictures: Sequence[int], size: int, pad: int
) -> RetrievalBatch | None:
    index: list[int] = []
    pixels: list[Pixels] = []
    rows: list[tuple[Ids, None]] = []
    owner: list[int] = []

    for i in pictures:
        try:
            phrases, picture = texts(i), Picture(shards, i)
            (shown,) = picture.crops([Crop(0, 0, picture.height, picture.width, (size, size))])
        except BrokenSampleError:
            continue
        index.append(i)
        pixels.append(shown)
        rows.extend((phrase.ids, None) for phrase in phrases)
        owner.extend([i] * len(phrases))
    if not index:
        return None
    return RetrievalBatch(stack_pictures(pixels), pad_texts(rows, pad), torch.tensor(owner), torch.tensor(index))


class Stretch(NamedTuple):
    """A part of a clip, and the captions that go with it."""

    number: int  # in the data set
    captions: list[Ids]
    windows: list[Frames]


class ClipBatches:
    """This rank's part of the stretches of the first `limit` samples (0 = all), each with all its captions.

    A stretch is what a timed sentence goes with, or the whole clip, with its captions. It is seen in `windows` of as
    many frames as the family reads, spread evenly from its beginning to its end (MIL-NCE: main_distributed.py); a
    window of pixels may go on after it, up to the end of the clip. Pixels are the middle square, nothing is
    augmented. A sample, or a stretch of one, that cannot be used is left out and counted in `skipped`; `broken` is why,
    of the first.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        inputs: Inputs,
        clips: Clips,
        *,
        batch: int,
        windows: int = 1,
        rank: int = 0,
        world: int = 1,
        max_words: int = 0,
        limit: int = 0,
        max_pixels: int = MAX_CLIP_PIXELS,
    ) -> None:
        """`batch` is the most windows at a time, but for a stretch of more; rank r has the samples r, r + world, ..."""
        self._shards, self._inputs, self._pad = shards, inputs, tokenizer.pad
        self._texts = Texts(shards, tokenizer, max_words, None)
        self._clips = replace(clips, start="first")
        self._samples = range(rank, min(limit or len(shards), len(shards)), world)
        self._most, self._windows, self._max_pixels = max(1, batch // windows), windows, max_pixels
        self.skipped = 0
        self.broken: BrokenSampleError | None = None

    def __iter__(self) -> Iterator[RetrievalBatch]:
        waiting: list[Stretch] = []
        for i in self._samples:
            for stretch in self._stretches(i):
                waiting.append(stretch)
                if len(waiting) == self._most:
                    yield self._batch(waiting)
                    waiting = []
        if waiting:
            yield self._batch(waiting)

    def _skip(self, error: BrokenSampleError) -> None:
        self.skipped += 1
        self.broken = self.broken or error

    def _stretches(self, i: int) -> Iterator[Stretch]:
        said: dict[tuple[float, float], list[Timed]] = {}
        try:
            for each in self._texts.timed(i):
                said.setdefault((each.start, each.end), []).append(each)
            footage = Footage(self._shards, i, self._inputs, self._max_pixels)
        except BrokenSampleError as error:
            self._skip(error)
            return
        generator = np.random.default_rng(0)  # of which nothing is drawn
        for place, ((start, end), captions) in enumerate(said.items()):
            try:
                window = footage.stretch(Window(start, end, ()), self._clips, generator)
                seen = self._pixels(footage, window) if self._inputs.image_size else self._rows(footage, window)
            except BrokenSampleError as error:
                self._skip(error)
                continue
            ids = [self._texts.fit(each.text).ids for each in captions]
            yield Stretch(i * MAX_CAPTIONS + place, ids, seen)

    def _pixels(self, footage: Footage, stretch: Window) -> list[Frames]:
        frames, size = self._inputs.frames, self._inputs.image_size
        crop = Crop.middle(*footage.sides, size)
        seconds = frames / self._clips.fps
        shown: dict[float, Frames] = {}
        starts = np.linspace(stretch.start, max(stretch.start, stretch.end - seconds), self._windows).tolist()
        for start in starts:
            if start not in shown:
                window = Window(start, min(start + seconds, footage.duration), ())
                shown[start] = footage.pixels(footage.times(window, self._clips, frames), crop)
        return [shown[start] for start in starts]

    def _rows(self, footage: Footage, stretch: Window) -> list[Frames]:
        frames, _ = footage.rows(stretch, self._clips, MAX_FRAMES, np.random.default_rng(0))
        most = self._inputs.frames
        starts = np.linspace(0, max(0, frames.length - most), self._windows).round().astype(int).tolist()
        codes = frames.codes
        return [
            frames._replace(
                feats=frames.feats[start : start + most],
                codes=None if codes is None else codes[start : start + most],
            )
            for start in starts
        ]

    def _batch(self, stretches: Sequence[Stretch]) -> RetrievalBatch:
        captions = [(ids, None) for each in stretches for ids in each.captions]
        return RetrievalBatch(
            stack_frames([window for each in stretches for window in each.windows], False, self._inputs.frames),
            pad_texts(captions, self._pad),
            torch.tensor([each.number for each in stretches for _ in each.captions]),
            torch.tensor([each.number for each in stretches]),
            self._windows,
        )
