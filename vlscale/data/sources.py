"""`data.train` and `data.val`: one data set, or several by name that are mixed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlscale.data.options import DataConfig
from vlscale.data.order import Order, Source
from vlscale.data.shards import Shards, expand
from vlscale.data.storage.stores import StoreOptions
from vlscale.errors import ConfigError, DataError, did_you_mean

Given = Sequence[str] | Mapping[str, str | Sequence[str]]  # globs, or {source: globs}
EMBEDDED = "embedded"  # the drawn scenes, in the place of a glob


def named(given: Given) -> dict[str, list[str]]:
    """{source: its globs}; what has no name is `data`."""
    if not isinstance(given, Mapping):
        return {"data": list(given)}
    return {name: [globs] if isinstance(globs, str) else list(globs) for name, globs in given.items()}


def open_sources(
    given: Given, drawn: Sequence[Path], cache: Path | None = None, options: StoreOptions | None = None
) -> tuple[Shards, tuple[Source, ...]]:
    """All shards as one row of samples, and which of them belong to which source.

    `drawn` are the shards that `embedded` stands for. DataError if a glob matches nothing or a shard cannot be read.
    """
    for word in (glob for globs in named(given).values() for glob in globs):
        if difflib.get_close_matches(word, [EMBEDDED]) and word != EMBEDDED and not Path(word).exists():
            raise DataError(f"no shard matches '{word}'{did_you_mean(word, [EMBEDDED])}")
    parts = {
        name: expand([path for glob in globs for path in (drawn if glob == EMBEDDED else [glob])], options)
        for name, globs in named(given).items()
    }
    shards = Shards([path for paths in parts.values() for path in paths], cache, options)
    sources, first = [], 0
    for name, paths in parts.items():
        last = first + len(paths)
        sources.append(Source(name, tuple(shards.start(number) for number in range(first, last + 1))))
        first = last
    return shards, tuple(sources)


def unused_weights(data: DataConfig) -> str:
    """A sentence if a recipe's weights find no names to go by."""
    if not data.weights or isinstance(data.train, Mapping):
        return ""
    shares = ", ".join(f"{name} {weight:g}" for name, weight in data.weights.items())
    first = next(iter(data.weights))
    return (
        f"data.weights ({shares}) and data.mix are not used, for data.train is one data set; to mix several, name "
        f"them: data.train=\"{{{first}: 'FOLDER/*.tar', ...}}\""
    )


def make_order(sources: Sequence[Source], data: DataConfig, seed: int) -> Order:
    """The order of the training samples that `data.*` asks for; weights are for sources that have names.

    Raises:
        ConfigError: weights and sources do not go together.
        DataError: a source has no samples.
    """
    window = data.window if data.shuffle == "windowed" else 0
    if not isinstance(data.train, Mapping):
        return Order(sources, seed, window=window)
    names = [source.name for source in sources]
    for name in data.weights:
        if name not in names:
            near = did_you_mean(name, names)
            raise ConfigError(f"data.weights.{name} is no source of data.train{near}; data.weights=... replaces all")
    missing = [name for name in names if name not in data.weights]
    if data.weights and missing:
        raise ConfigError(f"data.weights has no weight for '{missing[0]}'; write data.weights.{missing[0]}=1")
    if data.mix == "step" and not data.weights:
        raise ConfigError("data.mix=step draws one source per step by data.weights; write those, or data.mix=sample")
    weighted = [Source(source.name, source.starts, data.weights.get(source.name)) for source in sources]
    return Order(weighted, seed, window=window, mix=data.mix, batch=data.batch)
