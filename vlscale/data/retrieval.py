"""Pictures with all their captions, as retrieval is measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlscale.data.collate import pad_texts, stack_pictures
from vlscale.data.decode import Crop, Pixels
from vlscale.data.masking import Ids
from vlscale.data.phrases import Texts
from vlscale.data.samples import BrokenSampleError, crops
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.types import Inputs, Text, Visual


@dataclass(frozen=True)
class RetrievalBatch:
    """Pictures with all their captions. P pictures, C captions."""

    visual: Visual  # uint8 [P, 3, H, W]
    text: Text  # [C, L]
    owner: Tensor  # [C] int64, the number of each caption's picture in the data set
    index: Tensor  # [P] int64, the number of each picture in the data set


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

    def whole(height: int, width: int) -> list[Crop]:
        return [Crop(0, 0, height, width, (size, size))]

    for i in pictures:
        try:
            phrases, (shown,) = texts(i), crops(shards, i, whole)
        except BrokenSampleError:
            continue
        index.append(i)
        pixels.append(shown)
        rows.extend((phrase.ids, None) for phrase in phrases)
        owner.extend([i] * len(phrases))
    if not index:
        return None
    return RetrievalBatch(stack_pictures(pixels), pad_texts(rows, pad), torch.tensor(owner), torch.tensor(index))
