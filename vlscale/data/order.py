"""The order of the samples: a pure function of (seed, position), the same for any ranks, workers or restarts.

Positions number an endless stream. Epoch e holds the positions [e*n, (e+1)*n) of a data set of n samples, in
an order of its own; step s takes the positions [s*batch, (s+1)*batch), across epochs where they meet.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from vlscale.errors import DataError


class Order:
    """Which sample stands at a position: every sample once per epoch, in a seeded order."""

    def __init__(self, num_samples: int, seed: int) -> None:
        """`num_samples` >= 1 (else DataError), `seed` >= 0."""
        if num_samples < 1:
            raise DataError("the data set has no samples; data.train must name shards that hold some")
        self.num_samples = num_samples
        self.seed = seed
        self._current = (-1, np.empty(0, dtype=np.int64))  # an epoch and its permutation [n]

    def __call__(self, position: int) -> tuple[int, int]:
        """(epoch, index) of the sample at `position`; index is in [0, num_samples)."""
        epoch, place = divmod(position, self.num_samples)
        held, permutation = self._current
        if held != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            permutation = generator.permutation(self.num_samples)
            self._current = (epoch, permutation)
        return epoch, int(permutation[place])

    def index(self, position: int) -> int:
        """The sample at `position`, without its epoch."""
        return self(position)[1]


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
        self._state = self._bits.state

    def __call__(self, position: int, stream: str) -> np.random.Generator:
        """The generator at the start of its draws. It is one object: be done with it before the next call."""
        self._state["state"]["counter"][:] = (0, zlib.crc32(stream.encode()), position, 0)
        self._bits.state = self._state
        return self._generator
