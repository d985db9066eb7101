"""Karpathy's splits: dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json.

As on cs.stanford.edu/people/karpathy/deepimagesent: images with `filename`, for COCO `filepath` and `cocoid`, `split`
(train, restval, val, test) and `sentences`, whose `sentid`s become `caption_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlscale.data.formats.base import Options
from vlscale.data.formats.captions import stem
from vlscale.data.formats.listed import Entries, Entry, Listed, Record, read_json, require_splits, text
from vlscale.data.making.write import Source

__all__ = ["Options", "source"]


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """The pictures of the files, of some splits if `split` names them. DataError if a file is something else."""
    entries = Entries()
    files = read_json(paths, "karpathy")
    require_splits(options.split, (image for _, data in files for image in data["images"]), paths)

    def take(record: Record) -> None:
        if options.split and record["split"] not in options.split:
            return
        name = text(record, "filename")
        told = [(text(each, "raw"), each.get("sentid")) for each in record["sentences"]]
        if not told:
            raise ValueError("its list of sentences is empty")
        folder = record.get("filepath")
        entry = entries.of(stem(name), (f"{folder}/{name}", name) if folder else (name,))
        for caption, number in told:
            entry.add_caption(caption, number)
        entry.record["image_id"] = record.get("cocoid", record.get("imgid"))
        entry.record["split"] = record.get("split")

    for path, data in files:
        entries.add(path, data["images"], take)
    return Listed(options.images or files[0][0].parent, entries)
