"""COCO's annotations: captions_*.json, instances_*.json or both, in any number (cocodataset.org, "Data format").

Boxes x y width height become `objects` with corners in pixels, the category's name, and `crowd` where a box is around
many. Files of person keypoints have the same boxes. Other sets in this form (LVIS, Objects365) are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlscale.data.formats.base import Options
from vlscale.data.formats.captions import stem
from vlscale.data.formats.listed import Entries, Entry, Listed, Names, Record, corners, read_json, text
from vlscale.data.making.write import Source

__all__ = ["Options", "source"]


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """The pictures of the files that have an annotation. DataError if a file is something else."""
    entries = Entries()
    files = read_json(paths, "coco")
    for path, data in files:
        images = numbered(data.get("images"))
        names = names_of(data)
        folder = path.stem.rsplit("_", 1)[-1]  # captions_val2017
        entries.add(path, data["annotations"], partial(_take, entries, images, names, folder))
    return Listed(options.images or files[0][0].parent, entries)


def _take(
    entries: Entries, images: Mapping[Any, Record], names: Mapping[Any, str], folder: str, record: Record
) -> None:
    if "caption" in record:
        caption = text(record, "caption")
        picture(entries, images, record["image_id"], folder).add_caption(caption, record.get("id"))
    else:
        seen = object_of(record, names)
        picture(entries, images, record["image_id"], folder).record.setdefault("objects", []).append(seen)


def numbered(records: object, key: str = "id") -> dict[Any, Record]:
    """The objects of a list by their number; what has none is passed over."""
    listed = records if isinstance(records, list) else []
    return {each[key]: each for each in listed if isinstance(each, dict) and isinstance(each.get(key), (int, str))}


def names_of(data: Record) -> dict[Any, str]:
    """The names of a file's categories by their number."""
    return {number: str(each.get("name")) for number, each in numbered(data.get("categories")).items()}


def object_of(record: Record, categories: Mapping[Any, str]) -> dict[str, object]:
    """`name`, `box` and, where it is one, `crowd` of an annotation. ValueError if it is broken."""
    if record["category_id"] not in categories:
        raise ValueError(f"its category {record['category_id']} is not among the file's categories")
    crowd = {"crowd": True} if record.get("iscrowd") else {}
    return {"name": categories[record["category_id"]], "box": corners(record["bbox"]), **crowd}


def picture(entries: Entries, images: Mapping[Any, Record], number: Any, folder: str) -> Entry:
    """The sample of picture `number`. ValueError if the file's images do not have it."""
    if number not in images:
        raise ValueError(f"its picture {number} is not among the file's images")
    image = images[number]
    at = str(image.get("coco_url", "")).rsplit("/", 2)[-2:]  # val2017, 000000000042.jpg
    name = image.get("file_name") or at[-1]  # LVIS tells the url only
    if not name:
        raise ValueError(f"its picture {number} has no file_name")
    size = (int(image.get("width") or 0), int(image.get("height") or 0))
    entry = entries.of(stem(name), (*places(name, folder), *(["/".join(at)] if len(at) == 2 else [])))
    entry.record["image_id"] = number
    entry.size = size if min(size) > 0 else None
    return entry


def places(name: str, folder: str = "") -> Names:
    """Where a picture of COCO may be: as it is named, in the folder of its split, or as 2017's release has 2014's."""
    old = re.fullmatch(r"COCO_(\w+)_(\d{12}\.jpg)", name)
    if not old:
        return (name, f"{folder}/{name}") if folder else (name,)
    years = ("test2017",) if old[1].startswith("test") else ("train2017", "val2017")
    return (name, f"{old[1]}/{name}", old[2], *(f"{year}/{old[2]}" for year in years))
