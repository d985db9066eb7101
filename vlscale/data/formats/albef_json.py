"""ALBEF's and BLIP's pretraining files: lists of {"image", "caption"} (dataset/caption_dataset.py of ALBEF's code).

`caption` is a text or a list of them, `image_id` may be there; JSON lines of the same are read too. Records of one
picture become one sample. A record of BLIP's web sets that has a `url` and no `image` is a broken one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from vlscale.data.formats.base import Options
from vlscale.data.formats.captions import stem
from vlscale.data.formats.listed import Entries, Entry, Listed, Record, read_json, text
from vlscale.data.making.write import Source

__all__ = ["Options", "source"]

TRIED = 200  # pictures that are looked for before their folders are taken as they are written


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """The samples of json files. The pictures' paths are the files' own, from `images`, else from the first file.

    A path that begins in the authors' folders is read from where it goes on below `images`. DataError if a file is
    something else.
    """
    entries = Entries()
    files = read_json(paths, "albef_json")
    root = options.images or files[0][0].parent
    for path, records in files:
        above = folders_above(root, (each["image"] for each in records if _names_picture(each)))
        entries.add(path, records, partial(_take, entries, above))
    return Listed(root, entries)


def _take(entries: Entries, above: str, record: Record) -> None:
    if "image" not in record and "url" in record:
        raise ValueError("it has a url and no 'image': fetch it first, for example with img2dataset")
    image = text(record, "image").removeprefix(above)
    captions = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
    told = [text({"caption": caption}, "caption") for caption in captions]
    if not told:
        raise ValueError("its list of captions is empty")
    entry = entries.of(stem(image), (image,))
    for caption in told:
        entry.add_caption(caption)
    if "image_id" in record:
        entry.record["image_id"] = record["image_id"]


def _names_picture(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("image"), str) and bool(record["image"])


def folders_above(root: Path, names: Iterable[str]) -> str:
    """What the first picture that is found under `root` has before its path there, such as `/export/share/coco/`.

    Empty if pictures are where they say, or if none of the first ones is found.
    """
    for name in islice(names, TRIED):
        parts = PurePosixPath(name).parts
        for start in range(len(parts)):
            rest = str(PurePosixPath(*parts[start:]))
            if os.path.isfile(root / rest):
                return name[: len(name) - len(rest)] if name.endswith(rest) else ""
    return ""
