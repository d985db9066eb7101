"""What a `make` has finished: `PREFIX.made.jsonl` beside the shards, from which the same command goes on.

Its first line is the options, then there is one line for each shard that is whole and in its place, and at the end one
that says so. `PREFIX.broken.jsonl` lists the samples that were left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from vlscale.data.storage import locks
from vlscale.errors import ConfigError, DataError

VERSION = 1
PASSED_OVER = re.compile(r"\..*|.*\.(tar|log|made\.jsonl|broken\.jsonl)|SHA256SUMS|lock\.mdb")  # in a folder of sources
NAMED = 100  # broken samples that are kept in mind; a crawl has millions


class Finished(NamedTuple):
    """One shard that is whole."""

    shard: str  # its file's name
    bytes: int
    sha256: str
    samples: int
    items: int  # of the source, from its start up to this shard's last sample
    keys: str  # sha256 of those items' keys
    broken: int  # of those items


class Manifest:
    """The record of one `make`, held by one process at a time; a context manager.

    Leaves nothing behind where no shard was finished.
    """

    def __init__(self, folder: Path, prefix: str, options: Mapping[str, object]) -> None:
        """`options` is whatever the shards' bytes depend on, as JSON can hold it."""
        self.folder = folder
        self.prefix = prefix
        self.finished: list[Finished] = []
        self.broken = 0  # samples left out so far
        self.named: list[tuple[str, str]] = []  # (key, reason) of the first `NAMED` of them
        self.ended = False  # there is no more to do
        self.items, self.keys = 0, ""  # of the source: how many are done, and the sha256 of their keys
        self._options = json.loads(_line({"version": VERSION, **options}))  # as it is read again
        self._path = folder / f"{prefix}.made.jsonl"
        self._list = folder / f"{prefix}.broken.jsonl"
        self._files: list[BinaryIO] = []
        self._open = ExitStack()

    def __enter__(self) -> Manifest:
        """ConfigError if the folder holds other shards, DataError if those of this record have changed."""
        if not self._path.exists():
            self._refuse_others("is there already")
        try:
            for path in (self._path, self._list):
                self._files.append(self._open.enter_context(path.open("a+b")))
            self._lock()
            self._read()
        except OSError as error:
            self._open.close()
            reason = f"--to {self.folder} cannot be written ({error.strerror}); write a folder that can"
            raise ConfigError(reason) from error
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path, needed in ((self._path, self.finished), (self._list, self.finished and self.broken)):
            if not needed:
                path.unlink(missing_ok=True)
        self._open.close()

    def _lock(self) -> None:
        if locks.take(self._files[0].fileno(), wait=False) == "another's":
            raise ConfigError(f"another process is writing {self.prefix}-*.tar in {self.folder}; let it end")

    def _read(self) -> None:
        """Take up what an earlier process has left, but for what it did after its last whole shard."""
        try:
            lines, end = _whole_lines(self._files[0])
            finished = [Finished(**line) for line in lines if "shard" in line]
        except (ValueError, TypeError) as error:
            reason = f"{self._path} is damaged ({error}); remove it and its shards, and make them again"
            raise DataError(reason) from error
        if finished:
            self._compare(lines[0], finished)
            self.finished, self.ended = finished, "ended" in lines[-1]
            self.items, self.keys = lines[-1]["items"], lines[-1]["keys"]
            self._refuse_others("is not one of these")
            self._files[0].truncate(end)
        else:
            self._refuse_others("is there already")
            self._files[0].truncate(0)
            _say(self._files[0], self._options)
        self._read_broken(lines[-1]["broken"] if finished else 0)

    def _read_broken(self, count: int) -> None:
        """Take up the first `count` broken samples, and strike out the others."""
        file, end = self._files[1], 0
        file.seek(0)
        for line in islice(file, count):
            if self.broken < NAMED:
                self.named.append(self._named(line))
            self.broken += 1
            end += len(line)
        file.truncate(end)

    def _named(self, line: bytes) -> tuple[str, str]:
        try:
            told = json.loads(line)
            return told["key"], told["reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._list} is damaged ({error}); remove it and go on without its lines") from error

    def _refuse_others(self, reason: str) -> None:
        """ConfigError if there are shards that an earlier process of this `make` has not left."""
        known = {each.shard for each in self.finished}
        if self._files:  # it may have been killed after a shard was in its place and before it was noted
            known.add(self.shard(len(self.finished)))
        for path in sorted(self.folder.glob(f"{self.prefix}-[0-9]*.tar")):
            if path.name not in known:
                raise ConfigError(f"{path} {reason}; write another --to or --prefix, or remove the old shards")

    def _compare(self, options: Mapping[str, object], finished: list[Finished]) -> None:
        """The shards that are there are the ones that this command makes, and are whole."""
        for name in {**options, **self._options}:
            there, here = options.get(name), self._options.get(name)
            if there != here:
                raise ConfigError(
                    f"{self.folder} holds {self.prefix} shards made with {name} {_word(there)}, not {_word(here)}; go "
                    f"on with that, write another --to or --prefix, or remove {self._path.name} and the shards"
                )
        for each in finished:
            path = self.folder / each.shard
            size = path.stat().st_size if path.exists() else None
            if size != each.bytes:
                found = "is gone" if size is None else f"has {size} bytes instead of {each.bytes}"
                raise DataError(f"{path} {found}; remove {self._path} and its shards, and make them again")

    def shard(self, number: int) -> str:
        """The name of the `number`-th shard's file."""
        return f"{self.prefix}-{number:06d}.tar"

    def add(self, shard: Finished) -> None:
        """Note a shard that is in its place, on the disk before this returns."""
        self._files[1].flush()
        os.fsync(self._files[1].fileno())
        self.finished.append(shard)
        _say(self._files[0], shard._asdict())

    def leave_out(self, key: str, reason: str) -> None:
        """Note a broken sample."""
        if self.broken < NAMED:
            self.named.append((key, reason))
        self.broken += 1
        self._files[1].write(_line({"key": key, "reason": reason}))

    def end(self, items: int, keys: str) -> None:
        """Note that the source has no more than these."""
        self.ended = True
        _say(self._files[0], {"ended": True, "items": items, "keys": keys, "broken": self.broken})


def origin(options: Mapping[str, Any]) -> dict[str, object]:
    """Options that name files, as JSON can hold them, with the size of each file and when it was last changed.

    A folder's files are taken together; of `images`, a folder in which most files may be others', nothing is told.
    """
    said: dict[str, object] = {}
    for name, value in options.items():
        several = isinstance(value, list | tuple)
        words = [str(each) for each in (value if several else [value]) if each]
        said[name] = words if several else next(iter(words), None)
        for path in (Path(word).expanduser() for word in words):
            if path.is_file():
                changed = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
                said[str(path)] = f"{path.stat().st_size} bytes of {changed.isoformat(timespec='milliseconds')}"
            elif path.is_dir() and name != "images":
                said[str(path)] = _files_in(path)
    return said


def _files_in(folder: Path) -> str:
    """How many files a folder holds, and a digest of their names, sizes and times: 10 us each, a third of listing them.

    Hidden ones, logs, and what `make` or a reader of LMDB writes there do not count.
    """
    digest, count = sha256(), 0
    for place, folders, names in os.walk(folder):
        inside = os.path.relpath(place, folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not PASSED_OVER.fullmatch(name)):
            path = os.path.join(place, name)
            try:
                found = os.stat(path)
            except OSError:  # a link to nothing, which the formats pass over
                continue
            told = f"{inside}/{name} {found.st_size} {found.st_mtime_ns}\n"
            digest.update(os.fsencode(told))
            count += 1
    return f"{count} files of {digest.hexdigest()[:32]}"


def _whole_lines(file: BinaryIO) -> tuple[list[dict[str, Any]], int]:
    """The lines, each a JSON object, up to one that was cut short; and where they end."""
    file.seek(0)
    lines: list[dict[str, Any]] = []
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        lines.append(json.loads(line))
        end += len(line)
    return lines, end


def _line(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode(errors="replace") + b"\n"


def _say(file: BinaryIO, values: Mapping[str, object]) -> None:
    file.write(_line(values))
    file.flush()
    os.fsync(file.fileno())


def _word(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
