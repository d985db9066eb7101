"""The queue of keys from earlier steps (He et al. 2020, MoCo, section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """A ring of the newest `capacity` unit-length keys, equal on every rank; a new key replaces the oldest.

    Args:
        capacity: number of keys.
        width: E.
        start: `random` unit vectors that count as keys of no picture (ALBEF, MoCo), or `empty`.
        seed: of the random start, so that all ranks and all runs start alike.
    """

    keys: Tensor  # [capacity, E] fp32, unit length
    ids: Tensor  # [capacity] int64 pair ids; -1 = no picture
    entered: Tensor  # [capacity] int64, the optimizer step that pushed it; 0 = from the start
    pointer: Tensor  # [1] int64, where the next key goes
    filled: Tensor  # [1] int64, number of usable keys

    def __init__(self, capacity: int, width: int, start: Literal["random", "empty"] = "random", seed: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.full_from_start = start == "random"
        keys = torch.zeros(capacity, width, dtype=torch.float32)
        if self.full_from_start:
            generator = torch.Generator().manual_seed(seed)
            keys = F.normalize(torch.randn(capacity, width, generator=generator, dtype=torch.float32), dim=1)
        self.register_buffer("keys", keys)
        self.register_buffer("ids", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("entered", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("filled", torch.full((1,), capacity if self.full_from_start else 0))

    def valid(self) -> Tensor:
        """[capacity] bool, True = holds a key."""
        return torch.arange(self.capacity, device=self.keys.device) < self.filled

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor, step: int) -> None:
        """Put in the newest keys, in place; of more than `capacity` the last ones stay.

        Args:
            keys: [N, E], unit length, of all ranks in rank order.
            ids: [N] int64 pair ids.
            step: the optimizer step being made.
        """
        number = keys.shape[0]
        skipped = max(number - self.capacity, 0)
        offsets = torch.arange(skipped, number, device=self.keys.device)
        places = (self.pointer + offsets) % self.capacity
        self.keys.index_copy_(0, places, keys[skipped:].to(self.keys.dtype))
        self.ids.index_copy_(0, places, ids[skipped:])
        self.entered.index_fill_(0, places, step)
        self.pointer.add_(number).remainder_(self.capacity)
        self.filled.add_(number).clamp_(max=self.capacity)

    def metrics(self, step: int) -> dict[str, Tensor]:
        """`filled` (fraction of the capacity) and `age_steps` (mean age of the keys), [] fp32 each."""
        valid = self.valid()
        age = ((step - self.entered) * valid).sum() / valid.sum().clamp(min=1)
        return {"filled": self.filled[0].float() / self.capacity, "age_steps": age.float()}
