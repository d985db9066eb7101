"""What shards hold, in figures: counted by several processes, whose tallies add up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vlscale.data import detections, parallel
from vlscale.data.clip_files import read_tracks
from vlscale.data.clips import Clip
from vlscale.data.decode import picture_size
from vlscale.data.looking.inspect import kind_of, record_of, size_of
from vlscale.data.samples import BrokenSampleError, Sentence, sentences
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError

EXAMPLES = 3
STRETCH = 64  # samples that a process counts at a time
WORTHWHILE = 24  # such stretches from which on other processes help
BINS = 24  # of a histogram at most
# Width over height, where one bin ends and the next begins.
SHAPES = (0, 1 / 2, 2 / 3, 3 / 4, 0.95, 1.05, 4 / 3, 3 / 2, 2, 3, math.inf)


@dataclass
class Tally:
    """What is counted; each Counter is value -> how often it was met."""

    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)  # by field
    member_bytes: Counter[str] = field(default_factory=Counter)  # by field, added up
    caption_words: Counter[int] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)  # of a sample
    sides: Counter[tuple[int, int]] = field(default_factory=Counter)  # width and height of a picture
    regions: Counter[int] = field(default_factory=Counter)  # of a sample
    frames: Counter[int] = field(default_factory=Counter)  # of a sample whose features there are
    seconds: Counter[float] = field(default_factory=Counter)  # of a clip
    feature_widths: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    classes: int = 0  # the most seen
    attributes: int = 0
    questions: int = 0
    statements: int = 0  # a sentence of two pictures, hypotheses, expressions of an object
    unreadable: int = 0

    def add(self, raw: Mapping[str, bytes], texts: Sequence[Sentence]) -> None:
        """Count one sample; `texts` are its captions and questions."""
        self.samples += 1
        captions = [each.text for each in texts if each.answer is None]
        answers = [each.answer for each in texts if each.answer is not None]
        self.caption_words.update(len(caption.split()) for caption in captions)
        self.captions[len(captions)] += 1
        self.questions += len(answers)
        self.statements += len(statements_of(record_of(raw)))
        self.answers.update(answers)
        for name, data in raw.items():
            self.members[name] += 1
            self.member_bytes[name] += len(data)
            try:
                self._add_member(kind_of(name), name, raw)
            except ValueError:
                self.unreadable += 1

    def _add_member(self, kind: str, name: str, raw: Mapping[str, bytes]) -> None:
        if kind == "picture":
            self.sides[picture_size(raw[name])] += 1
        elif kind == "video":
            with Clip(raw[name]) as clip:
                self.seconds[round(clip.duration, 3)] += 1
        elif kind == "frames":
            tracks = read_tracks(raw[name])
            self.frames[max(len(track.rows) for track in tracks)] += 1
            self.feature_widths[sum(track.rows.shape[1] for track in tracks)] += 1
        elif kind == "regions":
            found = detections.read_regions(raw[name], size_of(raw))
            self.regions[len(found.features)] += 1
            self.feature_widths[found.features.shape[-1]] += 1
            if found.class_probs is not None:
                self.classes = max(self.classes, found.class_probs.shape[-1])
            elif found.classes is not None:
                self.classes = max(self.classes, int(found.classes.max(initial=-1)) + 1)
            if found.attributes is not None:
                self.attributes = max(self.attributes, int(found.attributes.max(initial=-1)) + 1)

    def merge(self, other: Tally) -> None:
        """Take up what another one counted."""
        for each in fields(self):
            here, there = getattr(self, each.name), getattr(other, each.name)
            if isinstance(here, Counter):
                here.update(there)
            else:
                together = max(here, there) if each.name in ("classes", "attributes") else here + there
                setattr(self, each.name, together)


@dataclass(frozen=True)
class _Count:
    """Counts a stretch of samples."""

    shards: Shards

    def __call__(self, numbers: Sequence[int]) -> Tally:
        tally = Tally()
        for i in numbers:
            tally.add(self.shards.read(i), texts_of(self.shards, i))
        return tally


def describe(
    patterns: str | Path | Sequence[str | Path] | Shards, limit: int | None = None, processes: int = 1
) -> dict[str, Any]:
    """What the shards hold, as figures that JSON can hold; None where there is nothing to count.

    Lengths are words between spaces; the number of classes is the width of class_probs, else the highest class seen
    plus one. With `limit` only so many samples are looked at, evenly drawn (`described` tells how many). DataError if
    a shard cannot be read.
    """
    parallel.require_processes(processes)
    shards = patterns if isinstance(patterns, Shards) else Shards(patterns)
    numbers = _evenly(len(shards), limit)
    stretches = (numbers[start : start + STRETCH] for start in range(0, len(numbers), STRETCH))
    tally = Tally()
    with (
        closing(parallel.ordered(_Count(shards), stretches, processes, chunk=1, few=WORTHWHILE)) as counted,
        tqdm(total=len(numbers), unit="sample", disable=None) as progress,
    ):
        for part in counted:
            tally.merge(part)
            progress.update(part.samples)
    examples = [_example(shards, i) for i in numbers[:EXAMPLES]]
    return {
        "shards": len(shards.paths),
        "bytes": shards.bytes,
        "samples": len(shards),
        **_figures(tally),
        "examples": examples,
    }


def _evenly(samples: int, limit: int | None) -> Sequence[int]:
    """The numbers of at most `limit` samples, as far apart as they can be."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; write 1 or more")
    if limit is None or limit >= samples:
        return range(samples)
    return [n * samples // limit for n in range(limit)]


def _figures(tally: Tally) -> dict[str, Any]:
    ratios = Counter[float]()
    short_sides = Counter[int]()
    for (width, height), count in tally.sides.items():
        ratios[width / max(height, 1)] += count
        short_sides[min(width, height)] += count
    widths, heights = (_column(tally.sides, side) for side in (0, 1))
    captions = tally.caption_words.total()
    return {
        "described": tally.samples,
        "fields": dict(tally.members.most_common()),
        "field_bytes": dict(tally.member_bytes.most_common()),
        "captions": captions,
        "captions_per_sample": spread(tally.captions) if captions else None,
        "caption_words": spread(tally.caption_words),
        "picture_width": spread(widths),
        "picture_height": spread(heights),
        "aspect_ratio": spread(ratios),
        "regions_per_sample": spread(tally.regions),
        "frames_per_sample": spread(tally.frames),
        "clip_seconds": spread(tally.seconds),
        "feature_width": {str(width): count for width, count in tally.feature_widths.most_common()} or None,
        "classes": tally.classes or None,
        "attributes": tally.attributes or None,
        "statements": tally.statements,
        "questions": tally.questions,
        "answers": len(tally.answers),
        "commonest_answers": dict(tally.answers.most_common(5)) or None,
        "unreadable_members": tally.unreadable,
        "histograms": {
            "caption_words": histogram(tally.caption_words),
            "captions_per_sample": histogram(tally.captions) if captions else [],
            "picture_short_side": histogram(short_sides),
            "aspect_ratio": _binned(ratios, SHAPES),
            "regions_per_sample": histogram(tally.regions),
            "frames_per_sample": histogram(tally.frames),
        },
    }


def _column(pairs: Counter[tuple[int, int]], column: int) -> Counter[int]:
    counted = Counter[int]()
    for pair, count in pairs.items():
        counted[pair[column]] += count
    return counted


def spread(values: Mapping[Any, int]) -> dict[str, float] | None:
    """Least, median, 95th percentile and most of {value: count}; between two values as numpy does."""
    counted = sorted((value, count) for value, count in values.items() if count)
    if not counted:
        return None
    ends = np.cumsum([count for _, count in counted])

    def percentile(share: float) -> float:
        place = share * (ends[-1] - 1)
        below, above = (
            counted[np.searchsorted(ends, rank, "right")][0] for rank in (math.floor(place), math.ceil(place))
        )
        return float(below + (above - below) * (place % 1))

    return {"min": percentile(0), "median": percentile(0.5), "p95": percentile(0.95), "max": percentile(1)}


def histogram(values: Mapping[int, int]) -> list[dict[str, float | None]]:
    """At most `BINS` bins of whole numbers, `from` and `to` included; the last one takes the longest 0.5 %."""
    counted = sorted(values)
    if not counted:
        return []
    total = sum(values.values())
    ends = np.cumsum([values[value] for value in counted])
    last = counted[int(np.searchsorted(ends, 0.995 * total))]
    step = max(1, math.ceil((last - counted[0] + 1) / BINS))
    first = counted[0] // step * step
    bins = math.ceil((last - first + 1) / step)
    counts = [0] * bins
    for value in counted:
        counts[min((value - first) // step, bins - 1)] += values[value]
    return [
        {
            "from": first + n * step,
            "to": first + (n + 1) * step - 1 if n < bins - 1 else max(counted[-1], first + (n + 1) * step - 1),
            "count": count,
        }
        for n, count in enumerate(counts)
    ]


def _binned(values: Mapping[float, int], edges: Sequence[float]) -> list[dict[str, float | None]]:
    """One bin between two edges each, the lower one included; None where the last has no end."""
    bins = [0] * (len(edges) - 1)
    for value, count in values.items():
        bins[int(np.searchsorted(edges, value, "right")) - 1] += count
    return (
        [
            {"from": start, "to": None if end == math.inf else end, "count": count}
            for start, end, count in zip(edges[:-1], edges[1:], bins, strict=True)
        ]
        if values
        else []
    )


def statements_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a json says that is neither caption nor question, each with a `text` and often a `label` or `box`."""
    sentence = record.get("sentence")
    told = [{"text": sentence, "label": record.get("label")}] if isinstance(sentence, str) else []
    for name in ("hypotheses", "expressions"):
        listed = record.get(name)
        told += [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [each for each in told if isinstance(each.get("text"), str)]


def texts_of(shards: Shards, i: int) -> list[Sentence]:
    """The captions and questions of sample `i`; none where they are missing or broken."""
    try:
        return sentences(shards, i, questions=True)
    except BrokenSampleError:
        return []


def _example(shards: Shards, i: int) -> dict[str, Any]:
    """What one sample says, cut short."""
    raw, texts = shards.read(i), texts_of(shards, i)
    tags = record_of(raw).get("tags") or []
    shown = {
        "captions": [each.text for each in texts if each.answer is None][:2],
        "questions": [(each.text, each.answer) for each in texts if each.answer is not None][:2],
        "tags": tags[:5] if isinstance(tags, list) else [],
    }
    return {"key": shards.key(i), "fields": list(raw), **{name: some for name, some in shown.items() if some}}
