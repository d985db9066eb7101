"""WebDataset tar shards with random access: one scan of the headers, then reads of single samples.

A sample is the run of adjacent members that share a key, which is the member's name up to the first dot of
its last part; the rest of the name is the field (`jpg`, `0.jpg`, `json`). Members are returned as bytes;
nothing in a shard is ever unpickled or executed, and no name in one is used as a path.

A shard is a path, a URL (`https://`, `s3://`, ...), or `pipe:` and a command that prints one; it may be gzipped.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np

from vlscale.data.storage import index as index_file
from vlscale.data.storage.access import OTHER_PACKINGS, Access, Origin, Span
from vlscale.data.storage.index import Files, Head, Index
from vlscale.data.storage.stores import PIPE, StoreOptions, Stores, is_pattern, scheme, shown
from vlscale.data.storage.tar import TarError
from vlscale.errors import ConfigError, DataError, did_you_mean

MAX_MAPPED = 128  # indexes that a thread keeps mapped; each holds a descriptor
THREADS = 16  # that ask stores at once
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
Patterns = str | Path | Sequence[str | Path]
A = TypeVar("A")
B = TypeVar("B")


def cache_folder() -> Path:
    """Where indexes, fetched shards and the embedded data set are kept: `$VLSCALE_CACHE`, else `~/.cache/vlscale`."""
    chosen = os.environ.get("VLSCALE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "vlscale"


def expand(patterns: Patterns, options: StoreOptions | None = None) -> list[str]:
    """The shards that paths, URLs and globs of either name, in order; each glob's matches are sorted.

    Numeric braces (`x-{000..012}.tar`) name every number of the range. `options` say how stores are asked.

    Raises:
        DataError: a pattern matches nothing or names a folder, or one shard is named twice.
        ConfigError: a `pipe:` without leave, or a store of no kind we know.
    """
    given = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    if not given:
        raise DataError("no shards are named; write a path or glob of tars, such as 'shards/train-*.tar'")
    stores = Stores(options or StoreOptions())
    urls = [url for pattern in given for url in _expand_one(str(pattern), stores)]
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise DataError(f"shard {shown(url)} is named twice; name it once")
        seen.add(url)
    return urls


def _expand_one(pattern: str, stores: Stores) -> list[str]:
    range_ = _BRACES.search(pattern)
    if range_:
        first, last = range_.groups()
        numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        parts = (pattern[: range_.start()] + number + pattern[range_.end() :] for number in numbers)
        return [url for part in parts for url in _expand_one(part, stores)]
    if pattern.startswith(PIPE):
        if not stores.options.pipe:
            raise ConfigError(f"'{shown(pattern)}' runs a command; write data.pipe=true if you trust it")
        return [pattern]
    if scheme(pattern) == "file":
        pattern = pattern.partition("://")[2]
    if not scheme(pattern):
        return _expand_path(os.path.expanduser(pattern))
    try:
        urlsplit(pattern)
    except ValueError as error:
        raise ConfigError(f"'{shown(pattern)}' is no URL; write it as a browser takes it") from error
    if not is_pattern(pattern):
        return [pattern]
    found = stores.glob(pattern)
    if not found:
        raise DataError(f"no shard matches '{shown(pattern)}'; look at what the store holds")
    return found


def _expand_path(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        inside = os.path.join(pattern, "*.tar")
        raise DataError(f"'{pattern}' is a folder; write '{inside}' for the shards in it")
    if os.path.isfile(pattern):
        return [os.path.normpath(pattern)]
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"no shard matches '{pattern}'; {_nearest(Path(pattern))}")
    return [os.path.normpath(path) for path in found]


def _nearest(path: Path) -> str:
    """What there is instead of `path`: its deepest existing folder and the nearest name in it."""
    missing, folder = path.name, path.parent
    while not folder.is_dir():
        missing, folder = folder.name, folder.parent
    there = [entry.name for entry in folder.iterdir()]
    suggestion = did_you_mean(missing, there) if len(there) <= 10_000 else ""
    if not suggestion.startswith("; did"):
        some = ", ".join(sorted(there)[:3]) + (", ..." if len(there) > 3 else "")
        suggestion = f", which holds {some}" if there else ", which is empty"
    return f"the nearest existing folder is {folder.resolve()}{suggestion}"


def load_index(path: str | Path, cache: Path | None = None) -> Index:
    """The index of one shard, from the cache or by one scan of its headers; DataError if it cannot be read."""
    return Shards(path, cache).index(0)


def _scan(access: Access, origin: Origin) -> tuple[Head, bytes]:
    """Head and body of the index of one shard."""
    name = shown(origin.url)
    packed = access.is_packed(origin)
    try:
        with access.scanning(origin, packed) as (read, length):
            try:
                return index_file.scan(read, length, origin.stamp, packed)
            except TarError as error:
                start = read(0, min(6, length))
                if error.place == 0:
                    reason = f"{error.reason}; {_advice(start)}"
                    raise DataError(f"shard {name} is not a readable tar file ({reason})") from error
                raise DataError(
                    f"shard {name} is cut short or damaged at byte {error.place} ({error.reason}); {_advice(start)}"
                ) from error
    except ValueError as error:
        raise DataError(f"shard {name}: {error}") from error


def _advice(start: bytes) -> str:
    if start.startswith(OTHER_PACKINGS):
        return "it is compressed: unpack it, or pack it with gzip, which is read here"
    return "copy or make it again"


class _Members(NamedTuple):
    """The members of one sample, which lie in a row."""

    sample: int
    shard: int
    spans: dict[str, Span]  # by field

    def around(self) -> Span:
        """All of them in one."""
        first, last = min(self.spans.values()), max(self.spans.values())
        return first[0], sum(last) - first[0]


class Shards:
    """The samples of a list of shards, numbered 0 .. len-1 in the order of the list and of the tars.

    Safe to read from several threads and after a fork: every thread opens files of its own, and a read states
    its offset, so that processes which share a descriptor do not disturb one another. Can be pickled, in a few
    bytes per shard: indexes stay in files that all processes map.
    """

    def __init__(self, patterns: Patterns, cache: Path | None = None, options: StoreOptions | None = None) -> None:
        """Expand `patterns` (see `expand`) and index every shard; DataError if one cannot be read.

        Args:
            patterns: paths, URLs and globs.
            cache: folder of the indexes, by default `cache_folder()/index`.
            options: of stores.
        """
        options = options or StoreOptions()
        urls = expand(patterns, options)
        self._files = Files(cache or cache_folder() / "index")
        self._access = Access(options, cache_folder() / "shards")
        self._origins = _each(self._access.find, urls, any(map(scheme, urls)))
        self._access.choose(self._origins)
        self._local = threading.local()
        kept = [self._files.head(origin.place, origin.stamp) for origin in self._origins]
        missing = [shard for shard, head in enumerate(kept) if head is None]
        made = dict(zip(missing, _each(self._make, missing, True), strict=True))
        self.scanned = len(missing)  # shards whose index was absent, or that of another state
        heads = [head or made[shard] for shard, head in enumerate(kept)]
        self.paths = [shown(url) for url in urls]  # as they may be printed
        self.remote = any(scheme(url) or url.startswith(PIPE) for url in urls)  # whether one must be fetched
        self.bytes = sum(origin.stat.size for origin in self._origins)  # as they lie there
        self._packed = [head.packed for head in heads]
        self._starts: list[int] = np.cumsum([0, *(head.samples for head in heads)]).tolist()
        digest = hashlib.sha256()
        for path, head in zip(self.paths, heads, strict=True):
            digest.update(f"{os.path.basename(path)}\n".encode() + head.digest)
        self._fingerprint = digest.hexdigest()[:16]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def _make(self, shard: int) -> Head:
        """Scan a shard and keep its index."""
        origin = self._origins[shard]
        head, body = _scan(self._access, origin)
        self._files.save(origin.place, head, body)
        return head

    def index(self, shard: int) -> Index:
        """Where the members of the `shard`-th shard lie."""
        mapped: OrderedDict[int, Index] = self._local.__dict__.setdefault("mapped", OrderedDict())
        found = mapped.get(shard)
        if found is None:
            found = self._mapped(shard)
            if len(mapped) >= MAX_MAPPED:
                mapped.popitem(last=False)
            mapped[shard] = found
        mapped.move_to_end(shard)
        return found

    def _mapped(self, shard: int) -> Index:
        """From its file, which is made again where someone emptied the cache."""
        origin = self._origins[shard]
        found = self._files.open(origin.place, origin.stamp)
        if found is None:
            head, body = _scan(self._access, origin)
            self._files.save(origin.place, head, body)
            found = Index(head, body)
        if found.head.samples != self.start(shard + 1) - self.start(shard):
            raise DataError(f"shard {self.paths[shard]} changed after it was indexed; start anew")
        return found

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, i: int) -> tuple[int, int]:
        """(shard, row in the shard) of sample `i`."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def key(self, i: int) -> str:
        """The key of sample `i`."""
        shard, row = self._locate(i)
        return self.index(shard).keys[row]

    def shard(self, i: int) -> str:
        """The shard that sample `i` lies in, as it may be printed."""
        return self.paths[self._locate(i)[0]]

    def start(self, shard: int) -> int:
        """The number of the first sample of the `shard`-th shard; of shard `len(paths)`, `len(self)`."""
        return self._starts[shard]

    def fields(self, i: int) -> tuple[str, ...]:
        """The field names of sample `i`, in the order of the tar."""
        return tuple(self._members(i).spans)

    def sizes(self, i: int) -> dict[str, int]:
        """The size of each member of sample `i` in bytes, without reading any."""
        return {field: size for field, (_, size) in self._members(i).spans.items()}

    def empty_members(self, fields: Collection[str]) -> list[tuple[int, str]]:
        """(sample, field) of every member of these fields that has no bytes, in the order of the samples."""
        found: list[tuple[int, str]] = []
        for shard in range(len(self.paths)):
            index = self.index(shard)
            wanted = np.isin(index.field, [n for n, name in enumerate(index.fields) if name in fields])
            members = np.flatnonzero(wanted & (index.size == 0))
            rows = np.searchsorted(index.first, members, side="right") - 1
            names = (index.fields[field] for field in index.field[members])
            found += zip((self.start(shard) + rows).tolist(), names, strict=True)
        return found

    def read(self, i: int, only: Collection[str] | None = None) -> dict[str, bytes]:
        """The members of sample `i` as {field: bytes}; `only` these fields where given.

        DataError if the shard can no longer be read where its index says.
        """
        found = self._members(i)
        return self._read(found, {name: span for name, span in found.spans.items() if only is None or name in only})

    def head(self, i: int, field: str, size: int) -> bytes:
        """The first `size` bytes of a member of sample `i`, or all if it has fewer. Raises as `read`, and KeyError."""
        found = self._members(i)
        offset, whole = found.spans[field]
        return self._read(found, {field: (offset, min(size, whole))})[field]

    def prefetch(self, i: int) -> None:
        """Say that sample `i` will be read before long: its shard, if it lies in a store, is fetched meanwhile."""
        shard, _ = self._locate(i)
        self._access.prefetch(self._origins[shard], self._packed[shard])

    def _members(self, i: int) -> _Members:
        """Those of sample `i`; of the sample that was asked for last they are at hand."""
        last: _Members | None = self._local.__dict__.get("last")
        if last is not None and last.sample == i:
            return last
        shard, row = self._locate(i)
        self._local.last = found = _Members(i, shard, self.index(shard).spans(row))
        return found

    def _read(self, members: _Members, spans: Mapping[str, Span]) -> dict[str, bytes]:
        if not spans:
            return {}
        shard, around = members.shard, members.around() if self.remote else (0, 0)
        data = self._access.read(self._origins[shard], self._packed[shard], list(spans.values()), around)
        return dict(zip(spans, data, strict=True))

    def fingerprint(self) -> str:
        """16 hex digits that tell the shards' names, order, keys and member sizes, not their folder."""
        return self._fingerprint

    def index_names(self) -> list[str]:
        """The names of the files that hold the shards' indexes."""
        return [index_file.file_name(origin.place, origin.stamp) for origin in self._origins]

    def stamps(self) -> list[tuple[int, int]]:
        """Of each shard its size, and what changes with its content: a stale index or vocabulary is told by them."""
        return [origin.stamp for origin in self._origins]


def _each(make: Callable[[A], B], given: Sequence[A], threads: bool) -> list[B]:
    """`make` of each, in several threads where that saves waiting."""
    if not threads or len(given) < 2:
        return [make(each) for each in given]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(make, given))
