"""Look into shards: is every sample sound (`verify`), and what do they hold (`describe`)?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vlscale.data import detections
from vlscale.data.arrays import read_arrays
from vlscale.data.decode import decode, picture_size
from vlscale.data.samples import PICTURE_FIELDS, BrokenSampleError, Sentence, sentences
from vlscale.data.shards import Shards, expand
from vlscale.errors import DataError

ENDS = ("jpg", "jpeg", "png", "webp")
VIDEOS = {"gif": (0, b"GIF8"), "mp4": (4, b"ftyp")}  # field -> where its mark stands
NAMED = 1_000  # problems that a report names; all are counted
EXAMPLES = 3


class Problem(NamedTuple):
    """Something that training would stumble over."""

    kind: str  # picture, json, caption, regions, ... : what the counts go by
    shard: str
    key: str  # of the sample; empty where the whole shard is meant
    reason: str


class Report(NamedTuple):
    """What `verify` found."""

    shards: int
    samples: int
    members: int
    counts: dict[str, int]  # problems by kind
    problems: list[Problem]  # the first `NAMED`


def verify(patterns: str | Path | Sequence[str | Path], quick: bool = False) -> Report:
    """Read every member of every sample and look at it; nothing stops at the first fault.

    `quick` takes a picture by its header and regions by their shapes. Fields that we do not know are read only.
    DataError if a pattern matches nothing.
    """
    paths = expand(patterns)
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    samples = members = 0
    for path in paths:
        try:
            shards = Shards([path])
        except DataError as error:
            counts["shard"] += 1
            problems.append(Problem("shard", str(path), "", str(error)))
            continue
        samples += len(shards)
        for i in tqdm(range(len(shards)), desc=path.name, unit="sample", disable=None):
            members += len(shards.fields(i))
            for kind, reason in _sample_faults(shards, i, quick):
                counts[kind] += 1
                if len(problems) < NAMED:
                    problems.append(Problem(kind, str(path), shards.key(i), reason))
    return Report(len(paths), samples, members, dict(counts.most_common()), problems)


def _sample_faults(shards: Shards, i: int, quick: bool) -> Iterator[tuple[str, str]]:
    """(kind, reason) of whatever is wrong with sample `i`."""
    try:
        raw = shards.read(i)
    except DataError as error:
        yield "shard", str(error)
        return
    for field in raw:
        kind = kind_of(field)
        try:
            _check(kind, field, raw, quick)
        except ValueError as error:
            yield kind, f"{field}: {error}"
    if not any(kind_of(field) in ("picture", "video", "regions", "frames") for field in raw):
        yield "no visual", f"there is no picture, video, regions.npz or frames.npz, only {', '.join(raw)}"
    if "caption" in _record(raw) or "txt" in raw:
        try:
            sentences(shards, i)
        except BrokenSampleError as error:
            yield "caption", error.reason


def kind_of(field: str) -> str:
    """What a member is: picture, video, json, txt, regions, frames or other."""
    if field in PICTURE_FIELDS or field.split(".")[-1] in ENDS:
        return "picture"
    if field in VIDEOS:
        return "video"
    return {"json": "json", "txt": "txt", "regions.npz": "regions", "frames.npz": "frames"}.get(field, "other")


def _check(kind: str, field: str, raw: dict[str, bytes], quick: bool) -> None:
    """ValueError with what is wrong with one member."""
    data = raw[field]
    if kind == "picture":
        picture_size(data) if quick else decode(data)
    elif kind == "video":
        place, mark = VIDEOS[field]
        if data[place : place + len(mark)] != mark:
            raise ValueError(f"it is no {field}")
    elif kind == "json":
        _check_record(data)
    elif kind == "txt":
        data.decode()
    elif kind == "regions":
        detections.read_regions(data, _size(raw), numbers=not quick)
    elif kind == "frames":
        _check_frames(data)


def _check_frames(data: bytes) -> None:
    arrays = read_arrays(data)
    features, times = arrays.get("features"), arrays.get("times")
    if features is None or features.ndim != 2 or not features.shape[0]:
        raise ValueError("it has no features of the shape [frames, width]")
    if not np.isfinite(features).all():
        raise ValueError("features hold a number that is not finite")
    if times is not None and (times.shape != features.shape[:1] or not np.isfinite(times).all()):
        raise ValueError(f"times are not {features.shape[0]} finite numbers, one per frame")


def _check_record(data: bytes) -> None:
    """The parts of the json that we read, apart from its captions."""
    try:
        record = json.loads(data)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}; it should be an object")
    tags = record.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError("tags should be a list of strings")
    for name in ("width", "height"):
        if not isinstance(record.get(name, 1), int) or record.get(name, 1) < 1:
            raise ValueError(f"{name} is {record[name]!r}; it should be a number of pixels")
    pairs = record.get("qa", [])
    if not isinstance(pairs, list) or not all(_is_qa(pair) for pair in pairs):
        raise ValueError('qa should be a list of {"q": question, "a": answer}, both of them text')


def _is_qa(pair: object) -> bool:
    return isinstance(pair, dict) and all(isinstance(pair.get(name), str) and pair[name].strip() for name in "qa")


def _record(raw: dict[str, bytes]) -> dict[str, Any]:
    """The json of a sample; empty where it has none that can be used."""
    try:
        record = json.loads(raw.get("json", b"{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _size(raw: dict[str, bytes]) -> tuple[int, int] | None:
    """(width, height) of the json, which counts where regions.npz does not tell."""
    record = _record(raw)
    sizes = record.get("width"), record.get("height")
    return (sizes[0], sizes[1]) if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None


class _Tally:
    """What `describe` counts, sample by sample."""

    def __init__(self) -> None:
        self.fields: Counter[str] = Counter()
        self.words: list[int] = []
        self.captions_per_sample: list[int] = []
        self.sides: list[tuple[int, int]] = []
        self.regions: list[int] = []
        self.widths: Counter[int] = Counter()
        self.classes = self.attributes = self.questions = self.unreadable = 0
        self.answers: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []

    def add(self, key: str, raw: dict[str, bytes], texts: list[Sentence]) -> None:
        """Count one sample; `texts` are its captions and questions."""
        self.fields.update(raw.keys())
        captions = [each.text for each in texts if each.answer is None]
        asked = [(each.text, each.answer) for each in texts if each.answer is not None]
        self.words += [len(caption.split()) for caption in captions]
        self.captions_per_sample.append(len(captions))
        self.questions += len(asked)
        self.answers.update(answer for _, answer in asked)
        for field in raw:
            try:
                self._add_member(kind_of(field), field, raw)
            except ValueError:
                self.unreadable += 1
        if len(self.examples) < EXAMPLES:
            tags = _record(raw).get("tags") or []
            shown = {
                "captions": captions[:2],
                "questions": asked[:2],
                "tags": tags[:5] if isinstance(tags, list) else [],
            }
            self.examples.append(
                {"key": key, "fields": list(raw), **{name: some for name, some in shown.items() if some}}
            )

    def _add_member(self, kind: str, field: str, raw: dict[str, bytes]) -> None:
        if kind == "picture":
            self.sides.append(picture_size(raw[field]))
        elif kind == "regions":
            found = detections.read_regions(raw[field], _size(raw), numbers=False)
            self.regions.append(len(found.features))
            self.widths[found.features.shape[-1]] += 1
            if found.class_probs is not None:
                self.classes = max(self.classes, found.class_probs.shape[-1])
            elif found.classes is not None and found.classes.size:
                self.classes = max(self.classes, int(found.classes.max()) + 1)
            if found.attributes is not None and found.attributes.size:
                self.attributes = max(self.attributes, int(found.attributes.max()) + 1)


def _texts(shards: Shards, i: int) -> list[Sentence]:
    """The captions and questions of sample `i`; none where they are missing or broken."""
    try:
        return sentences(shards, i, questions=True)
    except BrokenSampleError:
        return []


def describe(patterns: str | Path | Sequence[str | Path]) -> dict[str, Any]:
    """What the shards hold, as figures that JSON can hold; None where there is nothing to count.

    Lengths are words between spaces; the number of classes is the width of class_probs, else the highest class
    seen plus one. DataError if a shard cannot be read.
    """
    shards = Shards(patterns)
    tally = _Tally()
    for i in tqdm(range(len(shards)), desc="samples", unit="sample", disable=None):
        tally.add(shards.key(i), shards.read(i), _texts(shards, i))
    size = sum(path.stat().st_size for path in shards.paths)
    return {
        "shards": len(shards.paths),
        "bytes": size,
        "samples": len(shards),
        "fields": dict(tally.fields.most_common()),
        "captions": len(tally.words),
        "captions_per_sample": _spread(tally.captions_per_sample) if tally.words else None,
        "caption_words": _spread(tally.words),
        "picture_width": _spread([width for width, _ in tally.sides]),
        "picture_height": _spread([height for _, height in tally.sides]),
        "regions_per_sample": _spread(tally.regions),
        "feature_width": {str(width): count for width, count in tally.widths.most_common()} or None,
        "classes": tally.classes or None,
        "attributes": tally.attributes or None,
        "questions": tally.questions,
        "answers": len(tally.answers),
        "commonest_answers": dict(tally.answers.most_common(5)) or None,
        "unreadable_members": tally.unreadable,
        "examples": tally.examples,
    }


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    """Least, median, 95th percentile and most."""
    if not values:
        return None
    least, median, most_of, most = np.percentile(np.asarray(values), [0, 50, 95, 100]).tolist()
    return {"min": least, "median": median, "p95": most_of, "max": most}
