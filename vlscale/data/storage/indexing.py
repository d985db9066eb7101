"""The indexes of many shards, made by several processes before a run reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from vlscale.data import parallel
from vlscale.data.shards import Patterns, Shards, cache_folder, expand
from vlscale.data.storage.index import place_of
from vlscale.data.storage.stores import StoreOptions, shown
from vlscale.errors import DataError


class Indexed(NamedTuple):
    """What became of one shard."""

    shard: str
    samples: int
    was: Literal["kept", "new", "stale"]  # stale: one of another state of the shard was there, and is made anew
    fault: str = ""  # why there is none


def index(patterns: Patterns, processes: int = 1, stores: StoreOptions | None = None) -> Iterator[Indexed]:
    """Index each shard that has none, or whose size or time of change is not that of its index; in their order.

    What is left of other states of a shard that was indexed is removed. A shard that cannot be read does not stop the
    rest. `stores` tell how remote ones are read. DataError if a pattern matches nothing.
    """
    parallel.require_processes(processes)
    urls = expand(patterns, stores)
    older: dict[str, list[Path]] = {}
    for file in (cache_folder() / "index").glob("*.index"):
        older.setdefault(place_of(file.name), []).append(file)
    with closing(parallel.ordered(_Index(stores), iter(urls), processes, chunk=1)) as indexed:
        for url, made in zip(urls, tqdm(indexed, total=len(urls), unit="shard", disable=None), strict=True):
            if made.fault or not made.scanned:
                yield Indexed(shown(url), made.samples, "new" if made.fault else "kept", made.fault)
                continue
            stale = [file for file in older.get(place_of(made.name), []) if file.name != made.name]
            for file in stale:
                with suppress(OSError):  # another user's
                    file.unlink()
            yield Indexed(shown(url), made.samples, "stale" if stale else "new")


class _Made(NamedTuple):
    """An index that is there now."""

    name: str  # of its file
    samples: int
    scanned: bool
    fault: str = ""  # why there is none


@dataclass(frozen=True)
class _Index:
    """Indexes one shard."""

    stores: StoreOptions | None

    def __call__(self, url: str) -> _Made:
        try:
            shards = Shards([url], options=self.stores)
        except DataError as error:
            return _Made("", 0, False, str(error))
        return _Made(shards.index_names()[0], len(shards), shards.scanned > 0)
