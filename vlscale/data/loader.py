"""Micro-batches of a rank, in an order that ranks, workers, micro-batch size and restarts do not change."""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlscale.data.assemble import Assembler
from vlscale.data.batches import Batching
from vlscale.data.collate import Sample, collate
from vlscale.data.decode import MAX_PIXELS, Pixels
from vlscale.data.order import Draws, Order, TaskOrder
from vlscale.data.phrases import Texts
from vlscale.data.samples import Bad, BrokenSampleError, printable
from vlscale.data.shards import Shards
from vlscale.data.shuffle import Numbers
from vlscale.data.text import Tokenizer
from vlscale.data.views import Views
from vlscale.errors import ConfigError, DataError
from vlscale.stop import shield_worker, worker_processes
from vlscale.types import Batch, Inputs

MAX_BROKEN_IN_A_ROW = 100  # more than this is no bad luck: the data are wrong
ORDER = 2  # rises when the same options give another order of samples, with which no run may go on
IDLE = -1  # a worker that is at no sample
WORKER_GONE = (
    "a loader process of this rank is gone, killed perhaps for want of memory ({}); the same command goes on, "
    "with data.workers=0 or fewer if it happens again"
)
PATIENCE = 20.0  # seconds for the micro-batch that is being made when the loader is closed
T = TypeVar("T")


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
            samples = [
                self._sample(position, index, views, draws, dict(zip(squares, rooms, strict=True)), bad)
                for position, index, *rooms in places
            ]
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
    ) -> Sample:
        """The sample `index` at `position`, or the next one that can be used; every try draws its partner anew."""
        for attempt in range(MAX_BROKEN_IN_A_ROW):
            again = f"/{attempt}" if attempt else ""
            self.working[self._worker] = (index + attempt) % self._num_samples
            try:
                return self._assembler(
                    (index + attempt) % self._num_samples, views, partial(_draw, draws, position, again), rooms
                )
            except BrokenSampleError as error:
                bad.append(Bad(str(error.shard), error.key, error.reason))
                last = error
        raise DataError(f"{MAX_BROKEN_IN_A_ROW} samples in a row cannot be used; the last one: {last}")


def _draw(draws: Draws, position: int, again: str, stream: str) -> np.random.Generator:
    return draws(position, stream + again)


class _Numbered(Dataset[Loaded]):
    """Micro-batch number m of this rank, counted from the first step, as a function of m alone."""

    def __init__(self, make: MicroBatches, tasks: TaskOrder, batching: Batching) -> None:
        self.make = make
        self.tasks = tasks
        self.batching = batching

    def __getitem__(self, number: int) -> Loaded:
        before, within = divmod(number, self.batching.per_step)
        return self.make(self.batching(before + 1, within), self.tasks(before + 1))


class Loader:
    """The training samples of one rank, step by step.

    `bad_samples` counts how often a sample was skipped on this rank. `left_out` lists, as (after which step, steps'
    worth of data), what was never trained on or taken back: a run is its seed, batch, steps and that.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        inputs: Inputs,
        preprocessing: Preprocessing,
        order: Order,
        batching: Batching,
        workers: int,
    ) -> None:
        """`order` numbers the samples of `shards`.

        With 0 `workers` a thread works ahead, else that many processes. ConfigError if `keep_ratio` is asked of a
        family that reads squares.
        """
        make = MicroBatches(shards, tokenizer, inputs, preprocessing, order, ahead=order.window)
        make.working = RawArray("q", [IDLE] * max(1, workers))  # in memory that worker processes share
        self._shards, self._working = shards, make.working
        self.order = copy.deepcopy(order)  # of its own, as the next: the loader's thread uses the other
        self._shards = shards
        self._batches = _Numbered(make, preprocessing.tasks, batching)
        self._per_step = batching.per_step
        self._served = copy.deepcopy(batching).served
        self._workers = workers
        self._fingerprint = shards.fingerprint()
        self.bad_samples = 0
        self.left_out: list[tuple[int, int]] = []
        self._bad: list[Bad] = []

    def steps(self, start: int, stop: int) -> Generator[tuple[int, list[Batch]], None, None]:
        """(step, this rank's micro-batches) for steps start + 1 .. stop; one step is loaded ahead.

        Closing the iterator ends its thread and processes. DataError if the data cannot be read.
        """
        ahead = _Ahead(iter(self._load(self._numbers(start, stop))), self._per_step, pin=torch.cuda.is_available())
        try:
            for step in range(start + 1, stop + 1):
                yield step, [self._account(next(ahead)) for _ in range(self._per_step)]
        finally:
            ahead.close()

    def _numbers(self, start: int, stop: int) -> Iterator[int]:
        """Of the micro-batches of steps start + 1 .. stop, counted from the first step's."""
        for step in range(start + 1, stop + 1):
            first = (self.data_step(step) - 1) * self._per_step
            yield from range(first, first + self._per_step)

    def _load(self, numbers: Iterator[int]) -> Iterable[Loaded]:
        if not self._workers:
            _one_thread()
            return map(self._batches.__getitem__, numbers)
        return DataLoader(
            self._batches,
            batch_size=None,  # an item is a micro-batch already
            sampler=numbers,
            num_workers=self._workers,
            prefetch_factor=max(2, -(-self._per_step // self._workers)),
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            multiprocessing_context=worker_processes("vlscale.data.loader"),
        )

    def _account(self, loaded: Loaded) -> Batch:
        self.bad_samples += len(loaded.bad)
        self._bad.extend(loaded.bad)
        if loaded.batch is None:
            raise DataError(loaded.error)
        return loaded.batch

    def working(self) -> list[str]:
        """What each worker is at, in words; it may have to look into a shard's index."""
        kind = "loader worker {}" if self._workers else "the loader's thread"
        said = []
        for worker, sample in enumerate(self._working):
            at = f"at sample {self._shards.key(sample)} of {self._shards.shard(sample)}" if sample != IDLE else "idle"
            said.append(f"{kind.format(worker)} {printable(at)}")
        return said

    def served(self, step: int) -> int:
        """How many positions of the order are used up after `step`, those that were left out among them."""
        return self._served(self.data_step(step))

    def data_step(self, step: int) -> int:
        """Which step's data, of a run that leaves nothing out, optimizer step `step` trains on."""
        return step + sum(steps for after, steps in self.left_out if after < step)

    def leave_out(self, after: int, until: int) -> tuple[int, int]:
        """Let step after + 1 train on the data that follow those of step `until`, when the run is back at `after`.

        Returns:
            The positions [first, end) that are left out by that, some of which were trained on.
        """
        last = self.data_step(until)
        self.left_out = [each for each in self.left_out if each[0] <= after]  # later ones were of the way given up
        first = self.data_step(after + 1) - 1
        self.left_out.append((after, last - first))
        return self._served(first), self._served(last)

    def shards_of(self, batch: Batch) -> list[str]:
        """The shard of each sample of a micro-batch that `steps` gave."""
        starts = self.order(batch.positions).tolist()
        return [self._shard(start, key) for start, key in zip(starts, batch.keys, strict=True)]

    def _shard(self, start: int, key: str) -> str:
        """That of the first sample from number `start` on whose key this is: those before it were skipped."""
        numbers = [(start + attempt) % len(self._shards) for attempt in range(MAX_BROKEN_IN_A_ROW)]
        return str(self._shards.shard(next(number for number in numbers if self._shards.key(number) == key)))

    def take_bad(self) -> list[Bad]:
        """The samples that were skipped since the last call, each as often as it was."""
        taken, self._bad = self._bad, []
        return taken

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which data these are; the step tells the place."""
        return {
            "order": ORDER,
            "fingerprint": self._fingerprint,
            "num_samples": self.order.num_samples,
            "seed": self.order.seed,
            "bad_samples": self.bad_samples,
            "left_out": list(self.left_out),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`. DataError if the shards or their order are others, ConfigError if the seed is."""
        if state.get("order", 1) != ORDER:
            raise DataError(
                "the checkpoint is of another version of vlscale, which served the samples in another order; go on "
                "with that version, or begin a new run from its weights with init.weights=CHECKPOINT"
            )
        if state["seed"] != self.order.seed:
            raise ConfigError(f"seed={self.order.seed} is not the run's; write seed={state['seed']}")
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                f"the shards of data.train ({self.order.num_samples} samples) are not those the run began with "
                f"({state['num_samples']} samples); name the same shards in the same order, or start anew"
            )
        self.bad_samples = state["bad_samples"]
        self.left_out = [(after, steps) for after, steps in state.get("left_out", ())]


def check_shapes(views: Mapping[str, Views], inputs: Inputs) -> None:
    """ConfigError if pictures keep their shape and the family reads squares alone."""
    for name in [name for each in views.values() for name in each.keep_ratio()]:
        if not inputs.any_size:
            raise ConfigError(
                f"views.visual.{name}.keep_ratio gives pictures of any shape, but this family reads squares of "
                f"{inputs.image_size} pixels; leave it out, or choose a family that reads any shape, such as soho"
            )


def _worker_is_gone(error: BaseException) -> bool:
    """Whether torch lost a worker, not whether a worker told of an error, which it says was `Caught` there."""
    lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and not str(error).startswith("Caught ")
    return lost or (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"))


def _as_is(loaded: T) -> T:
    return loaded


def _start_worker(worker: int) -> None:
    """A session of its own keeps a worker out of signals to the job's process group: its parent decides."""
    os.setsid()
    shield_worker(worker)
    _one_thread()


def _one_thread() -> None:
    """OpenCV without a thread pool of its own, for the cores belong to torch and to the workers, and without comments
    on broken pictures, which are named here.
    """
    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _pinned(loaded: Loaded) -> Loaded:
    """The same in page-locked memory, from which copies to the device run asynchronously."""
    return loaded if loaded.batch is None else loaded._replace(batch=loaded.batch.each(Tensor.pin_memory))


class _Ahead(Iterator[Loaded]):
    """The items of `source`, made by a thread that works up to `depth` items ahead until `close`."""

    def __init__(self, source: Iterator[Loaded], depth: int, pin: bool) -> None:
        self._made: queue.Queue[Loaded | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(source, pin), name="loader", daemon=True)
        self._thread.start()

    def _work(self, source: Iterator[Loaded], pin: bool) -> None:
        try:
            for item in source:
                self._put(_pinned(item) if pin else item)
                if self._stop.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(DataError(WORKER_GONE.format(error)) if _worker_is_gone(error) else error)

    def _put(self, item: Loaded | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __next__(self) -> Loaded:
        item = self._made.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Wait until the thread has finished the item it is at, and ended; not for ever, if a worker hangs."""
        self._stop.set()
        self._thread.join(PATIENCE)
