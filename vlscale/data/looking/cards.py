"""A few samples of some shards as a person looks at them: small pictures, boxes, texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from vlscale.data import detections
from vlscale.data.decode import Pixels, decode, resize
from vlscale.data.looking.describe import statements_of
from vlscale.data.looking.inspect import clip_frames, kind_of, record_of, size_of
from vlscale.data.samples import MAX_MEMBER_BYTES, BrokenSampleError, Sentence, sentences
from vlscale.data.shards import Shards
from vlscale.errors import DataError

CARDS = 48
SIDE = 240  # pixels of a small picture's longer side; of two in one sample, 160 each
PICTURES, BOXES, TEXTS, TAGS = 2, 12, 5, 12  # shown of one sample at most
STRIP = 3  # frames of a clip, side by side
LETTERS = 300  # of a text at most


class Box(NamedTuple):
    """Where an object is, in shares of the picture's sides."""

    left: float
    top: float
    right: float
    bottom: float
    label: str


class Thumbnail(NamedTuple):
    """A small picture."""

    jpeg: bytes
    width: int
    height: int
    boxes: tuple[Box, ...] = ()


class Card(NamedTuple):
    """One sample, cut to what can be looked at."""

    key: str
    shard: str
    fields: tuple[str, ...]
    pictures: tuple[Thumbnail, ...] = ()
    captions: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what cannot be shown, and why


def cards(shards: Shards, count: int = CARDS, seed: int = 0) -> list[Card]:
    """`count` samples drawn by `seed`, in the order of the shards. A broken one says what is wrong with it."""
    drawn = np.random.default_rng(seed).choice(len(shards), min(count, len(shards)), replace=False)
    return [_card(shards, i) for i in sorted(drawn.tolist())]


def _card(shards: Shards, i: int) -> Card:
    fields = shards.fields(i)
    card = Card(shards.key(i), shards.shard(i), fields)
    try:
        raw = shards.read(i, [field for field, size in shards.sizes(i).items() if size <= MAX_MEMBER_BYTES])
    except DataError as error:
        return card._replace(notes=(str(error),))
    notes: list[str] = []
    record = record_of(raw)
    texts = _texts(shards, i, notes)
    captions = [each.text for each in texts if each.answer is None] + [_said(each) for each in statements_of(record)]
    tags = record.get("tags")
    return card._replace(
        pictures=tuple(_thumbnails(raw, record, notes)),
        captions=tuple(map(_short, captions[:TEXTS])),
        questions=tuple((_short(each.text), _short(each.answer)) for each in texts if each.answer is not None)[:TEXTS],
        tags=tuple(_short(str(tag)) for tag in tags[:TAGS]) if isinstance(tags, list) else (),
        notes=tuple(_short(note) for note in notes),
    )


def _texts(shards: Shards, i: int, notes: list[str]) -> list[Sentence]:
    """Captions and questions; why there are none, where there should be some."""
    try:
        return sentences(shards, i, questions=True)
    except BrokenSampleError as error:
        if "has no caption" not in error.reason:
            notes.append(error.reason)
        return []


def _said(statement: Mapping[str, Any]) -> str:
    label = statement.get("label")
    return statement["text"] if label is None else f"{statement['text']} ({label})"


def _short(text: str) -> str:
    """One line, not too long."""
    line = " ".join(text[: 4 * LETTERS].split())
    return line if len(line) <= LETTERS else f"{line[:LETTERS]} ..."


def _thumbnails(raw: Mapping[str, bytes], record: Mapping[str, Any], notes: list[str]) -> Iterator[Thumbnail]:
    """The first pictures, the boxes in the first of them."""
    shown = [field for field in raw if kind_of(field) in ("picture", "video")]
    for field in raw:
        if kind_of(field) == "regions" and not shown:
            yield from _regions_alone(raw, field, record, notes)
    for number, field in enumerate(shown[:PICTURES]):
        clip = kind_of(field) == "video"
        try:
            pixels = np.concatenate(clip_frames(raw[field], STRIP), axis=1) if clip else decode(raw[field])
        except ValueError as error:
            notes.append(f"{field}: {error}")
            continue
        small = _small(pixels, SIDE if len(shown) == 1 else 160)
        found = _boxes(raw, record, (pixels.shape[1], pixels.shape[0]), notes) if number == 0 else []
        yield small._replace(boxes=tuple(found[:BOXES]))


def _regions_alone(
    raw: Mapping[str, bytes], field: str, record: Mapping[str, Any], notes: list[str]
) -> Iterator[Thumbnail]:
    """Boxes on an empty ground, in the shape of a picture that is not there."""
    try:
        found = detections.read_regions(raw[field], size_of(raw))
    except ValueError as error:
        notes.append(f"{field}: {error}")
        return
    width, height = max(int(found.width), 1), max(int(found.height), 1)
    scale = SIDE / max(width, height)
    ground = np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 128, dtype=np.uint8)
    yield _small(ground, SIDE)._replace(boxes=tuple(_boxes(raw, record, (width, height), notes)[:BOXES]))


def _small(pixels: Pixels, side: int) -> Thumbnail:
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    small = resize(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=75, colorspace="RGB", colorsubsampling="420")
    return Thumbnail(jpeg, small.shape[1], small.shape[0])


def _boxes(raw: Mapping[str, bytes], record: Mapping[str, Any], size: tuple[int, int], notes: list[str]) -> list[Box]:
    """The boxes of the json's objects; where there are none, those of the regions, the surest first."""
    told = size_of(raw) or size
    objects = record.get("objects")
    listed = [each for each in objects if isinstance(each, dict)] if isinstance(objects, list) else []
    boxes = [_object(each, told) for each in [*listed, *statements_of(record)]]
    if found := [box for box in boxes if box]:
        return found
    if "regions.npz" not in raw:
        return []
    try:
        return _regions(detections.read_regions(raw["regions.npz"], told), record.get("tags"))
    except ValueError as error:
        notes.append(f"regions.npz: {error}")
        return []


def _object(each: Mapping[str, Any], size: tuple[int, int]) -> Box | None:
    box = each.get("box")
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(number, int | float) for number in box)):
        return None
    return _box(box, size, str(each.get("label") or each.get("name") or each.get("text") or ""))


def _regions(found: detections.Detections, tags: object) -> list[Box]:
    names = tags if isinstance(tags, list) and len(tags) == len(found.boxes) else [""] * len(found.boxes)
    sure = found.class_confidence
    order = range(len(found.boxes)) if sure is None else np.argsort(-sure, kind="stable").tolist()
    return [_box(found.boxes[i].tolist(), (found.width, found.height), str(names[i])) for i in order]


def _box(corners: Sequence[float], size: tuple[float, float], label: str) -> Box:
    width, height = max(size[0], 1), max(size[1], 1)
    left, top, right, bottom = (
        min(max(float(number) / side, 0.0), 1.0)
        for number, side in zip(corners, (width, height, width, height), strict=True)
    )
    return Box(left, top, max(left, right), max(top, bottom), _short(label)[:40])
