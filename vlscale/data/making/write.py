"""Samples to tar shards: each whole or not at all, and the same bytes for the same samples."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from itertools import islice
from operator import length_hint
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from vlscale.data import parallel
from vlscale.data.detections import Detections, write_regions
from vlscale.data.making import checksums
from vlscale.data.making.frames import Stream, write_frames
from vlscale.data.making.manifest import Finished, Manifest
from vlscale.data.making.shrink import Shrink
from vlscale.data.shards import Shards, load_index
from vlscale.errors import ConfigError, DataError

_Item = TypeVar("_Item")


class Sample(NamedTuple):
    """One sample before it is bytes."""

    record: dict[str, object]  # what its json holds
    picture: tuple[str, bytes] | None = None  # field (`jpg`, `png`, `webp`) and the bytes as they are
    regions: Detections | None = None
    more: tuple[tuple[str, bytes], ...] = ()  # further members: the second picture (`1.jpg`), a clip (`mp4`)
    frames: tuple[Stream, ...] = ()  # features of its frames, a stream for each rate


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
    before: int = 0  # samples that an earlier, interrupted run had written


class Member(NamedTuple):
    """A sample as bytes, or why there is none."""

    key: str
    fields: dict[str, bytes]
    reason: str = ""


@dataclass(frozen=True)
class Layout:
    """Where shards go and what they are like; a shard ends at whichever limit it meets first."""

    folder: Path
    prefix: str
    samples: int = 5_000
    megabytes: float = float("inf")
    dtype: str = "float16"  # of features and class_probs
    processes: int = 1
    resize: int | None = None  # pixels of a picture's short side at most
    quality: int = 95  # of the JPEGs that `resize` writes

    def __post_init__(self) -> None:
        """ConfigError for a number or a name that cannot be."""
        for name, least in (("samples", 1), ("processes", 1), ("megabytes", 0.001)):
            if getattr(self, name) < least:
                option = "samples_per_shard" if name == "samples" else name
                raise ConfigError(f"--{option} is {getattr(self, name)}; write {least} or more")
        if not re.fullmatch(r"[\w-]+", self.prefix):
            raise ConfigError(f"--prefix '{self.prefix}' cannot start a shard's name; write letters, digits, _ and -")
        require_dtype(self.dtype)
        self.shrink()

    def shrink(self) -> Shrink | None:
        """What makes pictures smaller, if something does."""
        return None if self.resize is None else Shrink(self.resize, self.quality)

    def options(self) -> dict[str, object]:
        """What the shards' bytes depend on, as JSON can hold it."""
        said = {name: value for name, value in asdict(self).items() if name not in ("folder", "prefix", "processes")}
        said["samples_per_shard"] = said.pop("samples")
        return {**said, "megabytes": None if self.megabytes == float("inf") else self.megabytes}


def require_dtype(dtype: str) -> None:
    """ConfigError unless features can be written as `dtype`."""
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"--dtype is '{dtype}'; write float16 or float32")


def make(source: Source[Any], layout: Layout, named: int = 10, origin: Mapping[str, object] | None = None) -> Written:
    """Write all samples of `source`, in its order, their checksums, and the index that training reads first.

    Each shard is put in its place when it is whole. Ended at any point, the same call goes on after the last of them,
    and in the end the bytes are those of one run, in any number of processes. Broken samples are left out, listed in
    `PREFIX.broken.jsonl`, and the first `named` of them named. `origin` tells what the source was opened from: where
    it or the layout differs from that of the shards there, going on is refused. ConfigError for this and for shards
    that nothing is known of; DataError if no sample could be written, or the disk is full.
    """
    manifest = Manifest(layout.folder, layout.prefix, {**(origin or {}), **layout.options()})
    try:
        with _folder(layout.folder), manifest:
            before = sum(each.samples for each in manifest.finished)
            _write(source, layout, manifest)
    except OSError as error:  # a full disk, a source that may not be read
        done = f"it goes on after the {len(manifest.finished)} shard(s) that are whole" if manifest.finished else ""
        reason = f"no more shards in {layout.folder}: {error}; mend that and run it again"
        raise DataError(f"{reason}{done and ', ' + done}") from error
    paths = [layout.folder / each.shard for each in manifest.finished]
    samples = sum(each.samples for each in manifest.finished)
    return Written(paths, samples, manifest.broken, manifest.named[:named], before)


def _write(source: Source[Any], layout: Layout, manifest: Manifest) -> None:
    """All of `source` that the manifest has not, and then its end."""
    items = source.items()
    total = length_hint(items) or None
    with _Writer(layout, manifest) as writer:
        writer.pass_over(items)
        if manifest.ended:
            return
        progress = tqdm(total=total, initial=writer.items, desc=layout.prefix, unit="sample", disable=None)
        with closing(_convert(source, items, layout)) as members, progress:
            for member in members:
                if writer.add(member):
                    progress.set_postfix(broken=manifest.broken, refresh=False)
                progress.update()
        writer.close()
    if not manifest.finished:
        raise DataError(_nothing(manifest.broken, manifest.named))
    checksums.add_sums(layout.folder, {each.shard: each.sha256 for each in manifest.finished})
    manifest.end(writer.items, writer.keys)


def _nothing(broken: int, named: Sequence[tuple[str, str]]) -> str:
    why = f"all {broken} are broken; the first, '{named[0][0]}': {named[0][1]}" if named else "there is none"
    return f"no sample could be written: {why}"


def _convert(source: Source[Any], items: Iterator[tuple[str, Any]], layout: Layout) -> Generator[Member, None, None]:
    """Samples as bytes, in the items' order."""
    return parallel.ordered(_Job(source, layout.dtype, layout.shrink()), items, layout.processes)


@dataclass(frozen=True)
class _Job:
    """From an item to bytes."""

    source: Source[Any]
    dtype: str
    shrink: Shrink | None

    def __call__(self, named: tuple[str, Any]) -> Member:
        name, item = named
        try:
            sample = self.source.sample(name, item)
            return Member(key_of(name), encode(self.shrink(sample) if self.shrink else sample, self.dtype))
        except ValueError as error:
            return Member(key_of(name), {}, str(error))


def encode(sample: Sample, dtype: str) -> dict[str, bytes]:
    """The members of a sample by field: pictures, clip, `regions.npz`, `frames.npz`, `json`. ValueError if broken."""
    fields = dict([*([sample.picture] if sample.picture else []), *sample.more])
    if sample.regions:
        fields["regions.npz"] = write_regions(sample.regions, dtype)
    if sample.frames:
        fields["frames.npz"] = write_frames(sample.frames, dtype)
    fields["json"] = json.dumps(sample.record, ensure_ascii=False).encode()
    return fields


class _Writer:
    """Fills one shard after the other and notes each that is whole; a context manager."""

    def __init__(self, layout: Layout, manifest: Manifest) -> None:
        self._layout = layout
        self._manifest = manifest
        self.items = manifest.items  # of the source, up to now
        self._seen = sha256()  # of their keys
        self._keys = _keys([] if manifest.ended else [layout.folder / each.shard for each in manifest.finished])
        self._tar: _Tar | None = None
        self._mark: dict[str, Any] = {}  # how far the source was at the open shard's last sample

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar:
            self._tar.drop()

    def pass_over(self, items: Iterator[tuple[str, Any]]) -> None:
        """Take from `items` what is done already. DataError if these are others, or more than there were."""
        for name, _ in islice(items, self.items):
            self._seen.update(key_of(name).encode() + b"\n")
        more = self._manifest.ended and next(items, None) is not None
        if more or (self.items and self.keys != self._manifest.keys):
            place = f"{self._layout.prefix} shards in {self._layout.folder}"
            raise DataError(
                f"the source no longer holds what the {place} were made of; write another --to or --prefix, "
                "or remove the old shards"
            )

    @property
    def keys(self) -> str:
        """The sha256 of the keys of all items up to now."""
        return self._seen.hexdigest()

    def add(self, member: Member) -> str:
        """Write a sample; returns why not, if so."""
        self.items += 1
        self._seen.update(member.key.encode() + b"\n")
        twice = f"its key '{member.key}' is that of an earlier one" if member.key in self._keys else ""
        if reason := member.reason or twice:
            self._manifest.leave_out(member.key, reason)
            return reason
        self._keys.add(member.key)
        if self._tar and self._is_full(self._tar, member):
            self.close()
        if not self._tar:
            self._tar = _Tar(self._layout.folder / self._manifest.shard(len(self._manifest.finished)))
        self._tar.add(member)
        self._mark = {
            "items": self.items,
            "keys": self.keys,
            "broken": self._manifest.broken,
        }
        return ""

    def _is_full(self, tar: _Tar, member: Member) -> bool:
        size = sum(map(len, member.fields.values()))
        return tar.samples >= self._layout.samples or tar.bytes + size > self._layout.megabytes * 2**20

    def close(self) -> None:
        """End the open shard, if there is one."""
        if self._tar:
            path = self._tar.path
            digest = self._tar.close()
            samples, self._tar = self._tar.samples, None
            self._manifest.add(Finished(path.name, path.stat().st_size, digest, samples, **self._mark))
            load_index(path)


def _keys(paths: Sequence[Path]) -> set[str]:
    """The keys of all samples in shards."""
    if not paths:
        return set()
    shards = Shards(paths)
    return {shards.key(i) for i in range(len(shards))}


class _Tar:
    """One shard, which has a hidden name until it is whole and on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self._hidden = path.with_name(f".{path.name}.part")
        self._tar = tarfile.TarFile(self._hidden, "w", format=tarfile.GNU_FORMAT)  # names of any length

    @property
    def bytes(self) -> int:
        """How many have been written."""
        return self._tar.offset

    def add(self, member: Member) -> None:
        """Write a sample's members, without date, owner or anything else that differs between machines."""
        for name, data in member.fields.items():
            info = tarfile.TarInfo(f"{member.key}.{name}")
            info.size = len(data)
            self._tar.addfile(info, BytesIO(data))
        self.samples += 1

    def close(self) -> str:
        """Put it in its place; its sha256."""
        self._tar.close()
        with open(self._hidden, "rb") as file:
            os.fsync(file.fileno())
        digest = checksums.sha256(self._hidden)
        os.replace(self._hidden, self.path)
        return digest

    def drop(self) -> None:
        """Leave nothing of it."""
        with suppress(OSError):  # a full disk takes the rest of the last block no better than the first
            self._tar.close()
        self._hidden.unlink(missing_ok=True)


def rewrite(
    shards: Shards,
    folder: Path,
    change: Callable[[range], Iterator[Member]],
    named: int = 10,
    whole: Collection[str] = (),
) -> Written:
    """Copies of `shards` in `folder`, shard by shard and under the same names, of what `change` makes of their samples.

    `change` is given the numbers of a shard's samples. Each copy is written whole or not at all; broken samples are
    left out and the first `named` of them named. Copies named in `whole` are there already. ConfigError if the folder
    holds another of the shards, DataError if no sample could be written.
    """
    names = [os.path.basename(path) for path in shards.paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two shards are named {twice}; write their copies to two folders")
    if there := [folder / name for name in names if name not in whole and (folder / name).exists()]:
        raise ConfigError(f"{there[0]} is there already; write another --to, or remove the old shards")
    sums: dict[str, str] = {}
    broken: list[tuple[str, str]] = []
    samples = 0
    try:
        with _folder(folder), tqdm(total=len(shards), unit="sample", disable=None) as progress:
            for number, name in enumerate(names):
                if name in whole:
                    sums[name] = checksums.sha256(folder / name)
                    samples += (before := len(Shards(folder / name)))
                    progress.update(before)
                    continue
                members = change(range(shards.start(number), shards.start(number + 1)))
                written, digest = _copy(folder / name, members, broken, progress)
                samples += written
                sums.update({name: digest} if written else {})
            if not samples:
                raise DataError(_nothing(len(broken), broken))
            checksums.add_sums(folder, sums)
    except OSError as error:
        raise DataError(f"no more shards in {folder}: {error}; mend that and run it again") from error
    return Written([folder / name for name in sums], samples, len(broken), broken[:named])


def _copy(path: Path, members: Iterator[Member], broken: list[tuple[str, str]], progress: tqdm[Any]) -> tuple[int, str]:
    """Write one shard, if it has samples that are not broken: their number and its sha256."""
    try:
        tar = _Tar(path)
    except OSError as error:
        reason = f"--to {path.parent} cannot be written ({error.strerror}); write a folder that can"
        raise ConfigError(reason) from error
    try:
        for member in members:
            if member.reason:
                broken.append((member.key, member.reason))
            else:
                tar.add(member)
            progress.update()
        if tar.samples:
            digest = tar.close()
            load_index(path)
            return tar.samples, digest
        return 0, ""
    finally:
        tar.drop()


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Makes it, and takes it away again where the work fails and has put nothing there."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be made ({error.strerror}); write a folder that can") from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()
        raise


def key_of(name: str) -> str:
    """A sample's key: `name` with every sign that means something in a shard's member names made a `_`."""
    key = re.sub(r"[^\w/-]", "_", name).strip("/")
    return re.sub(r"(^|/)__", r"\1_", key) or "_"  # WebDataset's own members start with two
