"""The order of the samples: a pure function of (seed, position), the same for any ranks, workers or restarts.

Positions number an endless stream; optimizer step s takes the positions [(s - 1) * batch, s * batch). Without
weights epoch e holds the positions [e * n, (e + 1) * n) of a data set of n samples, in an order of its own. With
weights the sources take turns in exact shares, and each goes through epochs of its own, every sample once in each.

Nothing is kept but a few numbers per epoch: any position of any epoch is found at once.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlscale.data.shuffle import ROUNDS, Numbers, shuffled
from vlscale.errors import ConfigError, DataError

TURNS = 4_096  # about how many turns of a cycle in which every source has its exact share
MOST_TURNS = 1 << 20  # of a cycle whose weights are no small whole numbers: shares are then exact to a millionth
KEPT = 64  # orders of epochs, windows or cycles that are held ready
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A part of the data set: shards that follow one another."""

    name: str
    starts: tuple[int, ...]  # the number of the first sample of each shard, then the end of the last
    weight: float | None = None  # against the others; None = as large as it is

    @property
    def first(self) -> int:
        """The number of its first sample."""
        return self.starts[0]

    @property
    def count(self) -> int:
        """How many samples it has."""
        return self.starts[-1] - self.starts[0]


class Order:
    """Which sample stands at a position."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        *,
        window: int = 0,
        mix: Literal["sample", "step"] = "sample",
        batch: int = 1,
    ) -> None:
        """`seed` >= 0; sources follow one another, and all or none have a weight.

        `window` 0 shuffles an epoch as a whole. Otherwise shards are drawn one after the other in a shuffled order, and
        within every `window` samples of that series the samples are shuffled: few shards are read at a time.
        `mix` says what the weights share out: samples, or whole steps of `batch` samples (UNITER).

        DataError if there are no samples; ConfigError for a weight that is not above 0.
        """
        self.sources = tuple(sources)
        self.num_samples = sum(source.count for source in sources)
        if empty := [source.name for source in sources if not source.count]:
            name = f"source '{empty[0]}' of data.train" if len(sources) > 1 else "the data set"
            raise DataError(f"{name} has no samples; data.train must name shards that hold some")
        self.seed = seed
        self.window = window
        self._batch = batch if mix == "step" else 1
        weighted = [source for source in sources if source.weight is not None]
        assert len(weighted) in (0, len(self.sources)), "all sources have a weight, or none"
        self._starts = [self.sources[0].starts[0]]
        for source in self.sources:
            self._starts.extend(source.starts[1:])
        self._turns = _turns({source.name: float(source.weight or 0) for source in weighted}) if weighted else None
        self._kept: OrderedDict[tuple[object, ...], object] = OrderedDict()

    def __call__(self, positions: Numbers | Sequence[int]) -> Numbers:
        """The numbers [N] of the samples at positions [N], each in [0, num_samples)."""
        places = np.asarray(positions, dtype=np.int64)
        out = np.empty_like(places)
        if self._turns is None:
            return self._of_source(0, self._starts, places)
        source, within = self._dealt(places)
        for number in np.unique(source).tolist():
            here = source == number
            out[here] = self._of_source(number, self.sources[number].starts, within[here])
        return out

    def epoch(self, position: int) -> int:
        """How often as many samples as there are have gone before `position`."""
        return position // self.num_samples

    def epochs(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """(source [N], how often that source was gone through before [N]) at positions; without weights all are one."""
        if self._turns is None:
            return np.zeros_like(positions), positions // self.num_samples
        source, within = self._dealt(positions)
        return source, within // np.array([each.count for each in self.sources])[source]

    def passes(self, position: int) -> dict[str, float]:
        """{source: how often it was gone through} in the positions before `position`."""
        if self._turns is None:
            return {source.name: position / self.num_samples for source in self.sources}
        taken = np.zeros(len(self.sources), dtype=np.int64)
        cycle, place = divmod(position // self._batch, int(self._turns.sum()))
        labels, _ = self._cycle(cycle)
        taken += cycle * self._turns + np.bincount(labels[:place], minlength=len(self.sources))
        taken *= self._batch
        taken[labels[place]] += position % self._batch
        return {source.name: int(count) / source.count for source, count in zip(self.sources, taken, strict=True)}

    def _dealt(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """(source, position in the source's own endless stream) of each."""
        assert self._turns is not None
        turns, rest = np.divmod(positions, self._batch)
        cycles, places = np.divmod(turns, int(self._turns.sum()))
        source, within = np.empty_like(positions), np.empty_like(positions)
        for cycle in np.unique(cycles).tolist():
            here = cycles == cycle
            labels, ranks = self._cycle(cycle)
            source[here] = labels[places[here]]
            within[here] = (cycle * self._turns[source[here]] + ranks[places[here]]) * self._batch + rest[here]
        return source, within

    def _cycle(self, cycle: int) -> tuple[Numbers, Numbers]:
        """(source, how many of that source came before it in the cycle) of each turn."""

        def make() -> tuple[Numbers, Numbers]:
            assert self._turns is not None
            labels = np.repeat(np.arange(len(self._turns)), self._turns)
            labels = np.random.default_rng([self.seed, _tag("turns"), cycle]).permutation(labels)
            ranks = np.empty_like(labels)
            for source, count in enumerate(self._turns.tolist()):
                ranks[labels == source] = np.arange(count)
            return labels, ranks

        return self._keep(("cycle", cycle), make)

    def _of_source(self, number: int, starts: Sequence[int], places: Numbers) -> Numbers:
        """The samples at places [N] of a source's own endless stream."""
        epochs, within = np.divmod(places, starts[-1] - starts[0])
        out = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = (self._windowed if self.window else self._whole)(number, starts, epoch, within[here])
        return out

    def _whole(self, number: int, starts: Sequence[int], epoch: int, places: Numbers) -> Numbers:
        return starts[0] + self._shuffled(places, starts[-1] - starts[0], (number, epoch))

    def _windowed(self, number: int, starts: Sequence[int], epoch: int, places: Numbers) -> Numbers:
        """Shards in a shuffled order, then the samples within each window."""

        def make() -> tuple[Numbers, Numbers]:
            shards = np.random.default_rng([self.seed, _tag("shards"), number, epoch]).permutation(len(starts) - 1)
            ends = np.cumsum(np.diff(starts)[shards])
            return shards, ends

        shards, ends = self._keep(("shards", number, epoch), make)
        count = starts[-1] - starts[0]
        windows, within = np.divmod(places, self.window)
        moved = np.empty_like(places)
        for window in np.unique(windows).tolist():
            here = windows == window
            begin = window * self.window
            size = min(self.window, count - begin)
            moved[here] = begin + self._shuffled(within[here], size, (number, epoch, window))
        shard = np.searchsorted(ends, moved, side="right")
        before = np.concatenate([[0], ends])[shard]
        numbers: Numbers = np.asarray(starts, dtype=np.int64)[shards[shard]] + moved - before
        return numbers

    def _shuffled(self, places: Numbers, size: int, which: tuple[int, ...]) -> Numbers:
        def make() -> NDArray[np.uint64]:
            words = [self.seed, _tag("samples"), *which]
            return np.random.SeedSequence(words).generate_state(ROUNDS, np.uint64).astype(np.uint64)

        return shuffled(places, size, self._keep(("keys", *which), make))

    def _keep(self, name: tuple[object, ...], make: Callable[[], T]) -> T:
        """What `make` gives, made once while it is in use."""
        if name in self._kept:
            self._kept.move_to_end(name)
        else:
            self._kept[name] = make()
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[name]  # type: ignore[return-value]


def _turns(weights: Mapping[str, float]) -> Numbers:
    """How many turns of a cycle each source has: in the weights' very ratio where that is of small whole numbers."""
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"data.weights.{name} should be above 0 (got {weight:g}); leave the source out instead")
    exact = [Fraction(repr(weight)) for weight in weights.values()]
    unit = math.lcm(*(each.denominator for each in exact))
    whole = [int(each * unit) for each in exact]
    divisor = math.gcd(*whole)
    whole = [each // divisor for each in whole]
    if sum(whole) > MOST_TURNS:  # to the nearest, the largest remainders first
        shares = [each * MOST_TURNS / sum(whole) for each in whole]
        whole = [max(1, int(share)) for share in shares]
        order = sorted(range(len(whole)), key=lambda source: int(shares[source]) - shares[source])
        for source in order[: max(0, MOST_TURNS - sum(whole))]:
            whole[source] += 1
    return np.array(whole, dtype=np.int64) * max(1, round(TURNS / sum(whole)))


def _tag(purpose: str) -> int:
    return zlib.crc32(purpose.encode())


class TaskOrder:
    """Which task a step trains, drawn by shares from (seed, step): the same everywhere without a message."""

    def __init__(self, shares: Mapping[str, float], seed: int) -> None:
        """{task: chance against the others}, all above 0."""
        self._names = list(shares)
        chances = np.array(list(shares.values()), dtype=np.float64)
        self._chances = chances / chances.sum()
        self._seed = seed

    def __call__(self, step: int) -> str:
        """The task of optimizer step `step`, from 1."""
        if len(self._names) == 1:
            return self._names[0]
        return self._names[int(np.random.default_rng([self._seed, step]).choice(len(self._names), p=self._chances))]


class Draws:
    """The random draws of each sample, a function of (seed, position, stream) alone.

    The position of the endless stream determines the epoch; a stream is one purpose, such as `text.masked`.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._bits)
        start: Any = self._bits.state
        self._counter = {"key": start["state"]["key"].tolist()}  # lists: numpy reads them in a third of the time
        self._state: Any = {**start, "state": self._counter, "buffer": [0] * 4}

    def __call__(self, position: int, stream: str, attempt: int = 0) -> np.random.Generator:
        """The generator at the start of its draws. It is one object: be done with it before the next call.

        Every `attempt` at a position, where the ones before failed, has draws of its own.
        """
        if attempt:
            stream = f"{stream}/{attempt}"
        self._counter["counter"] = [0, zlib.crc32(stream.encode()), position, 0]
        self._bits.state = self._state
        return self._generator
