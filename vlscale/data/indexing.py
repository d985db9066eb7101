"""The indexes of many shards, made by several processes before a run reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tqdm import tqdm

from vlscale.data import parallel
from vlscale.data.access import Origin
from vlscale.data.shards import Patterns, Shards, cache_folder, expand
from vlscale.data.stores import Stat, StoreOptions, shown
from vlscale.errors import DataError


class Indexed(NamedTuple):
    """What became of one shard."""

    shard: str
    samples: int
    was: Literal["kept", "new", "stale"]  # stale: one of another state of the shard was there, and is made anew
    fault: str = ""  # why there is none


def index(patterns: Patterns, processes: int = 1, stores: StoreOptions | None = None) -> Iterator[Indexed]:
    """Index each shard that has none, or whose size or time of change is not that of its index; in their order.

    A shard that cannot be read does not stop the rest. `stores` tell how remote ones are read. DataError if a pattern
    matches nothing.
    """
    parallel.require_processes(processes)
    urls = expand(patterns, stores)
    with closing(parallel.ordered(_Index(stores), iter(urls), processes, chunk=1)) as indexed:
        yield from tqdm(indexed, total=len(urls), unit="shard", disable=None)


@dataclass(frozen=True)
class _Index:
    """Indexes one shard."""

    stores: StoreOptions | None

    def __call__(self, url: str) -> Indexed:
        place = Origin.of(url, Stat(0, "")).place  # its size and state play no part in it
        file = cache_folder() / "index" / f"{place}.index"
        before = file.stat().st_mtime_ns if file.exists() else None
        try:
            samples = len(Shards([url], options=self.stores))
        except DataError as error:
            return Indexed(shown(url), 0, "new", str(error))
        if before is None or not file.exists():
            return Indexed(shown(url), samples, "new")
        return Indexed(shown(url), samples, "kept" if file.stat().st_mtime_ns == before else "stale")
