"""`data.*` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how many make a step."""

    # globs of tar shards; "embedded" = the drawn scenes; {source: globs} = several data sets, mixed by `weights`
    train: tuple[str, ...] | Mapping[str, str | tuple[str, ...]] | None = None
    val: tuple[str, ...] | None = None
    weights: Mapping[str, float] = field(
        default_factory=dict
    )  # {source: against the others}; none = one after its size
    mix: Literal["sample", "step"] = "sample"  # what weights share out; step: all samples of a step from one source
    shuffle: Literal["global", "windowed"] = (
        "global"  # windowed: whole shards by turns, for stores that are slow to seek
    )
    window: int = 20_000  # samples that are shuffled at a time, if windowed
    batch: int = 64  # samples per optimizer step over all ranks
    micro_batch: int | None = None  # samples per rank and forward pass; None = batch / ranks, no accumulation
    workers: int | None = None  # loader processes per rank; None = by machine
    bad_budget: float = 0.01  # share of the samples served that may be broken before the run ends; a crawl has 0.005
    bad_always: int = 100  # so many may be, whatever their share
