"""Micro-batches of a rank, in an order that ranks, workers, micro-batch size and restarts do not change."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlscale.data.collate import Sample, collate, pad_texts, stack_pictures
from vlscale.data.decode import Pixels, resize
from vlscale.data.order import Draws, Order
from vlscale.data.samples import BrokenSampleError, captions, picture
from vlscale.data.shards import Shards
from vlscale.data.text import Ids, Tokenizer, clean_caption
from vlscale.data.views import Views
from vlscale.errors import ConfigError, DataError
from vlscale.types import Batch, Inputs, Text, Visual

MAX_BROKEN_IN_A_ROW = 100  # more than this is no bad luck: the data are wrong
MAX_CACHED_TEXTS = 1 << 20  # samples whose token ids are kept, some 300 bytes each
PATIENCE = 20.0  # seconds for the micro-batch that is being made when the loader is closed
T = TypeVar("T")


class Bad(NamedTuple):
    """A sample that was skipped."""

    shard: str
    key: str
    reason: str


class _Loaded(NamedTuple):
    """A micro-batch and the samples skipped for it; or the sentence that ends the run."""

    batch: Batch | None
    bad: tuple[Bad, ...] = ()
    error: str = ""


class _Texts:
    """The token ids of every caption of a sample, made once per process."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer, max_words: int) -> None:
        self._shards = shards
        self._tokenizer = tokenizer
        self._max_words = max_words
        self._kept: dict[int, list[Ids]] = {}

    def __call__(self, i: int) -> list[Ids]:
        """One array [L] per caption. BrokenSampleError if the sample has none that is left after clean-up."""
        texts = self._kept.get(i)
        if texts is None:
            texts = self._encode(i)
            if len(self._kept) < MAX_CACHED_TEXTS:
                self._kept[i] = texts
        return texts

    def _encode(self, i: int) -> list[Ids]:
        cleaned = [clean_caption(caption, self._max_words) for caption in captions(self._shards, i)]
        if not all(cleaned):
            reason = "a caption holds nothing but punctuation; write a text or leave the sample out"
            raise BrokenSampleError(self._shards.shard(i), self._shards.key(i), reason)
        return [self._tokenizer.encode(caption) for caption in cleaned]


class _MicroBatches(Dataset[_Loaded]):
    """Micro-batch number m of this rank, as a function of m alone."""

    def __init__(
        self,
        shards: Shards,
        views: Views,
        tokenizer: Tokenizer,
        size: int,
        seed: int,
        max_words: int,
        first: Callable[[int], int],
        length: int,
    ) -> None:
        self.shards = shards
        self.views = views
        self.tokenizer = tokenizer
        self.size = size
        self.seed = seed
        self.first = first
        self.length = length
        self.order = Order(len(shards), seed)
        self.texts = _Texts(shards, tokenizer, max_words)

    def __getitem__(self, number: int) -> _Loaded:
        """A mistake in the data is returned, not raised: torch would wrap it in a worker's traceback."""
        bad: list[Bad] = []
        draws = Draws(self.seed)
        start = self.first(number)
        try:
            samples = [self.sample(position, draws, bad) for position in range(start, start + self.length)]
            return _Loaded(collate(samples, self.tokenizer.pad), tuple(bad))
        except DataError as error:
            return _Loaded(None, tuple(bad), str(error))

    def sample(self, position: int, draws: Draws, bad: list[Bad]) -> Sample:
        """The sample at `position`, or the next one that can be used, with the position's draws."""
        _, index = self.order(position)
        for i in range(index, index + MAX_BROKEN_IN_A_ROW):
            try:
                return self._views_of(i % len(self.shards), position, draws)
            except BrokenSampleError as error:
                bad.append(Bad(str(error.shard), error.key, error.reason))
                last = error
        raise DataError(f"{MAX_BROKEN_IN_A_ROW} samples in a row cannot be used; the last one: {last}")

    def _views_of(self, i: int, position: int, draws: Draws) -> Sample:
        texts = self.texts(i)
        ids = texts[0]
        if len(texts) > 1:  # one caption per access, drawn anew (ALBEF)
            ids = texts[int(draws(position, "caption").integers(len(texts)))]
        visual = {}
        if self.views.visual:
            pixels = picture(self.shards, i)
            for name, view in self.views.visual.items():
                visual[name] = view(pixels, self.size, draws(position, f"visual.{name}"))
        text = {
            name: view(ids, self.tokenizer, draws(position, f"text.{name}")) for name, view in self.views.text.items()
        }
        return Sample(i, self.shards.key(i), visual, text)


class _Place:
    """Where the n-th micro-batch of a rank starts in the endless stream of positions."""

    def __init__(self, batch: int, micro_batch: int, rank: int, world: int) -> None:
        self.batch, self.micro_batch, self.rank, self.world = batch, micro_batch, rank, world
        self.per_step = batch // (micro_batch * world)

    def __call__(self, number: int) -> int:
        step, m = divmod(number, self.per_step)
        return step * self.batch + (m * self.world + self.rank) * self.micro_batch


class Loader:
    """The training samples of one rank, step by step.

    `bad` names each sample that was skipped, once; `bad_samples` counts how often that happened on this rank.
    """

    def __init__(
        self,
        shards: Shards,
        views: Views,
        tokenizer: Tokenizer,
        inputs: Inputs,
        *,
        batch: int,
        micro_batch: int,
        seed: int,
        rank: int,
        world: int,
        workers: int,
        max_words: int,
    ) -> None:
        """`batch` counts the samples of a step over all ranks, `micro_batch` those of one forward pass.

        With 0 `workers` a thread works ahead, else that many processes. `max_words` cuts captions (0 = not).
        ConfigError if `batch` is no multiple of micro_batch * world; DataError if there are no samples.
        """
        check_batch(batch, micro_batch, world)
        self._place = _Place(batch, micro_batch, rank, world)
        self._batches = _MicroBatches(
            shards, views, tokenizer, inputs.image_size, seed, max_words, self._place, micro_batch
        )
        self._workers = workers
        self._fingerprint = shards.fingerprint()
        self.num_samples = len(shards)
        self.bad_samples = 0
        self.bad: list[Bad] = []

    def steps(self, start: int, stop: int) -> Generator[tuple[int, list[Batch]], None, None]:
        """(step, this rank's micro-batches) for steps start + 1 .. stop; one step is loaded ahead.

        Closing the iterator ends its thread and processes. DataError if the data cannot be read.
        """
        per_step = self._place.per_step
        numbers = range(start * per_step, stop * per_step)
        micro_batches: list[Batch] = []
        ahead = _Ahead(iter(self._load(numbers)), per_step, pin=torch.cuda.is_available())
        try:
            for number, loaded in zip(numbers, ahead, strict=True):
                micro_batches.append(self._account(loaded))
                if len(micro_batches) == per_step:
                    yield number // per_step + 1, micro_batches
                    micro_batches = []
        finally:
            ahead.close()

    def _load(self, numbers: range) -> Iterable[_Loaded]:
        if not self._workers:
            _one_thread()
            return map(self._batches.__getitem__, numbers)
        # not forked from here: a fork inherits locks that threads of torch or OpenCV may hold, and hangs on them
        workers = multiprocessing.get_context("forkserver")
        workers.set_forkserver_preload(["vlscale.data.loader"])
        return DataLoader(
            self._batches,
            batch_size=None,  # an item is a micro-batch already
            sampler=numbers,
            num_workers=self._workers,
            prefetch_factor=max(2, -(-self._place.per_step // self._workers)),
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            multiprocessing_context=workers,
        )

    def _account(self, loaded: _Loaded) -> Batch:
        self.bad_samples += len(loaded.bad)
        self.bad.extend(bad for bad in dict.fromkeys(loaded.bad) if bad not in self.bad)
        if loaded.batch is None:
            raise DataError(loaded.error)
        return loaded.batch

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which data these are, and what was skipped; the step tells the place."""
        return {
            "fingerprint": self._fingerprint,
            "num_samples": self.num_samples,
            "seed": self._batches.seed,
            "bad_samples": self.bad_samples,
            "bad": [list(bad) for bad in self.bad],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`. DataError if the shards are others, ConfigError if the seed is."""
        if state["seed"] != self._batches.seed:
            raise ConfigError(f"seed={self._batches.seed} is not the run's; write seed={state['seed']}")
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                f"the shards of data.train ({self.num_samples} samples) are not those the run began with "
                f"({state['num_samples']} samples); name the same shards in the same order, or start anew"
            )
        self.bad_samples = state["bad_samples"]
        self.bad = [Bad(*bad) for bad in state["bad"]]


def check_batch(batch: int, micro_batch: int, world: int) -> None:
    """ConfigError unless a step of `batch` samples splits into micro-batches of equal size on every rank."""
    if batch < 1 or micro_batch < 1:
        raise ConfigError(f"data.batch={batch} and data.micro_batch={micro_batch}: both should be at least 1")
    unit = micro_batch * world
    if batch % unit:
        below, above = batch // unit * unit, -(-batch // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"data.batch={batch} is not a multiple of data.micro_batch={micro_batch} times {world} ranks; "
            f"write data.batch={near}"
        )


def _as_is(loaded: T) -> T:
    return loaded


def _start_worker(worker: int) -> None:
    """A session of its own keeps a worker out of signals to the job's process group: its parent decides."""
    os.setsid()
    _one_thread()


def _one_thread() -> None:
    """OpenCV without a thread pool of its own: the cores belong to torch and to the workers."""
    cv2.setNumThreads(0)


def _pinned(loaded: _Loaded) -> _Loaded:
    """The same in page-locked memory, from which copies to the device run asynchronously."""
    if loaded.batch is None:
        return loaded

    def pin(value: Tensor | None) -> Any:
        return None if value is None else value.pin_memory()

    batch = replace(
        loaded.batch,
        text={view: Text(*map(pin, fields)) for view, fields in loaded.batch.text.items()},
        visual={view: Visual(*map(pin, fields)) for view, fields in loaded.batch.visual.items()},
        pair_id=pin(loaded.batch.pair_id),
    )
    return loaded._replace(batch=batch)


class _Ahead(Iterator[_Loaded]):
    """The items of `source`, made by a thread that works up to `depth` items ahead until `close`."""

    def __init__(self, source: Iterator[_Loaded], depth: int, pin: bool) -> None:
        self._made: queue.Queue[_Loaded | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(source, pin), name="loader", daemon=True)
        self._thread.start()

    def _work(self, source: Iterator[_Loaded], pin: bool) -> None:
        try:
            for item in source:
                self._put(_pinned(item) if pin else item)
                if self._stop.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: _Loaded | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __next__(self) -> _Loaded:
        item = self._made.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Wait until the thread has finished the item it is at, and ended; not for ever, if a worker hangs."""
        self._stop.set()
        self._thread.join(PATIENCE)


@dataclass(frozen=True)
class RetrievalBatch:
    """Pictures with all their captions. P pictures, C captions."""

    visual: Visual  # uint8 [P, 3, H, W]
    text: Text  # [C, L]
    owner: Tensor  # [C] int64, the number of each caption's picture in the data set
    index: Tensor  # [P] int64, the number of each picture in the data set
    bad: tuple[Bad, ...] = ()  # skipped pictures


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
    above 1 and no rank is without pictures. A picture that cannot be used is left out and named in `bad`.
    """
    texts = _Texts(shards, tokenizer, max_words)
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
    shards: Shards, texts: _Texts, pictures: Sequence[int], size: int, pad: int
) -> RetrievalBatch | None:
    bad: list[Bad] = []
    index: list[int] = []
    pixels: list[Pixels] = []
    rows: list[tuple[Ids, None]] = []
    owner: list[int] = []
    for i in pictures:
        try:
            ids, shown = texts(i), resize(picture(shards, i), size, size)
        except BrokenSampleError as error:
            bad.append(Bad(str(error.shard), error.key, error.reason))
            continue
        index.append(i)
        pixels.append(shown)
        rows.extend((row, None) for row in ids)
        owner.extend([i] * len(ids))
    if not index:
        return None
    return RetrievalBatch(
        stack_pictures(pixels), pad_texts(rows, pad), torch.tensor(owner), torch.tensor(index), tuple(bad)
    )
