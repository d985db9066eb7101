"""Micro-batches of any positions: read, decoded, changed and put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, cast

import numpy as np
from torch.utils.data import get_worker_info

from vlscale.data.assemble import Assembler
from vlscale.data.collate import Sample, collate
from vlscale.data.decode import MAX_PIXELS, Pixels
from vlscale.data.order import Draws, TaskOrder
from vlscale.data.phrases import Texts
from vlscale.data.samples import Bad, BrokenSampleError
from vlscale.data.shards import Shards
from vlscale.data.shuffle import Numbers
from vlscale.data.text import Tokenizer
from vlscale.data.views import Views
from vlscale.errors import ConfigError, DataError
from vlscale.types import Batch, Inputs

MAX_BROKEN_IN_A_ROW = 100  # more than this is no bad luck: the data are wrong
HELD = 1 << 24  # bytes of pictures, read but not decoded, that are held at a time
IDLE = -1  # a worker that is at no sample


@dataclass(frozen=True)
class Preprocessing:
    """What is made of the samples; the same on every rank."""

    views: Mapping[str, Views]  # by task
    tasks: TaskOrder
    seed: int
    max_words: int = 0  # of a caption; 0 = all
    answers: Mapping[str, int] = field(default_factory=dict)  # their numbers, where questions are asked
    fields: frozenset[str] = frozenset()  # of `Visual` that someone reads, beside features and boxes
    max_pixels: int = MAX_PIXELS  # of a picture; larger ones are broken samples


class Loaded(NamedTuple):
    """A micro-batch and the samples skipped for it; or the sentence that ends the run."""

    batch: Batch | None
    bad: tuple[Bad, ...] = ()
    error: str = ""


class MicroBatches:
    """Micro-batches of any positions."""

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        inputs: Inputs,
        preprocessing: Preprocessing,
        order: Callable[[Numbers], Numbers],
        ahead: int = 0,
    ) -> None:
        """`order` gives the numbers of the samples that stand at positions.

        Shards of samples that stand `ahead` positions further are fetched from their store meanwhile; 0 = none.
        ConfigError if `keep_ratio` is asked of a family that reads squares.
        """
        check_shapes(preprocessing.views, inputs)
        asks = any(views.answers for views in preprocessing.views.values())
        texts = Texts(shards, tokenizer, preprocessing.max_words, preprocessing.answers if asks else None)
        self._assembler = Assembler(shards, inputs, tokenizer, texts, preprocessing.fields, preprocessing.max_pixels)
        self._preprocessing = preprocessing
        self._order = order
        self._shards, self._ahead = shards, ahead
        self._num_samples = len(shards)
        self._pad = tokenizer.pad
        self._side, self._frames = inputs.image_size, inputs.frames
        self.working: MutableSequence[int] = [IDLE]  # of each worker, the sample that it is at

    def __call__(self, positions: Numbers, task: str) -> Loaded:
        """A mistake in the data is returned, not raised: torch would wrap it in a worker's traceback."""
        if self._ahead:
            self._shards.prefetch(int(self._order(positions[-1:] + self._ahead)[0]))
        bad: list[Bad] = []
        draws = Draws(self._preprocessing.seed)
        views = self._preprocessing.views[task]
        worker = get_worker_info()
        self._worker = worker.id if worker is not None else 0
        try:
            squares = self._squares(len(positions), views)
            places = zip(positions.tolist(), self._order(positions).tolist(), *squares.values(), strict=True)
            samples = _in_steps(
                self._sample(position, index, views, draws, dict(zip(squares, rooms, strict=True)), bad)
                for position, index, *rooms in places
            )
            targets = "targets" in self._preprocessing.fields
            batch = collate(samples, self._pad, task, targets, views.keep_ratio(), squares, self._frames)
            return Loaded(replace(batch, positions=tuple(positions.tolist())), tuple(bad))
        except DataError as error:
            return Loaded(None, tuple(bad), str(error))
        finally:
            self.working[self._worker] = IDLE

    def _squares(self, count: int, views: Views) -> dict[str, Pixels]:
        """Memory for the pictures [count, S, S, 3] of each view that makes squares of them."""
        shape = (count, self._side, self._side, 3)
        return {name: np.empty(shape, np.uint8) for name, view in views.visual.items() if not view.keep_ratio}

    def _sample(
        self, position: int, index: int, views: Views, draws: Draws, rooms: Mapping[str, Pixels], bad: list[Bad]
    ) -> Iterator[int | Sample]:
        """How many bytes it holds when all is ready but its picture's pixels, then the sample `index` at `position`.

        Or the next one that can be used, which tells its bytes again; every try draws its partner anew.
        """
        for attempt in range(MAX_BROKEN_IN_A_ROW):
            number = (index + attempt) % self._num_samples
            draw = partial(draws, position, attempt=attempt)
            try:
                self.working[self._worker] = number
                prepared = self._assembler(number, views, draw)
                yield prepared.picture.size if prepared.picture else 0
                self.working[self._worker] = number
                yield self._assembler.show(prepared, views, draw, rooms)
                return
            except BrokenSampleError as error:
                bad.append(Bad(str(error.shard), error.key, error.reason))
                last = error
        raise DataError(f"{MAX_BROKEN_IN_A_ROW} samples in a row cannot be used; the last one: {last}")


def _in_steps(making: Iterable[Iterator[int | Sample]]) -> list[Sample]:
    """What `_sample` gives of each: many are made ready, then their pictures are decoded.

    Code and memory of either step then stay in the processor's caches: of a small picture's time a sixteenth.
    """
    samples: list[Sample] = []
    waiting: list[Iterator[int | Sample]] = []
    held = 0
    for each in making:
        held += cast(int, next(each))
        waiting.append(each)
        if held > HELD:
            samples += [_sample_of(ready) for ready in waiting]
            waiting, held = [], 0
    return samples + [_sample_of(ready) for ready in waiting]


def _sample_of(making: Iterator[int | Sample]) -> Sample:
    return next(made for made in making if isinstance(made, Sample))


def check_shapes(views: Mapping[str, Views], inputs: Inputs) -> None:
    """ConfigError if pictures keep their shape and the family reads squares alone."""
    for name in [name for each in views.values() for name in each.keep_ratio()]:
        if not inputs.any_size:
            raise ConfigError(
                f"views.visual.{name}.keep_ratio gives pictures of any shape, but this family reads squares of "
                f"{inputs.image_size} pixels; leave it out, or choose a family that reads any shape, such as soho"
            )
