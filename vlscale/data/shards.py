"""WebDataset tar shards with random access: one scan of the headers, then ranged reads.

A sample is the run of adjacent members that share a key, which is the member's name up to the first dot of
its last part; the rest of the name is the field (`jpg`, `0.jpg`, `json`). Members are returned as bytes;
nothing in a shard is ever unpickled or executed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
import tempfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from vlscale.errors import DataError, did_you_mean

MAX_OPEN_FILES = 128  # shards kept open per thread; far below the usual limit of 1,024 descriptors
INDEX_VERSION = 1
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_META = re.compile(r"\.|__.*__(\.|$)")  # starts of names that belong to no sample: hidden, WebDataset's own


def cache_folder() -> Path:
    """Where indexes and the embedded data set are kept: `$VLSCALE_CACHE`, else `~/.cache/vlscale`."""
    chosen = os.environ.get("VLSCALE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "vlscale"


def expand(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """The shards that paths and globs name, in order; each glob's matches are sorted.

    Numeric braces (`x-{000..012}.tar`) name every number of the range. DataError if a pattern matches nothing
    or names a folder, or if one shard is named twice.
    """
    given = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    if not given:
        raise DataError("no shards are named; write a path or glob of tars, such as 'shards/train-*.tar'")
    paths = [path for pattern in given for path in _expand_one(os.path.expanduser(str(pattern)))]
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"shard {path} is named twice; name it once")
        seen.add(path)
    return paths


def _expand_one(pattern: str) -> list[Path]:
    range_ = _BRACES.search(pattern)
    if range_:
        first, last = range_.groups()
        numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        parts = (pattern[: range_.start()] + number + pattern[range_.end() :] for number in numbers)
        return [path for part in parts for path in _expand_one(part)]
    if os.path.isdir(pattern):
        inside = os.path.join(pattern, "*.tar")
        raise DataError(f"'{pattern}' is a folder; write '{inside}' for the shards in it")
    if os.path.isfile(pattern):
        return [Path(pattern)]
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"no shard matches '{pattern}'; {_nearest(Path(pattern))}")
    return [Path(path) for path in found]


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


class Index(NamedTuple):
    """Where the members of one shard lie. S samples, M members."""

    keys: list[str]  # [S]
    first: NDArray[np.int64]  # [S + 1], sample i has the members [first[i], first[i + 1])
    fields: list[str]  # the distinct field names
    field: NDArray[np.int32]  # [M], into `fields`
    offset: NDArray[np.int64]  # [M] bytes
    size: NDArray[np.int64]  # [M] bytes


class _Member(NamedTuple):
    key: str
    field: str
    offset: int
    size: int


def _members(path: Path) -> Iterator[_Member]:
    """Scan the headers of one tar. DataError if it is compressed, cut short or no tar at all."""
    length = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data + (-(-info.size // 512) * 512 if info.isreg() else 0)
                if end > length:
                    raise tarfile.ReadError(f"member '{info.name}' ends behind the end of the file")
                folder, _, name = info.name.rpartition("/")
                if not info.isreg() or _META.match(name):
                    continue
                stem, _, field = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                yield _Member(key, field.lower(), info.offset_data, info.size)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"shard {path} is not a readable tar file ({error}); {_advice(path)}") from error
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):  # tarfile takes a damaged header for the end
            raise DataError(f"shard {path} is cut short or damaged at byte {end}; {_advice(path)}")


def _advice(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b" or start[:3] in (b"BZh", b"\xfd7z") or start == b"\x28\xb5\x2f\xfd":
        return "it is compressed: unpack it to a plain .tar, which samples can be read from in any order"
    return "copy or make it again"


def _scan(path: Path) -> Index:
    keys: list[str] = []
    known: set[str] = set()
    first: list[int] = []
    names: dict[str, int] = {}
    rows: list[tuple[int, int, int]] = []
    within: set[str] = set()
    for member in _members(path):
        if not keys or keys[-1] != member.key:
            if member.key in known:
                raise DataError(
                    f"shard {path}: the members of sample '{member.key}' are not next to one another; "
                    "make the shard again with each sample's files in a row"
                )
            keys.append(member.key)
            known.add(member.key)
            first.append(len(rows))
            within = set()
        if member.field in within:
            raise DataError(f"shard {path}: sample '{member.key}' has two fields '{member.field}'; keep one")
        within.add(member.field)
        rows.append((names.setdefault(member.field, len(names)), member.offset, member.size))
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    starts = np.array([*first, len(rows)], dtype=np.int64)
    field, offset, size = (np.ascontiguousarray(column) for column in table.T)
    return Index(keys, starts, list(names), field.astype(np.int32), offset, size)


def _stamp(path: Path) -> NDArray[np.int64]:
    status = path.stat()
    return np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)


def _load_index(file: Path, stamp: NDArray[np.int64]) -> Index | None:
    """The cached index, or None if it is absent, damaged or of another state of the shard."""
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as saved:
            if not np.array_equal(saved["stamp"], stamp):
                return None
            keys, fields = (bytes(saved[name]).decode().split("\n") for name in ("keys", "fields"))
            first, field, offset, size = (saved[name] for name in ("first", "field", "offset", "size"))
            return Index(keys[: len(first) - 1], first, fields, field, offset, size)
    except (OSError, ValueError, KeyError, EOFError, UnicodeDecodeError):
        return None
    except Exception as error:  # a damaged zip raises zipfile.BadZipFile or zlib.error
        if type(error).__module__ in ("zipfile", "zlib"):
            return None
        raise


def _save_index(file: Path, stamp: NDArray[np.int64], index: Index) -> None:
    """Write whole or not at all; a cache folder that cannot be written only costs the next scan."""
    texts = {
        name: np.frombuffer("\n".join(lines).encode(), dtype=np.uint8)
        for name, lines in (("keys", index.keys), ("fields", index.fields))
    }
    arrays = {"first": index.first, "field": index.field, "offset": index.offset, "size": index.size}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as scratch:
            np.savez(scratch, stamp=stamp, **texts, **arrays)  # type: ignore[arg-type]
        os.replace(scratch.name, file)
    except OSError:
        return


def load_index(path: Path, cache: Path | None = None) -> Index:
    """The index of one shard, from the cache or by one scan of its headers.

    Cached in `cache` (default `cache_folder()/index`) by the shard's path, with its size and time of change.
    DataError if the shard cannot be read.
    """
    try:
        stamp = _stamp(path)
    except OSError as error:
        reason = f"shard {path} cannot be opened ({error.strerror}); mend its path or rights"
        raise DataError(reason) from error
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    file = (cache or cache_folder() / "index") / f"{name}.npz"
    index = _load_index(file, stamp)
    if index is None:
        index = _scan(path)
        _save_index(file, stamp, index)
    return index


class _OpenFiles:
    """The most recently used descriptors of one thread, opened when first read."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        descriptor = self._open.get(path)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return os.pread(descriptor, size, offset)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class Shards:
    """The samples of a list of shards, numbered 0 .. len-1 in the order of the list and of the tars.

    Safe to read from several threads and after a fork: every thread opens files of its own, and a read states
    its offset, so that processes which share a descriptor do not disturb one another. Can be pickled.
    """

    def __init__(self, patterns: str | Path | Sequence[str | Path], cache: Path | None = None) -> None:
        """Expand `patterns` (see `expand`) and index every shard; DataError if one cannot be read."""
        self.paths = expand(patterns)
        with ThreadPoolExecutor(max_workers=8) as pool:
            self._indexes = list(pool.map(lambda path: load_index(path, cache), self.paths))
        counts = [len(index.keys) for index in self._indexes]
        self._starts: list[int] = [0, *np.cumsum(counts).tolist()]
        self._local = threading.local()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

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
        return self._indexes[shard].keys[row]

    def shard(self, i: int) -> Path:
        """The shard that sample `i` lies in."""
        return self.paths[self._locate(i)[0]]

    def start(self, shard: int) -> int:
        """The number of the first sample of the `shard`-th shard; of shard `len(paths)`, `len(self)`."""
        return self._starts[shard]

    def fields(self, i: int) -> tuple[str, ...]:
        """The field names of sample `i`, in the order of the tar."""
        shard, row = self._locate(i)
        index = self._indexes[shard]
        return tuple(index.fields[field] for field in index.field[index.first[row] : index.first[row + 1]])

    def sizes(self, i: int) -> dict[str, int]:
        """The bytes of each member of sample `i` by the index, {field: bytes}; nothing is read."""
        shard, row = self._locate(i)
        index = self._indexes[shard]
        members = slice(index.first[row], index.first[row + 1])
        names = (index.fields[field] for field in index.field[members])
        return dict(zip(names, index.size[members].tolist(), strict=True))

    def empty_members(self, fields: Collection[str]) -> list[tuple[int, str]]:
        """(sample, field) of every member of these fields that has no bytes, in the order of the samples."""
        found: list[tuple[int, str]] = []
        for start, index in zip(self._starts, self._indexes, strict=False):
            wanted = np.isin(index.field, [n for n, name in enumerate(index.fields) if name in fields])
            members = np.flatnonzero(wanted & (index.size == 0))
            rows = np.searchsorted(index.first, members, side="right") - 1
            names = (index.fields[field] for field in index.field[members])
            found += zip((start + rows).tolist(), names, strict=True)
        return found

    def read(self, i: int, only: Collection[str] | None = None) -> dict[str, bytes]:
        """The members of sample `i` as {field: bytes}; `only` these fields where given.

        DataError if the shard can no longer be read where its index says.
        """
        shard, row = self._locate(i)
        index, path = self._indexes[shard], self.paths[shard]
        members = range(index.first[row], index.first[row + 1])
        chosen = ((index.fields[index.field[member]], member) for member in members)
        return {
            field: self._read(path, int(index.offset[member]), int(index.size[member]))
            for field, member in chosen
            if only is None or field in only
        }

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        files = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = _OpenFiles()
        try:
            data = cast(_OpenFiles, files).read(path, offset, size)
        except OSError as error:
            reason = f"shard {path} cannot be read ({error.strerror}); mend its path or rights"
            raise DataError(reason) from error
        if len(data) != size:
            raise DataError(f"shard {path} became shorter after it was indexed; copy it again")
        return data

    def fingerprint(self) -> str:
        """16 hex digits that tell the shards' names, order, keys and member sizes, not their folder."""
        digest = hashlib.sha256()
        for path, index in zip(self.paths, self._indexes, strict=True):
            digest.update(f"{path.name}\n".encode())
            digest.update("\n".join(index.keys).encode())
            digest.update(index.size.tobytes())
        return digest.hexdigest()[:16]
