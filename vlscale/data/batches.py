"""Which positions of the endless stream each micro-batch of a rank takes."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlscale.data.balance import cut, deal
from vlscale.data.lengths import Lengths, Shapes
from vlscale.data.options import DataConfig
from vlscale.data.order import TaskOrder
from vlscale.data.shuffle import Numbers
from vlscale.errors import ConfigError

DEAL, BUCKETS = 1, 2  # purposes of draws
LOOKED_AT = 16  # steps that `fewest` tries
BUCKET = 8_192  # samples (ChenRocks/UNITER, data/sampler.py and pretrain.py, as the next)
MULTIPLE = 8
SPECIAL = 2  # [CLS] and [SEP], which the authors do not count (data/data.py)
BUCKETS_KEPT = 4  # whose batches are held ready: a step reaches into few


class Batching(Protocol):
    """A pure function of (step, number): every worker of every rank finds any micro-batch without a message."""

    per_step: int  # micro-batches per rank and optimizer step

    def __call__(self, step: int, number: int) -> Numbers:
        """The positions of micro-batch `number` (from 0) of this rank in optimizer step `step` (from 1)."""
        ...

    def served(self, step: int) -> int:
        """How many positions of the stream are used up after `step` (from 0), those that were dropped among them."""
        ...


@dataclass(frozen=True)
class Spread:
    """Where the micro-batches of a step go: to one rank after the other, then to the next micro-step."""

    per_step: int  # micro-batches per rank
    rank: int
    world: int
    seed: int

    @property
    def of_all(self) -> int:
        """Micro-batches of all ranks."""
        return self.per_step * self.world

    def place(self, number: int) -> int:
        """Which of all of them is micro-batch `number` of this rank."""
        return number * self.world + self.rank


class Even:
    """As many samples in each: `micro_batch` of the step's `batch`, rank after rank."""

    def __init__(self, batch: int, micro_batch: int, rank: int, world: int) -> None:
        """`batch` is a multiple of micro_batch * world: `ds_config.accumulation_steps` sees to it."""
        assert batch % (micro_batch * world) == 0, "a step divides into micro-batches"
        self._batch, self._micro_batch, self._rank, self._world = batch, micro_batch, rank, world
        self.per_step = batch // (micro_batch * world)

    def __call__(self, step: int, number: int) -> Numbers:
        """See `Batching`."""
        start = (step - 1) * self._batch + (number * self._world + self._rank) * self._micro_batch
        return np.arange(start, start + self._micro_batch)

    def served(self, step: int) -> int:
        """See `Batching`."""
        return step * self._batch


class Balanced:
    """As equal a cost in each as can be: `data.batching=cost`.

    The positions of `pool` steps are dealt to those steps so that each step has samples alike in shape from every
    range of lengths (`balance.deal`); with a pool of 1 a step keeps the positions that it has anyhow. Which samples
    a step has depends on neither ranks nor micro-batches: those only cut it (`balance.cut`).
    """

    def __init__(
        self,
        shapes: Shapes,
        tasks: TaskOrder,
        spread: Spread,
        *,
        batch: int,
        pool: int,
        runs: int,
    ) -> None:
        """`batch` samples a step, in `runs` runs of samples alike in shape; `tasks` tells what a step pairs.

        Steps are mixed only if they have the same task and the same sources, each in the same of its epochs
        (`Order.epochs`): a sample and its copy of the next epoch are alike in shape, and would meet in one step.
        """
        self.per_step = spread.per_step
        self._shapes, self._tasks, self._spread = shapes, tasks, spread
        self._batch, self._pool, self._runs = batch, pool, runs
        self._dealt = (-1, np.empty((0, 0), dtype=np.int64))  # a pool and the positions [pool, batch] of its steps
        self._cut: tuple[int, list[Numbers]] = (-1, [])  # a step and its micro-batches

    def __call__(self, step: int, number: int) -> Numbers:
        """See `Batching`."""
        if self._cut[0] != step:
            self._cut = (step, self.micro_batches(step, self._spread.of_all))
        return self._cut[1][self._spread.place(number)]

    def served(self, step: int) -> int:
        """See `Batching`."""
        return step * self._batch

    def micro_batches(self, step: int, number: int) -> list[Numbers]:
        """The positions of each, the dearest first, if the step is cut into `number`."""
        positions = self.positions(step)
        return [positions[each] for each in cut(*self._shapes(positions, self._tasks(step)), number)]

    def positions(self, step: int) -> Numbers:
        """The positions [batch] of a step's samples."""
        pool, place = divmod(step - 1, self._pool)
        if self._dealt[0] != pool:
            size = self._pool * self._batch
            steps = np.arange(pool * size, (pool + 1) * size).reshape(self._pool, self._batch)
            generator = np.random.default_rng([self._spread.seed, DEAL, pool])
            for group, task in self._alike(pool, steps) if self._pool > 1 else []:
                positions = steps[group].ravel()
                dealt = deal(*self._shapes(positions, task), len(group), self._runs, generator)
                steps[group] = positions[dealt]
            self._dealt = (pool, steps)
        positions_of_step: Numbers = self._dealt[1][place]
        return positions_of_step

    def _alike(self, pool: int, steps: Numbers) -> list[tuple[list[int], str]]:
        """Of the steps [S, batch] of a pool, those of one task and the same epochs of the same sources, with the task.

        A step that is in two epochs of a source is in no group.
        """
        found: dict[tuple[str, bytes], list[int]] = {}
        for number, (sources, epochs) in enumerate(zip(*self._shapes.order.epochs(steps), strict=True)):
            pairs = np.unique(np.stack([sources, epochs]), axis=1)
            if len(np.unique(pairs[0])) == pairs.shape[1]:
                task = self._tasks(pool * self._pool + number + 1)
                found.setdefault((task, pairs.tobytes()), []).append(number)
        return [(group, task) for (task, _), group in found.items()]

    def longest(self, step: int) -> int:
        """Words and regions of the longest sample of a step."""
        words, seen = self._shapes(self.positions(step), self._tasks(step))
        return int((words + seen).max())

    def greatest_cost(self, step: int, number: int) -> int:
        """Padded words and regions of the dearest micro-batch, if the step is cut into `number`."""
        dearest = self.micro_batches(step, number)[0]
        words, seen = self._shapes(dearest, self._tasks(step))
        return len(dearest) * int(words.max() + seen.max())


def make_batching(
    data: DataConfig,
    spread: Spread,
    tasks: TaskOrder,
    lengths: Callable[[], Lengths],
    shapes: Callable[[Lengths], Shapes],
) -> Batching:
    """The batching that `data.*` asks for; `lengths` and `shapes` of the training samples are made where it needs them.

    ConfigError if a step does not divide into micro-batches, or `data.tokens` is too small.
    """
    if data.batching == "count":
        return Even(data.batch, data.batch // spread.of_all, spread.rank, spread.world)
    measured = lengths()
    if data.batching == "cost":
        sizes = {"batch": data.batch, "pool": data.pool, "runs": data.shapes}
        return Balanced(shapes(measured), tasks, spread, **sizes)
    assert data.tokens is not None, "DataConfig asks for it"
    return TokenBuckets(shapes(measured), spread, data.tokens, measured.longest() - SPECIAL)


def fewest(balanced: Batching, batch: int, world: int, tokens: int, steps: int = LOOKED_AT) -> int:
    """The fewest micro-batches per rank none of which has more than `tokens` padded tokens in the first `steps` steps.

    The number divides batch / world, as DeepSpeed wants it. Later steps are as long but for chance (`balance.deal`):
    one that is a little dearer is trained as it is. ConfigError if even single samples are too long.
    """
    share = batch // world
    assert isinstance(balanced, Balanced), "the others are told how many there are"
    longest = max(balanced.longest(step) for step in range(1, steps + 1))
    if longest > tokens:
        raise ConfigError(f"data.tokens={tokens} is less than one sample takes; write at least data.tokens={longest}")
    for number in [each for each in range(1, share) if share % each == 0]:
        if all(balanced.greatest_cost(step, number * world) <= tokens for step in range(1, steps + 1)):
            return number
    return share


class TokenBuckets:
    """UNITER's own: `data.batching=token_buckets`.

    Of the stream, `BUCKET` samples at a time are sorted by length and cut into batches within a budget of tokens; what
    is left of a bucket is dropped. A bucket's batches are shuffled (the authors shuffle those of an epoch) and go to
    ranks, then micro-steps, in turn. How many samples a step has is left to chance.

    A bucket must be sorted to know how many batches it has, so the first step after a resume takes time: half a
    second for each million samples seen before it.
    """

    def __init__(self, shapes: Shapes, spread: Spread, tokens: int, longest: int) -> None:
        """At most `tokens` in a micro-batch; `longest` is the longest sample's length. Neither counts [CLS] and [SEP].

        ConfigError if `MULTIPLE` samples of that length exceed it, or a bucket does not.
        """
        if tokens >= longest * BUCKET:
            raise ConfigError(
                f"data.tokens={tokens} takes a whole bucket of {BUCKET} samples, whose last batch is left out; write "
                f"less than {longest * BUCKET}, or data.batching=cost"
            )
        if longest * MULTIPLE > tokens:
            raise ConfigError(
                f"data.tokens={tokens} is less than {MULTIPLE} samples of {longest} words and regions take, the "
                f"longest of data.train; write at least data.tokens={longest * MULTIPLE}"
            )
        self.per_step = spread.per_step
        self._shapes, self._spread, self._tokens = shapes, spread, tokens
        self._ends: list[int] = []  # how many batches all buckets up to one have
        self._kept: OrderedDict[int, list[Numbers]] = OrderedDict()  # positions of the batches of some buckets

    def __call__(self, step: int, number: int) -> Numbers:
        """See `Batching`."""
        bucket, place = self._find((step - 1) * self._spread.of_all + self._spread.place(number))
        return self._bucket(bucket)[place]

    def served(self, step: int) -> int:
        """See `Batching`; of the bucket that it is in, the share of its batches."""
        bucket, place = self._find(step * self._spread.of_all)
        return bucket * BUCKET + place * BUCKET // len(self._bucket(bucket))

    def _find(self, batch: int) -> tuple[int, int]:
        """(bucket, place in it) of a batch, numbered from the start of the stream."""
        while not self._ends or self._ends[-1] <= batch:
            self._ends.append((self._ends or [0])[-1] + len(self._bucket(len(self._ends))))
        bucket = bisect_right(self._ends, batch)
        return bucket, batch - (self._ends[bucket - 1] if bucket else 0)

    def _bucket(self, number: int) -> list[Numbers]:
        if number not in self._kept:
            positions = np.arange(number * BUCKET, (number + 1) * BUCKET)
            words, seen = self._shapes.own(positions)
            batches = bucket_batches(words - SPECIAL + seen, self._tokens, MULTIPLE, keep_last=False)
            shuffle = np.random.default_rng([self._spread.seed, BUCKETS, number]).permutation(len(batches))
            self._kept[number] = [positions[batches[each]] for each in shuffle]
            if len(self._kept) > BUCKETS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[number]


def bucket_batches(lengths: Numbers, tokens: int, multiple: int, keep_last: bool) -> list[Numbers]:
    """A bucket's samples, longest first, in batches of a multiple of `multiple` (ChenRocks/UNITER, data/sampler.py).

    The longest of a batch is taken to be the bucket's longest, as there: so all batches have the same number of
    samples, and only their last may have another. `keep_last`: or be left out.
    """
    order = np.argsort(-lengths, kind="stable")
    size = tokens // (int(lengths.max()) * multiple) * multiple
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return batches if keep_last else batches[:-1]
