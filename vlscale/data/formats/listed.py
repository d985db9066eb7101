"""Samples that an annotation file lists, each with the pictures it names: what most such files come to."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlscale.data.decode import picture_size
from vlscale.data.formats import recognise
from vlscale.data.formats.base import files_in
from vlscale.data.making.shrink import scaled
from vlscale.data.making.write import Sample
from vlscale.errors import DataError, did_you_mean

Record = Mapping[str, Any]
Names = tuple[str, ...]  # that one picture may have under the root, the likeliest first
Box = list[float]  # x1 y1 x2 y2 in pixels

DECIMALS = 2  # of a box's pixels, as COCO's own


@dataclass(slots=True)
class Entry:
    """One sample whose pictures have not been read yet."""

    pictures: tuple[Names, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)  # its json; lists of texts grow as the file is read
    size: tuple[int, int] | None = None  # (width, height) that its boxes lie in; None = those of the picture
    broken: str = ""  # why it cannot be used, if so

    def add_caption(self, caption: str, number: object = None) -> None:
        """One more caption, with the number that the file gives it."""
        self.record.setdefault("caption", []).append(caption)
        if number is not None:
            self.record.setdefault("caption_ids", []).append(number)


class Entries:
    """Samples by name, in the order in which files name them first."""

    def __init__(self) -> None:
        self.place = ""  # of the record that is being read: its file's name and its number there
        self._sound: dict[str, Entry] = {}
        self._broken: list[tuple[str, Entry]] = []

    def of(self, name: str, *pictures: Names) -> Entry:
        """The sample `name`, made on first use: what several records say of one picture comes together."""
        return self._sound.setdefault(name, Entry(pictures))

    def add(self, path: Path, records: Iterable[object], take: Callable[[Record], None]) -> None:
        """Call `take` with each record; one that it raises at is a broken sample, named by its `place`.

        What stands in the place of a record that could not be read is its ValueError (see `recognise.read`).
        """
        for number, record in enumerate(records):
            self.place = f"{path.stem}/{number}"
            try:
                take(require_object(record))
            except KeyError as error:
                self._leave_out(f"it has no {error}")
            except ValueError as error:
                self._leave_out(str(error))
            except (TypeError, AttributeError, IndexError, OverflowError) as error:
                self._leave_out(f"its form is not known ({error})")

    def _leave_out(self, reason: str) -> None:
        self._broken.append((self.place, Entry(broken=reason)))

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        """All samples, the broken ones last; their number is the iterator's length hint."""
        return iter([*self._sound.items(), *self._broken])


def read_json(paths: Iterable[Path], *formats: str) -> list[tuple[Path, Any]]:
    """(file, what it holds) of the JSON files that `paths` are or hold, all of them in one of `formats`.

    DataError if there is none, or if one is something else, with the format that fits.
    """
    files = [file for path in paths for file in ([path] if path.is_file() else _json_files(path))]
    held = {file: recognise.require(file, recognise.read(file, formats[0]), *formats) for file in files}
    return list(held.items())


def _json_files(folder: Path) -> list[Path]:
    return [file for _, file in files_in([folder], r".*\.jsonl?", "json file")]


def require_object(record: object) -> Record:
    """The record. ValueError if it is none."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}; it should be an object")
    return record


class Listed:
    """The source of such samples. To other processes goes the root alone: each item carries the rest."""

    def __init__(self, root: Path, entries: Entries) -> None:
        """`root` is the folder that the pictures' names begin in."""
        self._root = root
        self._entries = entries

    def __getstate__(self) -> dict[str, object]:
        return {"_root": self._root}

    def items(self) -> Iterator[tuple[str, Entry]]:
        """(name, entry) of every sample."""
        return iter(self._entries)

    def sample(self, name: str, item: Entry) -> Sample:
        """The sample with its pictures as they are. ValueError if the entry is broken or a picture cannot be used."""
        if item.broken:
            raise ValueError(item.broken)
        return listed_sample(item.record, [find(self._root, names) for names in item.pictures], item.size)


def listed_sample(record: Record, paths: Iterable[Path], size: tuple[int, int] | None = None) -> Sample:
    """The sample of `record` and of one picture (`jpg`) or several (`0.jpg`, `1.jpg`); boxes become pixels of it.

    ValueError if a picture cannot be used.
    """
    pictures = [read_picture(path) for path in paths]
    # one caption is a text, several are a list
    told = {name: value[0] if name == "caption" and len(value) == 1 else value for name, value in record.items()}
    if len(pictures) > 1:
        first, *rest = [(f"{number}.{end}", data) for number, (end, data) in enumerate(pictures)]
        return Sample(told, first, more=tuple(rest))
    width, height = picture_size(pictures[0][1])
    if size and size != (width, height):  # made smaller after it had been annotated
        told = scaled(told, width / size[0], height / size[1])
    return Sample({**told, "width": width, "height": height}, pictures[0])


def find(root: Path, names: Names) -> Path:
    """The first of `names` that is a file under `root`. ValueError if none is."""
    found = next((path for name in names if os.path.isfile(path := root / name)), None)
    if found is None:
        raise ValueError(f"its picture {names[0]} is not in {root}")
    return found


def read_picture(path: Path) -> tuple[str, bytes]:
    """(`jpg`, `png` or `webp`, bytes as they are); the kind is that of the bytes, for names can be wrong.

    ValueError if it cannot be read or is none of these.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"its picture {path.name} cannot be read ({error.strerror})") from error
    picture_size(data)
    return ("jpg" if data[:2] == b"\xff\xd8" else "png" if data[:4] == b"\x89PNG" else "webp"), data


def text(record: Record, name: str) -> str:
    """A text of the record. KeyError if there is none, ValueError if it is empty or no text."""
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"its {name} is a {type(value).__name__}; it should be a text")
    if not value.strip():
        raise ValueError(f"its {name} is empty")
    return value.strip()


def corners(box: Any) -> Box:
    """x1 y1 x2 y2 of a box x y width height. ValueError if it is none."""
    numbers = isinstance(box, list) and all(isinstance(side, (int, float)) and math.isfinite(side) for side in box)
    if not (numbers and len(box) == 4):
        raise ValueError(f"its bbox is {box!r}; it should be four numbers, x y width height")
    x, y, width, height = box
    return [round(side, DECIMALS) for side in (x, y, x + width, y + height)]


def require_splits(wanted: Iterable[str], records: Iterable[object], paths: Iterable[Path]) -> None:
    """DataError if no record is of a split that is wanted."""
    there = {str(each["split"]) for each in records if isinstance(each, dict) and each.get("split")}
    for split in wanted:
        if split not in there:
            raise DataError(
                f"no entry of {', '.join(map(str, paths))} is of split '{split}'{did_you_mean(split, there)}"
            )
