"""NLVR2: train.json, dev.json, test1.json (lines of JSON; github.com/lil-lab/nlvr, nlvr2), or ALBEF's nlvr_*.json.

A sample is a sentence and two pictures, `0.jpg` on the left and `1.jpg` on the right, with a `label` that is true or
false. The pictures of dev-896-0-1 are dev-896-0-img0.png and -img1.png; ALBEF's name them as `images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlscale.data.formats.base import Options
from vlscale.data.formats.listed import Entries, Entry, Listed, Names, Record, read_json, text
from vlscale.data.making.write import Source

__all__ = ["Options", "source"]

LABELS = {"true": True, "false": False}


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """A sample for each sentence. DataError if a file is something else."""
    entries = Entries()
    files = read_json(paths, "nlvr2")

    def take(record: Record) -> None:
        label = LABELS.get(str(record["label"]).lower())
        if label is None:
            raise ValueError(f"its label is {record['label']!r}; it should be True or False")
        told = {"sentence": text(record, "sentence"), "label": label}
        named = {"identifier": text(record, "identifier")} if "identifier" in record else {}
        left, right = _pair(record, named.get("identifier", ""))
        name = named.get("identifier", entries.place)
        entry = entries.of(name, left, right)
        if entry.record:
            raise ValueError(f"its identifier is '{name}', as another's")
        entry.record.update({**told, **named})

    for path, data in files:
        entries.add(path, data, take)
    return Listed(options.images or files[0][0].parent, entries)


def _pair(record: Record, identifier: str) -> tuple[Names, Names]:
    """The names that the left and the right picture may have."""
    if "images" in record:
        left, right = record["images"]
        return (str(left),), (str(right),)
    split, *rest = identifier.split("-")
    if len(rest) < 3:
        raise ValueError(f"its identifier is '{identifier}'; it should be as dev-896-0-1")
    stem = identifier.rsplit("-", 1)[0]
    directory = record.get("directory")  # of training pictures
    folders = ["", f"{split}/", f"images/{split}/"]
    if directory is not None:
        folders = [f"{folder}{directory}/" for folder in folders] + folders
    return tuple(f"{each}{stem}-img0.png" for each in folders), tuple(f"{each}{stem}-img1.png" for each in folders)
