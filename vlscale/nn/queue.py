"""The queue of keys from earlier steps (He et al. 2020, MoCo, section 3.2), whole on every rank or one part on each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.nn import contrast
from vlscale.types import DTYPES

DRAWN = 4096  # rows that the random start draws at a time, so that no rank needs room for all


@dataclass(frozen=True)
class QueueOptions:
    """What an objective that contrasts with a queue lets one choose."""

    queue: int = 65536  # keys of earlier steps; 0 = none (ALBEF configs/Pretrain.yaml: queue_size; MoCo has as many)
    queue_start: Literal["random", "empty"] = "random"
    queue_store: Literal["replicated", "sharded"] = "replicated"  # whole on every rank, or 1/ranks on each
    queue_dtype: Literal["fp32", "bf16"] = "fp32"  # in memory and on the wire
    queue_push: Literal["step", "micro_batch"] = "step"  # when new keys enter; authors who accumulate: micro_batch


class KeyQueue(nn.Module):
    """A ring of the newest keys; a new key replaces the oldest. The same on every rank, or sharded over them.

    Place p of the ring lies on rank p mod W when sharded, so that a ring that is filling up weighs the same
    on all ranks.

    Args:
        options: capacity (`queue`) and the other choices.
        width: E.
        seed: of the random start, so that all ranks and all runs start alike.

    Raises:
        ValueError: a sharded queue whose capacity is not a multiple of the number of ranks.
    """

    RINGS = ("keys", "ids", "entered")  # the buffers that have a row for every place

    keys: Tensor  # [places, E] unit length; places = capacity, or capacity / W when sharded
    ids: Tensor  # [places] int64 pair ids; -1 = of no known picture
    entered: Tensor  # [places] int64, the optimizer step that pushed it; 0 = from the start
    pointer: Tensor  # [1] int64, where the next key goes in the ring
    filled: Tensor  # [1] int64, number of usable keys of the whole ring

    def __init__(self, options: QueueOptions, width: int, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.capacity = options.queue
        self.sharded = options.queue_store == "sharded" and distributed.world_size() > 1
        self._parts = distributed.world_size() if self.sharded else 1
        self._own = distributed.rank() if self.sharded else 0
        if self.capacity % self._parts:
            raise ValueError(
                f"queue={self.capacity} cannot be sharded over {self._parts} ranks; write a multiple of {self._parts}"
            )
        places = self.capacity // self._parts
        self.full_from_start = options.queue_start == "random"
        self.register_buffer("keys", torch.zeros(places, width, dtype=DTYPES[options.queue_dtype]))
        self.register_buffer("ids", torch.full((places,), -1, dtype=torch.int64))
        self.register_buffer("entered", torch.zeros(places, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("filled", torch.full((1,), self.capacity if self.full_from_start else 0))
        self._replaced: list[tuple[Tensor, ...]] = []  # by keys that entered within the step being made
        if self.full_from_start:
            self._draw(width, seed)

    def _draw(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for first in range(0, self.capacity, DRAWN):
            rows = min(DRAWN, self.capacity - first)
            drawn = F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float32), dim=1)
            own = torch.arange((self._own - first) % self._parts, rows, self._parts)
            self.keys[(first + own) // self._parts] = drawn[own].to(self.keys.dtype)

    def valid(self) -> Tensor:
        """[places] bool, True = holds a key."""
        places = torch.arange(len(self.keys), device=self.keys.device)
        return places * self._parts + self._own < self.filled

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor | None, step: int) -> None:
        """Put in the newest keys, in place; of more than `capacity` the last ones stay.

        Args:
            keys: [N, E], unit length, of the whole step in global order, the same on every rank.
            ids: [N] int64 pair ids; None = keys of no known picture.
            step: the optimizer step being made.
        """
        number = keys.shape[0]
        ids = ids if ids is not None else torch.full((number,), -1, dtype=torch.int64, device=keys.device)
        offsets = torch.arange(max(number - self.capacity, 0), number, device=self.keys.device)
        if self.sharded:
            first = (self._own - (self.pointer + offsets[0])) % self._parts
            mine = first + torch.arange(0, len(offsets), self._parts, device=self.keys.device)
            # the last turn may have no key for this rank: then the one before is written twice
            mine = torch.where(mine < len(offsets), mine, (mine - self._parts).clamp(min=0))
            if len(offsets) < self._parts:  # perhaps no key at all for this rank
                return self._push_few(keys, ids, offsets, step)
            offsets = offsets[mine]
        self._write((self.pointer + offsets) % self.capacity // self._parts, keys[offsets], ids[offsets], step)
        self._advance(number)
        return None

    def _push_few(self, keys: Tensor, ids: Tensor, offsets: Tensor, step: int) -> None:
        mine = offsets[(self.pointer + offsets) % self._parts == self._own]
        self._write((self.pointer + mine) % self.capacity // self._parts, keys[mine], ids[mine], step)
        self._advance(len(keys))

    def _write(self, places: Tensor, keys: Tensor, ids: Tensor, step: int) -> None:
        if self.options.queue_push == "micro_batch":  # before it is known whether the step is skipped
            ring = (self.keys[places], self.ids[places], self.entered[places])
            self._replaced.append((places, *ring, self.pointer.clone(), self.filled.clone()))
        self.keys.index_copy_(0, places, keys.to(self.keys.dtype))
        self.ids.index_copy_(0, places, ids)
        self.entered.index_fill_(0, places, step)

    def _advance(self, number: int) -> None:
        self.pointer.add_(number).remainder_(self.capacity)
        self.filled.add_(number).clamp_(max=self.capacity)

    def settle(self, applied: bool) -> None:
        """The step being made is over; unless it was applied, what entered within it leaves again."""
        for places, keys, ids, entered, pointer, filled in [] if applied else reversed(self._replaced):
            self.keys[places], self.ids[places], self.entered[places] = keys, ids, entered
            self.pointer.copy_(pointer)
            self.filled.copy_(filled)
        self._replaced.clear()

    def log_sum_exp(self, queries: Tensor, temperature: Tensor, apart: Tensor | None = None) -> Tensor:
        """log of the sum over all keys of exp(query . key / temperature), [N], with gradient.

        Sharded: the queries of all ranks meet this rank's part, and the parts are joined; every rank gives as
        many rows.

        Args:
            queries: [N, E] fp32.
            temperature: [1] fp32.
            apart: [N] int64 pair ids whose keys are left out.
        """
        if not self.sharded:
            return self._own_log_sum_exp(queries, temperature, apart)
        everyone = distributed.gather([queries] if apart is None else [queries, apart])
        partial = self._own_log_sum_exp(everyone[0], temperature, None if apart is None else everyone[1])
        return self._rows(distributed.log_sum_exp_over_ranks(partial), len(queries))

    def _own_log_sum_exp(self, queries: Tensor, temperature: Tensor, apart: Tensor | None) -> Tensor:
        pairs = None if apart is None else (apart, self.ids)
        return contrast.log_sum_exp(queries, self.keys, temperature, self._mask(), pairs)[0]

    @torch.no_grad()
    def soft_keys(self, teachers: Tensor, temperature: Tensor, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(softmax(teachers . keys / temperature) . keys [N, E], its log-sum-exp [N]); see `contrast.soft_keys`."""
        if not self.sharded:
            pairs = None if apart is None else (apart, self.ids)
            return contrast.soft_keys(teachers, self.keys, temperature, self._mask(), pairs)
        everyone = distributed.gather([teachers] if apart is None else [teachers, apart])
        pairs = None if apart is None else (everyone[1], self.ids)
        mean, partial = contrast.soft_keys(everyone[0], self.keys, temperature, self._mask(), pairs)
        whole = distributed.log_sum_exp_over_ranks(partial)
        mean = distributed.sum_scatter(mean * (partial - whole).exp()[:, None])
        return mean, self._rows(whole, len(teachers))

    def sum_of_id(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the keys with each row's pair id [N, E], how many they are [N]); no gradient."""
        if not self.sharded:
            return contrast.sum_of_id(ids, self.keys, self.ids)
        (everyone,) = distributed.gather([ids])
        total, count = contrast.sum_of_id(everyone, self.keys, self.ids)
        return distributed.sum_scatter(total), distributed.sum_scatter(count)

    def parts(self) -> dict[str, Tensor]:
        """The buffers that differ from rank to rank; none unless sharded."""
        return {name: self.get_buffer(name) for name in self.RINGS} if self.sharded else {}

    @torch.no_grad()
    def take(self, name: str, rows: Tensor, part: int, parts: int) -> None:
        """Put in what belongs here of another split of the ring.

        Args:
            name: one of `RINGS`.
            rows: [capacity / parts, ...], the buffer as it was on rank `part` of `parts`.
        """
        places = torch.arange(len(rows)) * parts + part
        mine = places % self._parts == self._own
        buffer = self.get_buffer(name)
        buffer[places[mine].to(buffer.device) // self._parts] = rows[mine].to(buffer)

    def digest(self) -> str:
        """Of the buffers that are the same on every rank."""
        apart = self.parts()
        digest = hashlib.blake2b(digest_size=8)
        for name, buffer in self.named_buffers():
            if name not in apart:
                digest.update(buffer.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _mask(self) -> Tensor | None:
        return None if self.full_from_start else self.valid()

    def _rows(self, everyone: Tensor, number: int) -> Tensor:
        return everyone.narrow(0, distributed.rank() * number, number)

    def metrics(self, step: int) -> dict[str, Tensor]:
        """`filled` (fraction of the capacity) and `age_steps` (mean age of the keys here), [] fp32 each."""
        valid = self.valid()
        age = ((step - self.entered) * valid).sum() / valid.sum().clamp(min=1)
        return {"filled": self.filled[0].float() / self.capacity, "age_steps": age.float()}
