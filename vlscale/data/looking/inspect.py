"""Is every sample of some shards sound? Nothing stops at the first fault."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vlscale.data import detections, parallel
from vlscale.data.clip_files import read_tracks
from vlscale.data.clips import Clip
from vlscale.data.decode import Crop, Pixels, decode, picture_size
from vlscale.data.making import checksums
from vlscale.data.samples import (
    CLIP_FIELDS,
    FRAME_FIELD,
    MAX_MEMBER_BYTES,
    PICTURE_FIELDS,
    REGION_FIELD,
    WORD_FIELD,
    BrokenSampleError,
    read_json,
    sentences,
)
from vlscale.data.shards import Patterns, Shards, expand
from vlscale.data.storage.stores import PIPE, StoreOptions, Stores, scheme, shown
from vlscale.errors import ConfigError, DataError

SEEN = ("picture", "video", "regions", "frames", "visual words")
ENDS = ("jpg", "jpeg", "png", "webp")
NAMED = 1_000  # problems that a report names, and the first few of each kind; all are counted
OF_EACH_KIND = 10
STRETCH = 32  # samples that a process looks at in one go
WORTHWHILE = 16  # such stretches from which on other processes help


class Problem(NamedTuple):
    """Something that training would stumble over."""

    kind: str  # picture, json, caption, regions, key, checksum, ... : what the counts go by
    shard: str
    key: str  # of the sample; empty where the whole shard is meant
    reason: str
    byte: int | None = None  # of the shard, at which the member that is meant begins


class Report(NamedTuple):
    """What `verify` found."""

    shards: int
    samples: int
    members: int
    counts: dict[str, int]  # problems by kind
    problems: list[Problem]  # the first `NAMED`, and of each kind the first `OF_EACH_KIND`
    checksums: int  # shards whose bytes are those that `SHA256SUMS` tells


def verify(
    patterns: Patterns,
    quick: bool = False,
    processes: int = 1,
    write_checksums: bool = False,
    stores: StoreOptions | None = None,
) -> Report:
    """Read every member of every sample and look at it, and compare shards with the `SHA256SUMS` beside them.

    Headers are scanned anew, whatever index there is. `quick` takes a picture by its header and regions by their
    shapes, and no checksums. Fields that we do not know are read only. With `write_checksums`, shards without a
    fault get their line in `SHA256SUMS`. `stores` tell how remote shards are read. DataError if a pattern matches
    nothing.
    """
    parallel.require_processes(processes)
    urls = expand(patterns, stores)
    if write_checksums and (quick or any(scheme(url) or url.startswith(PIPE) for url in urls)):
        raise ConfigError("--write_checksums is for whole reads of local shards; leave out --quick, copy remote ones")
    found = _Found()
    with TemporaryDirectory() as scratch:
        whole = _Whole(Path(scratch), stores or StoreOptions(), sums=not quick, needed=write_checksums)
        looked = _look_at_shards(urls, whole, processes)
        for shard in looked:
            found.add(Problem("shard", shown(shard.url), "", shard.fault) if shard.fault else None)
        matched = _compare(looked, found)
        sound = [shard.url for shard in looked if not shard.fault]
        samples = members = 0
        if sound:
            samples, members = _look_at_samples(Shards(sound, Path(scratch), stores), quick, processes, found)
    if write_checksums:
        faulty = {problem.shard for problem in found.problems}
        _write(looked, faulty if len(found.problems) < NAMED else {shard.url for shard in looked})
    return Report(len(urls), samples, members, dict(found.counts.most_common()), found.problems, matched)


def spread(problems: Sequence[Problem], number: int) -> list[Problem]:
    """At most `number` of them, of as many kinds as there are, in their order."""
    nth: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []  # which of its kind, place
    for place, problem in enumerate(problems):
        turns.append((nth[problem.kind], place))
        nth[problem.kind] += 1
    return [problems[place] for place in sorted(place for _, place in sorted(turns)[:number])]


class _Found:
    """Problems, counted by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[Problem] = []

    def add(self, problem: Problem | None) -> None:
        if problem:
            self.counts[problem.kind] += 1
            if len(self.problems) < NAMED or self.counts[problem.kind] <= OF_EACH_KIND:
                self.problems.append(problem)


class _Shard(NamedTuple):
    """One shard as a whole."""

    url: str
    fault: str = ""
    sha256: str = ""
    told: str | None = None  # by `SHA256SUMS`


@dataclass(frozen=True)
class _Whole:
    """Scans a shard's headers, which leaves its index in `folder`, and adds up its bytes."""

    folder: Path
    stores: StoreOptions
    sums: bool
    needed: bool  # even where there is nothing to compare with

    def __call__(self, url: str) -> _Shard:
        try:
            Shards([url], self.folder, self.stores)
            stores = Stores(self.stores)
            told = checksums.told(url, stores) if self.sums and not url.startswith(PIPE) else None
            return _Shard(url, "", checksums.sha256_of(url, stores) if told or self.needed else "", told)
        except DataError as error:
            return _Shard(url, str(error))
        except OSError as error:
            return _Shard(url, f"shard {url} cannot be read ({error.strerror}); mend its path or rights")


def _look_at_shards(urls: Sequence[str], job: _Whole, processes: int) -> list[_Shard]:
    with closing(parallel.ordered(job, iter(urls), processes, chunk=1, few=WORTHWHILE)) as looked:
        return list(tqdm(looked, total=len(urls), desc="shards", unit="shard", disable=None))


def _compare(looked: Sequence[_Shard], found: _Found) -> int:
    """How many shards have the checksum that they should."""
    matched = 0
    for shard in looked:
        if shard.told and shard.told == shard.sha256:
            matched += 1
        elif shard.told:
            reason = (
                f"its sha256 is {shard.sha256}, and {checksums.SUMS} says {shard.told}: it was damaged or changed; "
                "copy it again, or take its line out"
            )
            found.add(Problem("checksum", shown(shard.url), "", reason))
    return matched


def _write(looked: Sequence[_Shard], faulty: set[str]) -> None:
    by_folder: dict[Path, dict[str, str]] = {}
    for shard in looked:
        if shard.url not in faulty:
            by_folder.setdefault(Path(shard.url).parent, {})[os.path.basename(shard.url)] = shard.sha256
    for folder, sums in by_folder.items():
        try:
            checksums.add_sums(folder, sums)
        except OSError as error:
            raise ConfigError(f"{folder / checksums.SUMS} cannot be written ({error.strerror})") from error


class _Looked(NamedTuple):
    """What became of a stretch of samples."""

    samples: int
    members: int
    hashes: NDArray[np.uint64]  # of the keys
    problems: list[Problem]


def _look_at_samples(shards: Shards, quick: bool, processes: int, found: _Found) -> tuple[int, int]:
    """(samples, members) that were looked at."""
    stretches = (
        (shard, range(start, min(start + STRETCH, shards.start(shard + 1))))
        for shard in range(len(shards.paths))
        for start in range(shards.start(shard), shards.start(shard + 1), STRETCH)
    )
    hashes: list[NDArray[np.uint64]] = []
    members = 0
    with (
        closing(parallel.ordered(_Samples(shards, quick), stretches, processes, chunk=1, few=WORTHWHILE)) as looked,
        tqdm(total=len(shards), desc="samples", unit="sample", disable=None) as progress,
    ):
        for part in looked:
            members += part.members
            hashes.append(part.hashes)
            for problem in part.problems:
                found.add(problem)
            progress.update(part.samples)
            progress.set_postfix(problems=found.counts.total(), refresh=False)
    for problem in _same_keys(shards, np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)):
        found.add(problem)
    return len(shards), members


def _same_keys(shards: Shards, hashes: NDArray[np.uint64]) -> Iterator[Problem]:
    """Samples whose key an earlier sample of another shard has. By hashes first: all keys would take much memory."""
    values, counts = np.unique(hashes, return_counts=True)
    first: dict[str, int] = {}
    for i in np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist():
        key = shards.key(i)
        if key in first:
            yield Problem("key", shards.shard(i), key, f"its key is that of a sample of {shards.shard(first[key])} too")
        first.setdefault(key, i)


@dataclass(frozen=True)
class _Samples:
    """Looks at a stretch of one shard's samples."""

    shards: Shards
    quick: bool

    def __call__(self, stretch: tuple[int, range]) -> _Looked:
        shard, numbers = stretch
        members, problems = 0, []
        for i in numbers:
            members += len(self.shards.fields(i))
            for kind, field, reason in _faults(self.shards, i, self.quick):
                byte = _offset(self.shards, shard, i, field)
                problems.append(Problem(kind, self.shards.paths[shard], self.shards.key(i), reason, byte))
        hashes = [int.from_bytes(blake2b(self.shards.key(i).encode(), digest_size=8).digest(), "big") for i in numbers]
        return _Looked(len(numbers), members, np.array(hashes, dtype=np.uint64), problems)


def _offset(shards: Shards, shard: int, i: int, field: str) -> int:
    """Where a member begins in its shard, in bytes; the sample's first where no field is meant."""
    fields = shards.fields(i)
    row = int(shards.index(shard).first[i - shards.start(shard)])
    return int(shards.index(shard).offset[row + (fields.index(field) if field in fields else 0)])


def _faults(shards: Shards, i: int, quick: bool) -> Iterator[tuple[str, str, str]]:
    """(kind, field, reason) of whatever is wrong with sample `i`."""
    sizes = shards.sizes(i)
    small = [field for field, size in sizes.items() if size <= MAX_MEMBER_BYTES]
    try:
        raw = shards.read(i, small)
    except DataError as error:
        yield "shard", "", str(error)
        return
    faulty: set[str] = set()
    for field, size in sizes.items():
        kind = kind_of(field)
        if field not in raw:
            yield kind, field, f"{field}: it has {size} bytes; at most {MAX_MEMBER_BYTES} are read"
            continue
        try:
            _check(kind, field, raw, quick)
        except ValueError as error:
            faulty.add(field)
            yield kind, field, f"{field}: {error}"
    if not any(kind_of(field) in SEEN for field in sizes):
        yield "no visual", "", f"there is no picture, video, regions.npz or frames.npz, only {', '.join(sizes)}"
    record = record_of(raw)
    told = any(name in record for name in ("caption", "sentences", "sub"))
    if told or ("txt" in raw and not faulty & {"json", "txt"}):  # else it is told already
        try:
            sentences(shards, i)
        except BrokenSampleError as error:
            yield "caption", "json" if "json" in raw else "txt", error.reason


def kind_of(field: str) -> str:
    """What a member is: picture, video, json, txt, regions, frames, visual words or other."""
    if field in PICTURE_FIELDS or field.split(".")[-1] in ENDS:
        return "picture"
    if field in CLIP_FIELDS:
        return "video"
    named = {REGION_FIELD: "regions", FRAME_FIELD: "frames", WORD_FIELD: "visual words"}
    return field if field in ("json", "txt") else named.get(field, "other")


def _check(kind: str, field: str, raw: Mapping[str, bytes], quick: bool) -> None:
    """ValueError with what is wrong with one member."""
    data = raw[field]
    if kind == "picture":
        picture_size(data) if quick else decode(data)
    elif kind == "video":
        clip_frames(data, 1 if quick else 4)
    elif kind == "json":
        _check_record(data)
    elif kind == "txt":
        data.decode()
    elif kind == "regions":
        detections.read_regions(data, size_of(raw), numbers=not quick)
    elif kind == "frames":
        _check_frames(data, "features")
    elif kind == "visual words":
        _check_frames(data, "codes")


def clip_frames(data: bytes, count: int) -> list[Pixels]:
    """`count` frames of a clip, evenly spaced, uint8 RGB [H, W, 3]. ValueError if it cannot be decoded."""
    with Clip(data) as clip:
        whole = Crop(0, 0, clip.height, clip.width, (clip.height, clip.width))
        return list(clip.frames([clip.duration * (n + 0.5) / count for n in range(count)], whole))


def _check_frames(data: bytes, name: str) -> None:
    if any(not np.isfinite(track.rows).all() for track in read_tracks(data, name)):
        raise ValueError("features hold a number that is not finite")


def _check_record(data: bytes) -> None:
    """The parts of the json that we read, apart from its captions."""
    record = read_json(data)
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}; it should be an object")
    tags = record.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError("tags should be a list of strings")
    for name in ("width", "height"):
        if not isinstance(record.get(name, 1), int) or record.get(name, 1) < 1:
            raise ValueError(f"{name} is {record[name]!r}; it should be a number of pixels")
    for name in ("objects", "expressions"):
        listed = record.get(name, [])
        if not isinstance(listed, list) or not all(
            isinstance(each, dict) and _is_box(each.get("box")) for each in listed
        ):
            raise ValueError(f'{name} should be a list of objects whose "box" is four numbers, where they have one')
    pairs = record.get("qa", [])
    if not isinstance(pairs, list) or not all(_is_qa(pair) for pair in pairs):
        raise ValueError('qa should be a list of {"q": question, "a": answer}, both of them text')


def _is_box(box: object) -> bool:
    return box is None or (
        isinstance(box, list) and len(box) == 4 and all(isinstance(n, int | float) and abs(n) < math.inf for n in box)
    )


def _is_qa(pair: object) -> bool:
    return isinstance(pair, dict) and all(isinstance(pair.get(name), str) and pair[name].strip() for name in "qa")


def record_of(raw: Mapping[str, bytes]) -> dict[str, Any]:
    """The json of a sample; empty where it has none that can be used."""
    try:
        record = read_json(raw.get("json", b"{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def size_of(raw: Mapping[str, bytes]) -> tuple[int, int] | None:
    """(width, height) of the json, which counts where regions.npz does not tell."""
    record = record_of(raw)
    sizes = record.get("width"), record.get("height")
    return (sizes[0], sizes[1]) if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None
