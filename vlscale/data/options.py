"""`data.*` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlscale.data.decode import MAX_PIXELS
from vlscale.data.storage.stores import PIPE, StoreOptions, scheme
from vlscale.errors import ConfigError


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
    # micro-batches of as many samples each; of the same cost, padding counted; or as UNITER's sampler fills them
    batching: Literal["count", "cost", "token_buckets"] = "count"
    # most words and regions of a micro-batch, padding counted: token_buckets needs it, cost takes it or micro_batch
    tokens: int | None = None
    pool: int = 64  # steps that samples are dealt to by length, if batching=cost; 1 = every step keeps its own
    shapes: int = 16  # runs of samples alike in shape that each of those steps is made of
    workers: int | None = None  # loader processes per rank; None = by machine
    cache: str | None = None  # folder of shards fetched from stores or unpacked; None = in the user's cache
    cache_gigabytes: float = 32.0  # 10^9 bytes that it may hold; 0 = none: single samples are read by ranges
    store_patience: float = 1800.0  # seconds that a store may be away before the run ends
    store_timeout: float = 30.0  # seconds without a byte after which a connection is given up and made anew
    pipe: bool = False  # whether a shard may be `pipe:` and a command that prints it
    max_pixels: int = MAX_PIXELS  # of a picture; a larger one is a broken sample, told from its header
    bad_budget: float = 0.01  # share of the samples served that may be broken before the run ends; a crawl has 0.005
    bad_always: int = 100  # so many may be, whatever their share

    def __post_init__(self) -> None:
        for name in ("tokens", "pool", "shapes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"data.{name} should be at least 1 (got {value})")
        for name in ("cache_gigabytes", "store_patience"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name} should be at least 0 (got {getattr(self, name):g})")
        if self.store_timeout <= 0:
            raise ConfigError(f"data.store_timeout should be above 0 seconds (got {self.store_timeout:g})")
        if self.tokens is not None and self.batching == "count":
            raise ConfigError("data.tokens needs batches of unequal numbers; write data.batching=cost, or leave it out")
        if self.tokens is None and self.batching == "token_buckets":
            raise ConfigError("data.batching=token_buckets fills a budget; write data.tokens=10240, as UNITER-base has")
        if self.micro_batch is None and self.batching == "token_buckets":
            raise ConfigError(
                "data.batching=token_buckets fills data.batch / data.micro_batch micro-batches a step; write "
                "data.micro_batch=N too, what a micro-batch has on average"
            )
        if self.tokens is not None and self.micro_batch is not None and self.batching == "cost":
            raise ConfigError("data.tokens and data.micro_batch both say how large a micro-batch is; leave out one")
        if self.mix == "step" and self.batching == "token_buckets":
            raise ConfigError(
                "data.mix=step keeps a step to one source, and token_buckets mixes steps; write data.mix=sample, or "
                "data.batching=cost"
            )

    def remote(self) -> bool:
        """Whether some shards come out of stores, or of commands."""
        urls = [*(self.val or ())]
        for globs in self.train.values() if isinstance(self.train, Mapping) else [self.train or ()]:
            urls += [globs] if isinstance(globs, str) else globs
        return any(url.startswith(PIPE) or scheme(url) for url in urls)

    def stores(self) -> StoreOptions:
        """How remote and compressed shards are read."""
        return StoreOptions(
            self.cache,
            self.cache_gigabytes,
            self.store_patience,
            self.store_timeout,
            self.pipe,
            windowed=self.shuffle == "windowed",
        )
