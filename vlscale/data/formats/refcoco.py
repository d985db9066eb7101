"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions with their boxes (github.com/lichengunc/refer).

The authors' refs(unc).p is a pickle, which can run code and is never loaded: write it as JSON, where you trust it, and
give the JSON and instances.json to --source.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlscale.data.formats.base import Options
from vlscale.data.formats.coco import names_of, numbered, object_of, picture
from vlscale.data.formats.listed import Entries, Entry, Listed, Record, read_json, require_splits, text
from vlscale.data.making.write import Source
from vlscale.errors import DataError

__all__ = ["Options", "source"]

EXPORT = (
    """python -c "import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[2], 'w'))" """
    "'refs(unc).p' refs.json"
)


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """The pictures in which something is referred to, of some splits if `split` names them.

    DataError if a file is something else, or if the refs or the instances are missing.
    """
    for path in paths:
        if path.suffix in (".p", ".pkl"):
            raise DataError(
                f"{path} is a pickle, which is never loaded, for it can run code; where you trust it: {EXPORT}"
            )
    entries = Entries()
    files = read_json(paths, "refcoco", "coco")
    refs = [(path, data) for path, data in files if isinstance(data, list)]
    instances = [data for _, data in files if isinstance(data, dict)]
    if not refs or not instances:
        missing = "instances.json" if refs else "JSON of the refs"
        raise DataError(f"there is no {missing} in {', '.join(map(str, paths))}; give both files to --source")
    require_splits(options.split, (each for _, data in refs for each in data), [path for path, _ in refs])
    reader = _Reader(entries, instances, options.split)
    for path, data in refs:
        entries.add(path, data, reader)
    return Listed(options.images or files[0][0].parent, entries)


class _Reader:
    """Takes referred objects, one by one, into the samples of their pictures."""

    def __init__(self, entries: Entries, instances: Sequence[Record], splits: Sequence[str]) -> None:
        self.entries = entries
        self.splits = splits
        self.names: dict[Any, str] = {}
        self.images: dict[Any, Record] = {}
        self.found: dict[Any, Record] = {}
        for data in instances:
            self.names.update(names_of(data))
            self.images.update(numbered(data.get("images")))
            self.found.update(numbered(data.get("annotations")))
        self.objects: dict[Any, list[Record]] = {}
        for each in self.found.values():
            self.objects.setdefault(each.get("image_id"), []).append(each)

    def __call__(self, record: Record) -> None:
        if self.splits and record.get("split") not in self.splits:
            return
        if record["ann_id"] not in self.found:
            raise ValueError(f"its annotation {record['ann_id']} is not among the instances")
        referred = object_of(self.found[record["ann_id"]], self.names)
        told = [(text(each, "sent"), each.get("sent_id")) for each in record["sentences"]]
        seen = [object_of(each, self.names) for each in self.objects[record["image_id"]]]
        entry = picture(self.entries, self.images, record["image_id"], "train2014")
        entry.record["objects"] = seen
        split = {"split": record["split"]} if "split" in record else {}
        entry.record.setdefault("expressions", []).extend(
            {"text": sentence, **referred, "id": number, "ref_id": record["ref_id"], **split}
            for sentence, number in told
        )
