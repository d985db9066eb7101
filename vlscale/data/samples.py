"""The raw fields of a shard to a picture or regions and to texts, with a sentence for whatever is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlscale.data import regions as region_data
from vlscale.data.decode import Pixels, decode
from vlscale.data.regions import Regions
from vlscale.data.shards import Shards
from vlscale.errors import DataError
from vlscale.types import Inputs

TEXT_FIELDS = ("json", "txt")
REGION_FIELD = "regions.npz"
PICTURE_FIELDS = tuple(f"{number}{end}" for number in ("", "0.") for end in ("jpg", "jpeg", "png", "webp"))


class BrokenSampleError(DataError):
    """One sample cannot be used; training goes on with the next one, counts it and names it."""

    def __init__(self, shard: Path, key: str, reason: str) -> None:
        """`reason` is a clause that names the field and what is wrong with it."""
        super().__init__(shard, key, reason)
        self.shard = shard
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"sample '{self.key}' of shard {self.shard}: {self.reason}"


class Bad(NamedTuple):
    """A sample that was skipped."""

    shard: str
    key: str
    reason: str


def picture_field(fields: Sequence[str]) -> str | None:
    """The field that holds the (first) picture, or None."""
    return next((name for name in PICTURE_FIELDS if name in fields), None)


def picture(shards: Shards, i: int) -> Pixels:
    """The picture of sample `i`, uint8 RGB [H, W, 3]; BrokenSampleError if missing or undecodable."""
    field = picture_field(shards.fields(i))
    if field is None:
        has = ", ".join(shards.fields(i))
        reason = f"has no picture (jpg, png or webp) but {has}"
        raise BrokenSampleError(shards.shard(i), shards.key(i), reason)
    try:
        return decode(shards.read(i, (field,))[field])
    except ValueError as error:
        reason = f"the picture in '{field}' cannot be decoded: {error}"
        raise BrokenSampleError(shards.shard(i), shards.key(i), reason) from error


def regions(shards: Shards, i: int, inputs: Inputs, wanted: frozenset[str]) -> Regions:
    """What a detector found in sample `i`: as many of its regions as the family reads, with its widths.

    BrokenSampleError if the sample has no `regions.npz` or if that lacks what is `wanted` (names of
    `vlscale.data.regions.FIELDS`).
    """
    raw = shards.read(i, (REGION_FIELD, "json"))
    if REGION_FIELD not in raw:
        has = ", ".join(shards.fields(i))
        reason = f"has no '{REGION_FIELD}' but {has}; `launchers/shards.py regions` adds one to pictures"
        raise BrokenSampleError(shards.shard(i), shards.key(i), reason)
    try:
        found = region_data.parse(raw[REGION_FIELD], inputs.regions, wanted, _size(raw))
        region_data.check_widths(found, inputs)
    except ValueError as error:
        raise BrokenSampleError(shards.shard(i), shards.key(i), f"its '{REGION_FIELD}' {error}") from error
    return found


class Sentence(NamedTuple):
    """A caption, or a question with its answer."""

    text: str
    answer: str | None = None


def sentences(shards: Shards, i: int, questions: bool = False) -> list[Sentence]:
    """The captions of sample `i` (`caption`, string or list, of its json, else its txt); with `questions` those too.

    Questions are `qa` of the json, [{"q": ..., "a": ...}], or `question` and `answer`. BrokenSampleError if there is
    no text, if one is empty, or if the json is not valid.
    """
    try:
        raw = shards.read(i, TEXT_FIELDS)
        record = _record(raw)
        asked = _questions(record) if questions else []
        told = [] if asked and "caption" not in record and "txt" not in raw else _captions(raw, record)
        return [*map(Sentence, told), *asked]
    except ValueError as error:
        raise BrokenSampleError(shards.shard(i), shards.key(i), str(error)) from error


def tags(shards: Shards, i: int) -> str:
    """The names of the objects of sample `i`, joined by spaces: `tags` of its json, else those of its `objects`.

    Empty where nothing is named; BrokenSampleError if the json is not valid.
    """
    try:
        record = _record(shards.read(i, ("json",)))
    except ValueError as error:
        raise BrokenSampleError(shards.shard(i), shards.key(i), str(error)) from error
    named = record.get("tags")
    if named is None:
        objects = [each for each in _listed(record, "objects") if isinstance(each, dict)]
        named = [each.get("name") or each.get("label") or "" for each in objects]
    return named if isinstance(named, str) else " ".join(map(str, named if isinstance(named, list) else []))


def every_text(shards: Shards, questions: bool = False, named: bool = False) -> Iterator[str]:
    """All captions of a data set, such as a vocabulary is built from, with questions and tags if asked for.

    Samples without a text are passed over.
    """
    for i in range(len(shards)):
        try:
            yield from (sentence.text for sentence in sentences(shards, i, questions))
            if named:
                yield tags(shards, i)
        except BrokenSampleError:
            continue


def every_answer(shards: Shards) -> Iterator[str]:
    """The answers of all questions of a data set."""
    for i in range(len(shards)):
        try:
            yield from (each.answer for each in sentences(shards, i, questions=True) if each.answer is not None)
        except BrokenSampleError:
            continue


def _record(raw: Mapping[str, bytes]) -> dict[str, Any]:
    """The json of a sample; empty where it has none, or one that is no mapping."""
    try:
        record = json.loads(raw.get("json", b"{}"))
    except UnicodeDecodeError as error:
        raise ValueError("its text is not UTF-8; write it anew as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its 'json' is not valid JSON ({error})") from error
    return record if isinstance(record, dict) else {}


def _listed(record: Mapping[str, Any], name: str) -> list[Any]:
    """A list of the json; empty where there is none."""
    found = record.get(name)
    return found if isinstance(found, list) else []


def _size(raw: Mapping[str, bytes]) -> tuple[float, float] | None:
    record = _record(raw)
    size = record.get("width"), record.get("height")
    numbers = [float(side) for side in size if isinstance(side, int | float)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def _captions(raw: Mapping[str, bytes], record: Mapping[str, Any]) -> list[str]:
    if "caption" in record:
        field, found = "json", record["caption"]
    elif "txt" in raw:
        try:
            field, found = "txt", raw["txt"].decode()
        except UnicodeDecodeError as error:
            raise ValueError("its text is not UTF-8; write it anew as UTF-8") from error
    else:
        raise ValueError("has no caption: neither 'caption' in 'json' nor a 'txt'")
    listed: list[Any] = found if isinstance(found, list) else [found]
    if not listed:
        raise ValueError(f"the caption list in '{field}' is empty; write at least one caption")
    for caption in listed:
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise ValueError(f"a caption in '{field}' is a {kind}; write a string or a list of strings")
        if not caption.strip():
            raise ValueError(f"a caption in '{field}' is empty; write a text or leave the sample out")
    return listed


def _questions(record: Mapping[str, Any]) -> list[Sentence]:
    listed = _listed(record, "qa")
    if record.get("question") is not None:
        listed = [*listed, {"q": record["question"], "a": record.get("answer")}]
    for each in listed:
        if not (isinstance(each, dict) and isinstance(each.get("q"), str) and isinstance(each.get("a"), str)):
            raise ValueError(f'a question in \'json\' is {each!r}; write {{"q": a question, "a": its answer}}')
    return [Sentence(each["q"], each["a"]) for each in listed if each["q"].strip()]
