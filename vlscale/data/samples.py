"""The raw fields of a shard to a picture and its captions, with a sentence for whatever is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlscale.data.decode import Pixels, decode
from vlscale.data.shards import Shards
from vlscale.errors import DataError

TEXT_FIELDS = ("json", "txt")
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


def captions(shards: Shards, i: int) -> list[str]:
    """The captions of sample `i`: `caption` (string or list) of its json, else its txt.

    BrokenSampleError if there is none, if one is empty, or if the json is not valid.
    """
    try:
        return _captions(shards.read(i, TEXT_FIELDS))
    except ValueError as error:
        raise BrokenSampleError(shards.shard(i), shards.key(i), str(error)) from error


def every_caption(shards: Shards) -> Iterator[str]:
    """All captions of a data set, such as a vocabulary is built from; samples without one are passed over."""
    for i in range(len(shards)):
        try:
            yield from captions(shards, i)
        except BrokenSampleError:
            continue


def _captions(raw: Mapping[str, bytes]) -> list[str]:
    field, found = _find_caption(raw)
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


def _find_caption(raw: Mapping[str, bytes]) -> tuple[str, object]:
    """(where it was found, what was found)."""
    try:
        if "json" in raw:
            record = json.loads(raw["json"])
            if isinstance(record, dict) and "caption" in record:
                return "json", record["caption"]
        if "txt" in raw:
            return "txt", raw["txt"].decode()
    except UnicodeDecodeError as error:
        raise ValueError("its text is not UTF-8; write it anew as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its 'json' is not valid JSON ({error})") from error
    raise ValueError("has no caption: neither 'caption' in 'json' nor a 'txt'")
