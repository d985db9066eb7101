"""Whole shards in a folder of bounded size that all processes of a node share.

A shard is written under another name, held by a lock, and renamed when it is whole; what is half there is gone on with.
Readers open a shard for one sample at a time: one that is removed meanwhile keeps its bytes until they have closed it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vlscale.errors import DataError

RESTS = 60.0  # seconds after its last use before a shard may make room for another
TOUCHED = 20.0  # seconds between two notes of its use
FULL = 10.0  # seconds for which nothing is tried after no room was found
SPARE = 0.05  # share of the free disk that is left to others
_WHOLE, _PART, _LOCK = ".tar", ".part", "room.lock"

Room = Callable[[int], bool]  # whether the cache can hold a shard of so many bytes


class Entry(NamedTuple):
    """What the cache is asked for."""

    name: str  # of a file: tells the shard and its state
    size: int | None  # bytes; None = only known once it is there

    def file(self, end: str) -> str:
        """The file's name; it tells the size, so that what is being written counts as what it will be."""
        return f"{self.name}-{'' if self.size is None else self.size}{end}"


class Cache:
    """The folder. Safe to use from several threads and processes; can be pickled."""

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit` in bytes."""
        self.folder = folder
        self.limit = limit
        self._full_until = 0.0

    def open(self, entry: Entry, fill: Callable[[int, int, Room], bool]) -> int | None:
        """A descriptor of the shard, which the caller closes; None if there is no room for it.

        Args:
            entry: the shard.
            fill: called with (descriptor, bytes that are there, room) if the shard is absent; writes the rest from
                there on, and gives False where room is lacking.

        Raises:
            DataError: the folder cannot be written; and whatever `fill` raises.
        """
        try:
            found = self._opened(entry)
            if found is not None:
                return found
            if entry.size is not None and time.monotonic() < self._full_until:
                return None
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / entry.file(_PART)) as part:
                found = self._opened(entry)  # by another process, while this one waited
                if found is not None:
                    os.unlink(self.folder / entry.file(_PART))
                    return found
                return self._filled(entry, part, fill)
        except OSError as error:
            raise DataError(
                f"the cache {self.folder} cannot be written ({error.strerror or error}); write data.cache=FOLDER for "
                "another place, or data.cache_gigabytes=0 to read without one"
            ) from error

    def has(self, entry: Entry) -> bool:
        """Whether the shard is there."""
        return (self.folder / entry.file(_WHOLE)).exists()

    def _filled(self, entry: Entry, part: int, fill: Callable[[int, int, Room], bool]) -> int | None:
        def room(size: int) -> bool:
            return self._make_room(size, entry.file(_PART))

        path = self.folder / entry.file(_PART)
        there = os.fstat(part).st_size
        if entry.size is None or there > entry.size:
            os.ftruncate(part, 0)
            there = 0
        if not (entry.size is None or room(entry.size)) or not fill(part, there, room):
            os.unlink(path)
            self._full_until = time.monotonic() + FULL
            return None
        written = os.fstat(part).st_size
        if entry.size is not None and written != entry.size:
            os.ftruncate(part, 0)
            raise OSError(f"{entry.size} bytes were to be written, not {written}")
        os.replace(path, self.folder / entry.file(_WHOLE))
        return os.dup(part)

    def _opened(self, entry: Entry) -> int | None:
        """A descriptor of a whole shard, whose use is noted; None if it is absent."""
        path = self.folder / entry.file(_WHOLE)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        status = os.fstat(descriptor)
        if entry.size is not None and status.st_size != entry.size:  # damaged by someone else
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        if time.time() - status.st_mtime > TOUCHED:
            with suppress(OSError):  # it has just made room, or is another user's
                os.utime(path)
        return descriptor

    def _make_room(self, needed: int, own: str) -> bool:
        """Remove the shards that were used longest ago until `needed` bytes fit; False if they do not."""
        with _locked(self.folder / _LOCK):
            files = sorted(
                (status.st_mtime, _size(path, status.st_size), path)
                for path, status in _statuses(self.folder)
                if path.suffix in (_WHOLE, _PART) and path.name != own
            )
            used = sum(size for _, size, _ in files)
            limit = min(self.limit, used + int(shutil.disk_usage(self.folder).free * (1 - SPARE)))
            for changed, size, path in files:
                if used + needed <= limit or time.time() - changed < RESTS:
                    break
                if path.suffix == _WHOLE or _is_idle(path):
                    path.unlink(missing_ok=True)
                    used -= size
            return used + needed <= limit


def _statuses(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue


def _size(path: Path, there: int) -> int:
    """What a file takes up, or will."""
    told = path.stem.rpartition("-")[2]
    return max(there, int(told)) if told.isdigit() else there


def _is_idle(path: Path) -> bool:
    """Whether nobody is writing this part: its writer has ended."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, made if it is absent, while no other process or thread has it. The lock ends with its holder."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is(path, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    """Whether the name still stands for this file: who held the lock before may have renamed or removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
