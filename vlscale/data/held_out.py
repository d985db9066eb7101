"""Samples that a run is measured on: the first of a data set, in its order, always drawn alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from vlscale.data.micro_batches import MicroBatches, Preprocessing
from vlscale.data.samples import Bad
from vlscale.data.shards import Shards
from vlscale.data.shuffle import Numbers
from vlscale.data.text import Tokenizer
from vlscale.errors import DataError
from vlscale.types import Batch, Inputs

SEED = 0  # of all draws, so that every evaluation of every run hides the same words of the same captions
FIRST_ID = 1 << 40  # pair ids begin here: none is that of a training sample, whose key may be in a queue


class HeldOutBatches:
    """Micro-batches of the first `limit` samples (0 = all), the same number on every rank, of the same sizes.

    Round n has the samples [n * batch * world, (n + 1) * batch * world), rank by rank, and sample i has the draws of
    position i: with as many samples in a round, ranks change nothing. The samples of the last round are shared
    out evenly; those left over are not used, nor is a round of one sample per rank where `batch` is larger, for
    some objectives look at other samples.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        inputs: Inputs,
        preprocessing: Preprocessing,
        *,
        batch: int,
        limit: int = 0,
    ) -> None:
        """`batch` counts the samples of a rank at a time, `preprocessing` says what is made of them."""
        self._make = MicroBatches(shards, tokenizer, inputs, replace(preprocessing, seed=SEED), _in_order)
        self._batch = batch
        self._number = min(limit or len(shards), len(shards))
        self.skipped: set[Bad] = set()  # by this rank: others stood in their places

    def __call__(self, task: str, rank: int, world: int) -> Iterator[Batch]:
        """The micro-batches of one rank for one task.

        Raises:
            DataError: there are too few samples, or they cannot be used.
        """
        start = 0
        for size in sizes(self._number, self._batch, world):
            first = start + rank * size
            loaded = self._make(np.arange(first, first + size), task)
            self.skipped.update(loaded.bad)
            if loaded.batch is None:
                raise DataError(loaded.error)
            yield replace(loaded.batch, pair_id=loaded.batch.pair_id + FIRST_ID)
            start += size * world


def sizes(number: int, batch: int, world: int) -> list[int]:
    """Of the micro-batches of each rank, where all have so many samples.

    Raises:
        DataError: they are too few for one.
    """
    whole, rest = divmod(number // world, batch)
    found = [batch] * whole + ([rest] if rest > 1 else [])
    if not found:
        raise DataError(
            f"{number} validation samples are too few for {world} rank(s) and micro-batches of {batch}; "
            f"name more shards under data.val, or raise evaluation.limit"
        )
    return found


def _in_order(positions: Numbers) -> Numbers:
    return positions
