"""Whole shards in a folder of bounded size that all processes of a node share, those of other users too.

A shard is written under another name, held by a lock, and renamed when it is whole; what is half there is gone on with.
Readers open a shard for one sample at a time: one that is removed meanwhile keeps its bytes until they have closed it.
Files of other users that may not be opened or removed are passed over.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vlscale.data.storage import locks
from vlscale.errors import DataError

RESTS = 60.0  # seconds after its last use before a shard may make room for another
TOUCHED = 20.0  # seconds between two notes of its use
FULL = 10.0  # seconds for which nothing is tried after no room was found
SPARE = 0.05  # share of the free disk that is left to others
ABANDONED = 3600.0  # seconds after which a part is nobody's, where no lock tells
_WHOLE, _PART, _LOCK = ".tar", ".part", "room.lock"

Room = Callable[[int], bool]  # whether the cache can hold a shard of so many bytes


class Entry(NamedTuple):
    """What the cache is asked for."""

    name: str  # of a file: tells the shard and its state
    size: int | None  # bytes; None = only known once it is there

    def file(self, end: str) -> str:
        """The file's name; it tells the size, so that what is being written counts as what it will be."""
        return f"{self.name}-{'' if self.size is None else self.size}{end}"

    def part(self) -> str:
        """The name until it is whole. What is begun anew by everyone has one on each node: locks may end there."""
        return f"{self.name}-{platform.node()}-{_PART}" if self.size is None else self.file(_PART)


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
            with _held(self.folder / entry.part()) as (path, part):
                found = self._opened(entry)  # by another process, while this one waited
                if found is not None:
                    path.unlink(missing_ok=True)
                    return found
                return self._filled(entry, path, part, fill)
        except PermissionError as error:
            if os.access(self.folder, os.W_OK | os.X_OK):  # it is a file of another user that is in the way
                return None
            raise self._error(error) from error
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> DataError:
        return DataError(
            f"the cache {self.folder} cannot be written ({error.strerror or error}); write data.cache=FOLDER for "
            "another place, or data.cache_gigabytes=0 to read without one"
        )

    def has(self, entry: Entry) -> bool:
        """Whether the shard is there."""
        return (self.folder / entry.file(_WHOLE)).exists()

    def _filled(self, entry: Entry, path: Path, part: int, fill: Callable[[int, int, Room], bool]) -> int | None:
        def room(size: int) -> bool:
            return self._make_room(size, path.name)

        there = os.fstat(part).st_size
        if entry.size is None or there > entry.size:
            os.ftruncate(part, 0)
            there = 0
        try:
            fits = (entry.size is None or room(entry.size)) and fill(part, there, room)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            fits = False  # someone else was faster to fill the disk
        if not fits:
            path.unlink(missing_ok=True)
            self._full_until = time.monotonic() + FULL
            return None
        written = os.fstat(part).st_size
        if entry.size is not None and written != entry.size:
            os.ftruncate(part, 0)
            raise OSError(f"{entry.size} bytes were to be written, not {written}")
        with suppress(FileNotFoundError):  # another node, whose locks are not seen here, was faster
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
        with locks.alone(self.folder / _LOCK):
            files, written = [], 0  # written: bytes of its own part that are there, and no longer free
            for path, status in _statuses(self.folder):
                if path.name == own:
                    written = status.st_size
                elif path.suffix in (_WHOLE, _PART):
                    files.append((status.st_mtime, status.st_size, _size(path, status.st_size), path))
            used = sum(size for *_, size, _ in files)
            pending = sum(size - there for _, there, size, _ in files)  # bytes that others have yet to write
            free = shutil.disk_usage(self.folder).free * (1 - SPARE)

            def fits() -> bool:
                return used + needed <= self.limit and pending + needed - written <= free

            for changed, there, size, path in sorted(files):
                age = time.time() - changed
                if fits() or age < RESTS:
                    break
                with suppress(PermissionError):
                    if path.suffix == _WHOLE or _is_idle(path, age):
                        path.unlink(missing_ok=True)
                        used, pending, free = used - size, pending - (size - there), free + there
            return fits()


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


def _is_idle(path: Path, age: float) -> bool:
    """Whether nobody is writing this part: its writer has ended."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        taken = locks.take(descriptor, wait=False)
        return taken == "ours" or (taken == "no locks" and age > ABANDONED)
    finally:
        os.close(descriptor)


@contextmanager
def _held(path: Path) -> Iterator[tuple[Path, int]]:
    """A part, made if it is absent, while no other process or thread has it.

    It lies beside `path` where that is another user's, or where the file system has no locks.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except PermissionError:
            if not path.exists():  # the folder cannot be written
                raise
            path = _beside(path)
            continue
        try:
            if locks.take(descriptor) == "no locks":
                own = _beside(path)
                with suppress(FileNotFoundError):  # one of several who try has it
                    os.rename(path, own)
                    path = own
            if _is(path, descriptor):
                with suppress(PermissionError):
                    os.fchmod(descriptor, 0o644)  # whatever our umask: others read the shard
                yield path, descriptor
                return
        finally:
            os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f"{uuid.uuid4().hex}-{path.name}")


def _is(path: Path, descriptor: int) -> bool:
    """Whether the name still stands for this file: who held the lock before may have renamed or removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
