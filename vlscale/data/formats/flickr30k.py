"""Flickr30k's and Flickr8k's captions, in the three forms that they are handed round in.

`results_20130124.token` and `Flickr8k.token.txt`: lines of `1000.jpg#0<tab>caption`. `results.csv`: image_name |
comment_number | comment; `captions.txt`: image,caption. `flickr_annotations_30k.csv`: raw, sentids (both of them JSON
lists), split, filename.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from vlscale.data.formats.base import Options, files_in
from vlscale.data.formats.captions import stem
from vlscale.data.formats.listed import Entries, Entry, Listed, Record, require_splits, text
from vlscale.data.formats.recognise import require_table
from vlscale.data.making.write import Source
from vlscale.errors import DataError

__all__ = ["Options", "source"]

READS = "lines of 1000.jpg#0<tab>caption, or a csv with image_name and comment, image and caption, or raw and filename"


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """The pictures that the files name, of some splits if `split` names them. DataError if a file is something else."""
    entries = Entries()
    files = [file for _, file in files_in(paths, r".*\.(token|txt|csv)", "file of captions (token, txt or csv)")]
    tables = [(path, list(_rows(path))) for path in files]
    require_splits(options.split, (row for _, rows in tables for row in rows), files)
    for path, rows in tables:
        entries.add(path, rows, partial(_take, entries, options.split))
    return Listed(options.images or files[0].parent, entries)


def _take(entries: Entries, splits: Sequence[str], row: Record) -> None:
    if splits and row["split"] not in splits:
        return
    name, told = text(row, "image"), [(text(row, "caption"), None)]
    if "sentids" in row:
        raw, numbers = (json.loads(row[column]) for column in ("caption", "sentids"))
        told = [(text({"caption": each}, "caption"), number) for each, number in zip(raw, numbers, strict=True)]
    entry = entries.of(stem(name), (name,))
    for caption, number in told:
        entry.add_caption(caption, number)
    if row.get("split"):
        entry.record["split"] = row["split"]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """`image`, `caption` and what else is there of every line."""
    require_table(path, "flickr30k", READS)
    try:
        lines = path.read_text(encoding="utf-8-sig").strip().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason}); write it anew as UTF-8") from error
    if "\t" in lines[0]:
        for line in lines:
            name, _, caption = line.partition("\t")
            yield {"image": name.split("#")[0], "caption": caption}
        return
    bar = "|" in lines[0]
    # DictReader takes the newlines within quotes from the lines themselves
    lines = [f"{line}\n" for line in lines]
    table = csv.DictReader(lines, delimiter="|" if bar else ",", quoting=csv.QUOTE_NONE if bar else csv.QUOTE_MINIMAL)
    ours = {"image_name": "image", "comment": "caption", "raw": "caption", "filename": "image", "file_name": "image"}
    for row in table:
        cells = {str(name).strip(): value.strip() for name, value in row.items() if isinstance(value, str)}
        yield {ours.get(name, name): value for name, value in cells.items()}
