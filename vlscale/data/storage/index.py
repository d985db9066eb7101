"""Where the samples of one shard lie: found by one scan of its headers, kept in a file that processes map and share."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import struct
import tempfile
import threading
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlscale.data.storage import tar
from vlscale.errors import ConfigError

VERSION = 2
MAGIC = b"VLSINDEX"
MAX_FIELDS = 10_000  # of a shard; every read of a sample looks at all its members
Stamp = tuple[int, int]  # size in bytes, and time of change or a hash of the store's own mark: tells a stale index
_META = re.compile(r"\.|__.*__(\.|$)")  # starts of names that belong to no sample: hidden, WebDataset's own
_META_FOLDER = re.compile(r"__[^/]*__/")
_HEAD = struct.Struct("<8sq 2q 5q ? 32s 19x")  # magic word, version, a `Head`; with the CRC-32 behind it 128 bytes
_CRC = struct.Struct("<I")
_log = logging.getLogger(__name__)


class Head(NamedTuple):
    """The fixed part of an index."""

    stamp: Stamp
    samples: int
    members: int
    key_bytes: int
    field_bytes: int
    length: int  # of the tar in bytes, unpacked
    packed: bool  # the shard is compressed: offsets are those of the tar inside
    digest: bytes  # SHA-256 of keys, fields and sizes: what the shard holds, wherever it lies


class Keys(Sequence[str]):
    """The keys of the samples, each made when it is asked for."""

    def __init__(self, text: memoryview | bytes, ends: memoryview) -> None:
        """UTF-8 `text` and where each key ends in it, S + 1 numbers from 0."""
        self._text = text
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= row < len(self):
            raise IndexError(row)
        return tar.printable(bytes(self._text[self._ends[row] : self._ends[row + 1]]))


class Index:
    """The samples and members of one shard. S samples, M members; arrays lie in one buffer, mapped or held."""

    def __init__(self, head: Head, body: memoryview | bytes) -> None:
        """`body` is what follows the head in an index file."""
        place = 0

        def column(kind: type[np.generic], count: int) -> NDArray[np.int64]:
            nonlocal place
            found = np.frombuffer(body, kind, count, place)
            place += found.nbytes
            return found

        self.head = head
        ends = column(np.int64, head.samples + 1)
        self.first = column(np.int64, head.samples + 1)  # sample i has the members [first[i], first[i + 1])
        self.offset = column(np.int64, head.members)  # bytes
        self.size = column(np.int64, head.members)  # bytes
        self.field = column(np.int32, head.members)  # into `fields`
        self.keys = Keys(memoryview(body)[place : place + head.key_bytes], ends.data)
        names = bytes(body[place + head.key_bytes : place + head.key_bytes + head.field_bytes])
        self.fields: list[str] = json.loads(names)  # the distinct field names
        # for single numbers, which take half the time out of a memoryview
        self._columns = (self.first.data, self.offset.data, self.size.data, self.field.data)

    def spans(self, row: int) -> dict[str, tuple[int, int]]:
        """{field: (offset, size)} of the members of a sample, in the order of the tar, in bytes."""
        first, offset, size, field = self._columns
        return {self.fields[field[n]]: (offset[n], size[n]) for n in range(first[row], first[row + 1])}


def scan(read: Callable[[int, int], bytes], length: int, stamp: Stamp, packed: bool) -> tuple[Head, bytes]:
    """Head and body of the index of a tar, which `read` gives the bytes of.

    Raises:
        tar.TarError: the tar is damaged.
        ValueError: the members of a sample are scattered, doubled or beyond number.
    """
    keys, ends = bytearray(), array("q", [0])
    first, offsets, sizes, fields = array("q"), array("q"), array("q"), array("i")
    names: dict[str, int] = {}
    within: set[str] = set()
    last: bytes | None = None
    for member in tar.members(read, length):
        key, field = split(member.name)
        if not key:
            continue
        if key != last:
            keys += key
            ends.append(len(keys))
            first.append(len(offsets))
            last, within = key, set()
        if field in within:
            raise ValueError(f"sample '{tar.printable(key)}' has two fields '{field}'; keep one")
        if len(names) > MAX_FIELDS:
            raise ValueError(
                f"it has more than {MAX_FIELDS} fields, such as '{field}' of '{tar.printable(key)}'; a key ends at the "
                "first dot of a name: write none into keys"
            )
        within.add(field)
        fields.append(names.setdefault(field, len(names)))
        offsets.append(member.offset)
        sizes.append(member.size)
    first.append(len(offsets))
    _check_in_rows(bytes(keys), ends)
    listed = json.dumps(list(names)).encode()
    told = (ends, sizes, fields)
    digest = hashlib.sha256(b"".join([bytes(keys), listed, *(part.tobytes() for part in told)])).digest()
    head = Head(stamp, len(ends) - 1, len(offsets), len(keys), len(listed), length, packed, digest)
    columns = (ends, first, offsets, sizes, fields)
    return head, b"".join([*(column.tobytes() for column in columns), bytes(keys), listed])


def split(name: bytes) -> tuple[bytes, str]:
    """(key, field) of a member: the field begins at the first dot of the last part of its name.

    No key where the name has no field, or is a hidden one or WebDataset's own.
    """
    folder, slash, last = name.rpartition(b"/")
    stem, dot, field = last.partition(b".")
    if not dot or _META.match(tar.printable(last)) or _META_FOLDER.match(tar.printable(name)):
        return b"", ""
    return folder + slash + stem, tar.printable(field).lower()


def _check_in_rows(keys: bytes, ends: Sequence[int]) -> None:
    """ValueError if a key begins twice; compared by hashes first, as a set of all keys would take much memory."""
    hashes = np.array([hash(keys[start:end]) for start, end in _spans(ends)], dtype=np.int64)
    values, counts = np.unique(hashes, return_counts=True)
    if len(values) == len(hashes):
        return
    seen: set[bytes] = set()
    doubtful = set(values[counts > 1].tolist())
    for start, end in _spans(ends):
        key = keys[start:end]
        if hash(key) in doubtful and key in seen:
            raise ValueError(
                f"the members of sample '{tar.printable(key)}' are not next to one another; "
                "make the shard again with each sample's files in a row"
            )
        seen.add(key)


def _spans(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    return pairwise(ends)


def read_head(file: Path, stamp: Stamp) -> Head | None:
    """The head of a kept index, or None if it is absent, damaged or of another state of the shard."""
    try:
        with open(file, "rb", buffering=0) as opened:
            start = opened.read(_HEAD.size + _CRC.size)
            length = os.fstat(opened.fileno()).st_size
    except OSError:
        return None
    if len(start) < _HEAD.size + _CRC.size or _CRC.unpack(start[_HEAD.size :])[0] != zlib.crc32(start[: _HEAD.size]):
        return None
    magic, version, *rest = _HEAD.unpack(start[: _HEAD.size])
    head = Head((rest[0], rest[1]), *rest[2:])
    body = 8 * 2 * (head.samples + 1) + (8 + 8 + 4) * head.members + head.key_bytes + head.field_bytes
    current = magic == MAGIC and version == VERSION and head.stamp == stamp
    return head if current and length == len(start) + body else None


def open_index(file: Path, stamp: Stamp) -> Index | None:
    """The kept index, mapped into memory; None as in `read_head`."""
    head = read_head(file, stamp)
    if head is None:
        return None
    try:
        with open(file, "rb", buffering=0) as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return Index(head, memoryview(mapped)[_HEAD.size + _CRC.size :])
    except (OSError, ValueError):  # gone, or written anew by a version that keeps it otherwise
        return None


def save(file: Path, head: Head, body: bytes) -> bool:
    """Write whole or not at all; False where the folder cannot be written.

    One that is there by now stays: a file that is replaced over NFS is torn from those who have mapped it.
    """
    packed = _HEAD.pack(MAGIC, VERSION, *head.stamp, *head[1:])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as scratch:
            try:
                scratch.write(packed + _CRC.pack(zlib.crc32(packed)) + body)
                scratch.flush()
                os.chmod(scratch.name, 0o644)  # a cache may be shared
                if read_head(file, head.stamp) is None:
                    os.replace(scratch.name, file)
            finally:
                Path(scratch.name).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def file_name(place: str, stamp: Stamp) -> str:
    """Of the index of the shard at `place`, one for each of its states: nodes may hold copies of different times."""
    return f"{place}-{stamp[0]:x}-{stamp[1]:x}.index"


def place_of(name: str) -> str:
    """The `place` in a file's name."""
    return name.partition("-")[0].partition(".")[0]


class Files:
    """The files of indexes: in a folder, or where that cannot be written in one of this process, which ends with it.

    Safe to use from several threads; can be pickled: other processes map the same files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._private: Path | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"_folder": self._folder, "_private": self._private}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def head(self, place: str, stamp: Stamp) -> Head | None:
        """As `read_head`."""
        return next(filter(None, (read_head(file, stamp) for file in self._files(place, stamp))), None)

    def open(self, place: str, stamp: Stamp) -> Index | None:
        """As `open_index`."""
        return next(filter(None, (open_index(file, stamp) for file in self._files(place, stamp))), None)

    def save(self, place: str, head: Head, body: bytes) -> None:
        """Keep an index. ConfigError if it can be kept nowhere."""
        name = file_name(place, head.stamp)
        if not save(self._folder / name, head, body) and not save(self._own() / name, head, body):
            raise ConfigError(
                f"the indexes of shards can be written neither to {self._folder} nor to {self._own()}; "
                "set VLSCALE_CACHE to a folder that can"
            )

    def _files(self, place: str, stamp: Stamp) -> Iterator[Path]:
        folders = (self._folder, self._private)
        return (folder / file_name(place, stamp) for folder in folders if folder is not None)

    def _own(self) -> Path:
        with self._lock:
            if self._private is None:
                _warn(self._folder)
                self._private = Path(tempfile.mkdtemp(prefix="vlscale-index-"))
                weakref.finalize(self, _remove, self._private, os.getpid())
            return self._private


@functools.cache
def _warn(folder: Path) -> None:
    _log.warning(
        "the indexes of shards cannot be written to %s, so that every run scans all shards anew; "
        "set VLSCALE_CACHE to a folder that can",
        folder,
    )


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in one that was forked
        shutil.rmtree(folder, ignore_errors=True)
