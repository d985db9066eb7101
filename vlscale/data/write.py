"""Samples to tar shards: whole or not at all, and the same bytes for the same samples."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from vlscale.data.detections import Detections, write_regions
from vlscale.data.shards import Shards, load_index
from vlscale.errors import ConfigError, DataError

CHUNK = 16  # items that a process is given at once
AHEAD = 3  # chunks that each process has been given beyond what was written
_Item = TypeVar("_Item")


class Sample(NamedTuple):
    """One sample before it is bytes."""

    record: dict[str, object]  # what its json holds
    picture: tuple[str, bytes] | None = None  # field (`jpg`, `png`, `webp`) and the bytes as they are
    regions: Detections | None = None
    more: tuple[tuple[str, bytes], ...] = ()  # further members: the second picture (`1.jpg`), a clip (`mp4`)


class Source(Protocol[_Item]):
    """A format that people have. It crosses to other processes, so it holds paths, not open files."""

    def items(self) -> Iterator[tuple[str, _Item]]:
        """(name, what `sample` needs) of every picture, always in the same order."""

    def sample(self, name: str, item: _Item) -> Sample:
        """One sample. ValueError with a clause if it is broken."""


class Written(NamedTuple):
    """What became of a source."""

    shards: list[Path]
    samples: int
    broken: int
    named: list[tuple[str, str]]  # (key, reason) of the first broken ones


class Member(NamedTuple):
    """A sample as bytes, or why there is none."""

    key: str
    fields: dict[str, bytes]
    reason: str = ""


@dataclass(frozen=True)
class Layout:
    """Where shards go and how large they are; a shard ends at whichever limit it meets first."""

    folder: Path
    prefix: str
    samples: int = 5_000
    megabytes: float = float("inf")
    dtype: str = "float16"  # of features and class_probs
    processes: int = 1

    def __post_init__(self) -> None:
        """ConfigError for a number or a name that cannot be."""
        for name, least in (("samples", 1), ("processes", 1), ("megabytes", 0.001)):
            if getattr(self, name) < least:
                option = "samples_per_shard" if name == "samples" else name
                raise ConfigError(f"--{option} is {getattr(self, name)}; write {least} or more")
        if not re.fullmatch(r"[\w-]+", self.prefix):
            raise ConfigError(f"--prefix '{self.prefix}' cannot start a shard's name; write letters, digits, _ and -")
        require_dtype(self.dtype)


def require_dtype(dtype: str) -> None:
    """ConfigError unless features can be written as `dtype`."""
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"--dtype is '{dtype}'; write float16 or float32")


def make(source: Source[Any], layout: Layout, named: int = 10) -> Written:
    """Write all samples of `source`, in its order, and the index that training reads first.

    Broken samples are left out, counted, and the first `named` of them named. ConfigError if the folder holds
    such shards already, DataError if no sample could be written.
    """
    return write(convert(source, layout), layout, named)


def convert(source: Source[Any], layout: Layout) -> Iterator[Member]:
    """Every sample as bytes, in the source's order, by several processes if the layout says so."""
    job = _Job(source, layout.dtype)
    if layout.processes == 1:
        yield from map(job, source.items())
    else:
        yield from _in_order(job, layout.processes)


class _Job:
    """From an item to bytes."""

    here: _Job  # of a converting process, which is given it once: all captions may be in it

    def __init__(self, source: Source[Any], dtype: str) -> None:
        self.source = source
        self.dtype = dtype

    def __call__(self, named: tuple[str, Any]) -> Member:
        name, item = named
        try:
            return Member(key_of(name), encode(self.source.sample(name, item), self.dtype))
        except ValueError as error:
            return Member(key_of(name), {}, str(error))


def _start(job: _Job) -> None:
    _Job.here = job


def _convert(chunk: list[tuple[str, Any]]) -> list[Member]:
    return list(map(_Job.here, chunk))


def _in_order(job: _Job, processes: int) -> Iterator[Member]:
    context = multiprocessing.get_context("spawn")  # threads of ours or of a library must not be forked
    waiting: deque[Future[list[Member]]] = deque()
    items = job.source.items()
    try:
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(job,)) as pool:
            while chunk := list(islice(items, CHUNK)):
                waiting.append(pool.submit(_convert, chunk))
                if len(waiting) > AHEAD * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        reason = "a converting process was killed, as happens when memory runs out; write fewer --processes"
        raise DataError(reason) from error


def encode(sample: Sample, dtype: str) -> dict[str, bytes]:
    """The members of a sample by field: pictures, `regions.npz`, `json`. ValueError if its regions are broken."""
    fields = dict([*([sample.picture] if sample.picture else []), *sample.more])
    if sample.regions:
        fields["regions.npz"] = write_regions(sample.regions, dtype)
    fields["json"] = json.dumps(sample.record, ensure_ascii=False).encode()
    return fields


def write(members: Iterable[Member], layout: Layout, named: int = 10) -> Written:
    """Write members that are bytes already; see `make`."""
    _make_folder(layout.folder)
    _require_free(layout)
    written = _write_all(members, layout, named)
    if not written.samples:
        raise DataError(_nothing(written.broken, written.named))
    return written


def _nothing(broken: int, named: Sequence[tuple[str, str]]) -> str:
    why = f"all {broken} are broken; the first, '{named[0][0]}': {named[0][1]}" if named else "there is none"
    return f"no sample could be written: {why}"


def _write_all(members: Iterable[Member], layout: Layout, named: int, name: str = "") -> Written:
    """Into a scratch folder, then into place; the only shard under `name`, if one is given."""
    broken, first = 0, list[tuple[str, str]]()
    try:
        with _Scratch(layout.folder) as scratch:
            with closing(_Writer(scratch, layout)) as writer, tqdm(unit="sample", disable=None) as progress:
                for member in members:
                    reason = member.reason or writer.add(member)
                    broken += bool(reason)
                    if reason and len(first) < named:
                        first.append((member.key, reason))
                    progress.update()
            shards = [layout.folder / (name or path.name) for path in writer.paths]
            for old, new in zip(writer.paths, shards, strict=True):
                os.replace(old, new)
    except OSError as error:  # a full disk, a source that may not be read
        raise DataError(f"no shards in {layout.folder}: {error}; mend that and run it again") from error
    for shard in shards:
        load_index(shard)
    return Written(shards, writer.samples, broken, first)


def rewrite(shards: Shards, folder: Path, change: Callable[[range], Iterator[Member]], named: int = 10) -> Written:
    """Copies of `shards` in `folder`, shard by shard and under the same names, of what `change` makes of their samples.

    `change` is given the numbers of a shard's samples. Each copy is written whole or not at all; the rest is as in
    `make`.
    """
    _make_folder(folder)
    names = [path.name for path in shards.paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two shards are named {twice}; write their copies to two folders")
    if there := [folder / name for name in names if (folder / name).exists()]:
        raise ConfigError(f"{there[0]} is there already; write another --to, or remove the old shards")
    done: list[Written] = []
    for number, path in enumerate(shards.paths):
        samples = range(shards.start(number), shards.start(number + 1))
        layout = Layout(folder, "shard", samples=max(1, len(samples)))
        done.append(_write_all(change(samples), layout, named, path.name))
    if not sum(each.samples for each in done):
        raise DataError(_nothing(sum(each.broken for each in done), [pair for each in done for pair in each.named]))
    return Written(
        [path for each in done for path in each.shards],
        sum(each.samples for each in done),
        sum(each.broken for each in done),
        [pair for each in done for pair in each.named][:named],
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be made ({error.strerror}); write a folder that can") from error


def _require_free(layout: Layout) -> None:
    there = sorted(layout.folder.glob(f"{layout.prefix}-[0-9]*.tar"))
    if there:
        raise ConfigError(f"{there[0]} is there already; write another --to or --prefix, or remove the old shards")


class _Scratch:
    """A hidden folder beside the shards, which ends with the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        try:
            self.path = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder))
        except OSError as error:
            reason = f"--to {self.folder} cannot be written ({error.strerror}); write a folder that can"
            raise ConfigError(reason) from error
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass
class _Writer:
    """Fills one shard after the other."""

    folder: Path
    layout: Layout
    samples: int = 0
    paths: list[Path] = field(default_factory=list)
    _tar: tarfile.TarFile | None = None
    _within: int = 0  # samples in the open shard
    _keys: set[str] = field(default_factory=set)

    def add(self, member: Member) -> str:
        """Write a sample; returns why not, if so."""
        if member.key in self._keys:
            return f"its key '{member.key}' is that of an earlier one"
        self._keys.add(member.key)
        size = sum(map(len, member.fields.values()))
        if self._tar and (self._within >= self.layout.samples or self._full(size)):
            self.close()
        if not self._tar:
            self.paths.append(self.folder / f"{self.layout.prefix}-{len(self.paths):06d}.tar")
            self._tar = tarfile.TarFile(self.paths[-1], "w", format=tarfile.GNU_FORMAT)  # names of any length
            self._within = 0
        for name, data in member.fields.items():
            _add(self._tar, f"{member.key}.{name}", data)
        self._within += 1
        self.samples += 1
        return ""

    def _full(self, size: int) -> bool:
        return self._tar is not None and self._tar.offset + size > self.layout.megabytes * 2**20

    def close(self) -> None:
        """End the open shard, if there is one."""
        if self._tar:
            self._tar.close()
            self._tar = None


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without date, owner or anything else that differs from one machine to another."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))


def key_of(name: str) -> str:
    """A sample's key: `name` with every sign that means something in a shard's member names made a `_`."""
    key = re.sub(r"[^\w/-]", "_", name).strip("/")
    return re.sub(r"(^|/)__", r"\1_", key) or "_"  # WebDataset's own members start with two
