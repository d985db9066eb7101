"""`data.*` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how many make a step."""

    train: tuple[str, ...] | None = None  # globs of tar shards; "embedded" = the drawn scenes
    val: tuple[str, ...] | None = None
    batch: int = 64  # samples per optimizer step over all ranks
    micro_batch: int | None = None  # samples per rank and forward pass; None = batch / ranks, no accumulation
    workers: int | None = None  # loader processes per rank; None = by machine
