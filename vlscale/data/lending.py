"""Micro-batches from loader workers to their rank, through shared memory that is used again and again.

torch makes new shared memory for every tensor that a worker sends. Its fresh pages cost ten times what the copy does,
and as much processor time as half of the decoding. Here a worker keeps a few pieces, writes a micro-batch into one that
is free, and has it back once the rank has dropped the last of that micro-batch's tensors.
"""

from __future__ import annotations

import weakref
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vlscale.types import Batch

ALIGNED = 64  # bytes to whose multiples tensors are placed
ROOM = 1.25  # a piece of memory against the first micro-batch in it: others may be longer


class Place(NamedTuple):
    """Where a tensor lies in a piece of memory."""

    offset: int  # in bytes
    size: tuple[int, ...]
    stride: tuple[int, ...]  # in numbers
    dtype: torch.dtype

    def within(self, memory: Tensor) -> Tensor:
        """The tensor, of a uint8 `memory` [N]."""
        count = 1 + sum((size - 1) * step for size, step in zip(self.size, self.stride, strict=True))
        bytes_ = count * self.dtype.itemsize if 0 not in self.size else 0
        part = memory[self.offset : self.offset + bytes_].view(self.dtype)
        return part.as_strided(self.size, self.stride, part.storage_offset())


class Lent(NamedTuple):
    """A micro-batch whose numbers lie in a piece of memory."""

    batch: Batch  # its tensors are empty
    places: list[Place]  # theirs, in the order of `Batch.each`
    piece: int
    memory: Tensor | None  # the piece itself, uint8 [N], when it is new


class Lender:
    """The pieces of memory of a rank's loader workers, each used by one of them alone."""

    def __init__(self, workers: int, pieces: int) -> None:
        """`pieces` for each of `workers`: as many of its micro-batches may be under way or in use at once."""
        self._pieces = pieces
        self._taken = RawArray("b", workers * pieces)  # in memory that all processes share
        self._memory: dict[int, Tensor] = {}  # a worker's own; in the rank, all of them

    def lend(self, batch: Batch) -> Lent | None:
        """A worker's micro-batch in one of its pieces of memory; None if all are in use."""
        worker = get_worker_info()
        assert worker is not None, "only workers lend"
        own = range(worker.id * self._pieces, (worker.id + 1) * self._pieces)
        piece = next((piece for piece in own if not self._taken[piece]), None)
        if piece is None:
            return None
        tensors: list[Tensor] = []

        def listed(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return torch.empty(0)

        empty, places, needed = batch.each(listed), [], 0
        for tensor in tensors:
            stride = torch.empty_like(tensor, device="meta").stride()  # its own if it has no gaps
            places.append(Place(needed, tuple(tensor.shape), stride, tensor.dtype))
            needed += -(-tensor.nbytes // ALIGNED) * ALIGNED
        memory = self._memory.get(piece)
        if fresh := memory is None or len(memory) < needed:
            memory = torch.empty(int(needed * ROOM), dtype=torch.uint8)
            self._memory[piece] = memory.share_memory_()  # type: ignore[no-untyped-call]
        for place, tensor in zip(places, tensors, strict=True):
            place.within(memory).copy_(tensor)
        self._taken[piece] = 1
        return Lent(empty, places, piece, memory if fresh else None)

    def take(self, lent: Lent) -> Batch:
        """The micro-batch, in the rank. Its worker has the memory back once nobody has any of its tensors."""
        if lent.memory is not None:
            self._memory[lent.piece] = lent.memory
        in_use = memoryview(self._memory[lent.piece].numpy())  # type: ignore[arg-type]
        # the tensors that are made of it keep it
        weakref.finalize(in_use, self._give_back, lent.piece).atexit = False
        memory, places = torch.frombuffer(in_use, dtype=torch.uint8), iter(lent.places)
        return lent.batch.each(lambda _: next(places).within(memory))

    def _give_back(self, piece: int) -> None:
        self._taken[piece] = 0
