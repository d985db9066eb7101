"""Which positions of the endless stream each micro-batch of a rank takes."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vlscale.data.shuffle import Numbers
from vlscale.errors import ConfigError


class Batching(Protocol):
    """A pure function of (step, number): every worker of every rank finds any micro-batch without a message."""

    per_step: int  # micro-batches per rank and optimizer step

    def __call__(self, step: int, number: int) -> Numbers:
        """The positions of micro-batch `number` (from 0) of this rank in optimizer step `step` (from 1)."""
        ...


class Even:
    """As many samples in each: `micro_batch` of the step's `batch`, rank after rank."""

    def __init__(self, batch: int, micro_batch: int, rank: int, world: int) -> None:
        """ConfigError if `batch` is no multiple of micro_batch * world."""
        check_batch(batch, micro_batch, world)
        self._batch, self._micro_batch, self._rank, self._world = batch, micro_batch, rank, world
        self.per_step = batch // (micro_batch * world)

    def __call__(self, step: int, number: int) -> Numbers:
        """See `Batching`."""
        start = (step - 1) * self._batch + (number * self._world + self._rank) * self._micro_batch
        return np.arange(start, start + self._micro_batch)


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
