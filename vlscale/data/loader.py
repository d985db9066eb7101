"""Micro-batches of a rank, in an order that ranks, workers, micro-batch size and restarts do not change."""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from multiprocessing.sharedctypes import RawArray
from typing import Any, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlscale.data.batches import Batching
from vlscale.data.lending import Lender, Lent
from vlscale.data.micro_batches import IDLE, MAX_BROKEN_IN_A_ROW, Loaded, MicroBatches, Preprocessing
from vlscale.data.order import Order, TaskOrder
from vlscale.data.samples import Bad, printable
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.errors import ConfigError, DataError
from vlscale.stop import shield_worker, worker_processes
from vlscale.types import Batch, Inputs

ORDER = 2  # rises when the same options give another order of samples, with which no run may go on
WORKER_GONE = (
    "a loader process of this rank is gone, killed perhaps for want of memory ({}); the same command goes on, "
    "with data.workers=0 or fewer if it happens again"
)
PATIENCE = 20.0  # seconds for the micro-batch that is being made when the loader is closed
T = TypeVar("T")


class _Numbered(Dataset[Loaded]):
    """Micro-batch number m of this rank, counted from the first step, as a function of m alone."""

    def __init__(self, make: MicroBatches, tasks: TaskOrder, batching: Batching) -> None:
        self.make = make
        self.tasks = tasks
        self.batching = batching

    def __getitem__(self, number: int) -> Loaded:
        before, within = divmod(number, self.batching.per_step)
        return self.make(self.batching(before + 1, within), self.tasks(before + 1))


class _Sending(Dataset[tuple[Loaded, Lent | None]]):
    """The same from a worker."""

    def __init__(self, batches: _Numbered, lender: Lender) -> None:
        self.batches = batches
        self.lender = lender

    def __getitem__(self, number: int) -> tuple[Loaded, Lent | None]:
        loaded = self.batches[number]
        lent = self.lender.lend(loaded.batch) if loaded.batch is not None else None
        return (loaded, None) if lent is None else (loaded._replace(batch=None), lent)


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
        ahead = max(2, -(-self._per_step // self._workers))
        in_use = -(-(3 * self._per_step + 1) // self._workers)  # of one worker: by `_Ahead`, this step and the last
        lender = Lender(self._workers, ahead + in_use + 1)
        sent: Iterable[tuple[Loaded, Lent | None]] = DataLoader(
            _Sending(self._batches, lender),
            batch_size=None,  # an item is a micro-batch already
            sampler=numbers,
            num_workers=self._workers,
            prefetch_factor=ahead,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            multiprocessing_context=worker_processes("vlscale.data.loader"),
        )
        return (loaded if lent is None else loaded._replace(batch=lender.take(lent)) for loaded, lent in sent)

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
