"""Conceptual Captions: CC3M's lines of caption<tab>url or CC12M's of url<tab>caption, and a folder of what was fetched.

A heading, as img2dataset wants one, is passed over. Pictures are named, whatever their ending, by the number of their
row from 0 (00000012.jpg), by row and CRC-32 of the url (12_3735928559, as the downloader in ViLBERT's code does), or by
the url's CRC-32, MD5, SHA-1 or SHA-256: the one that most of the first rows are found by is taken for all.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from vlscale.data.formats.base import Options, files_in
from vlscale.data.formats.listed import listed_sample
from vlscale.data.formats.recognise import require_table
from vlscale.data.making.write import Sample, Source
from vlscale.errors import ConfigError, DataError

__all__ = ["Options", "source"]

READS = "lines of caption<tab>url or url<tab>caption"
WEB = ("http://", "https://")
NO_PICTURE = (".json", ".txt", ".tsv", ".csv", ".parquet")  # beside the pictures
TRIED = 1_000  # rows that tell how pictures are named


def _digest(method: str) -> Callable[[int, bytes], str]:
    return lambda row, url: hashlib.new(method, url, usedforsecurity=False).hexdigest()


NAMINGS: Mapping[str, Callable[[int, bytes], str]] = MappingProxyType(
    {
        "row": lambda row, url: str(row),
        "row and CRC-32": lambda row, url: f"{row}_{zlib.crc32(url)}",
        "CRC-32": lambda row, url: str(zlib.crc32(url)),
        **{method: _digest(method) for method in ("md5", "sha1", "sha256")},
    }
)


class Row(NamedTuple):
    """One line."""

    caption: str
    url: str
    picture: Path | None  # None = not among the fetched ones


def source(paths: Sequence[Path], options: Options) -> Source[Row]:
    """The rows of one tsv file. ConfigError without the pictures' folder, DataError if the file is something else."""
    files = [file for _, file in files_in(paths, r".*\.tsv", "tsv file")]
    if not options.images:
        raise ConfigError("cc_tsv tells captions and urls only; write --images with the folder of the fetched pictures")
    if len(files) > 1:
        raise ConfigError(f"--source holds {files[0].name} and {files[1].name}; make shards of one tsv at a time")
    require_table(files[0], "cc_tsv", READS)
    return _Rows(files[0], options.images)


@dataclass(frozen=True)
class _Rows:
    file: Path
    images: Path

    def items(self) -> Iterator[tuple[str, Row]]:
        fetched = fetched_pictures(self.images)
        naming = self._naming(fetched)
        for number, (caption, url) in enumerate(_rows(self.file)):
            found = fetched.get(naming(number, url.encode()))
            yield f"{number:08d}", Row(caption, url, self.images / found if found else None)

    def sample(self, name: str, item: Row) -> Sample:
        if not (item.caption and item.url):
            raise ValueError("its line is not a caption and a url")
        if item.picture is None:
            raise ValueError(f"its picture is not in {self.images}")
        return listed_sample({"caption": [item.caption], "url": item.url}, [item.picture])

    def _naming(self, fetched: Mapping[str, str]) -> Callable[[int, bytes], str]:
        """How the pictures are named. DataError if they are numbered past the last row, and so not from 0."""
        first = [(number, url.encode()) for number, (_, url) in enumerate(islice(_rows(self.file), TRIED))]
        found = {name: sum(naming(*row) in fetched for row in first) for name, naming in NAMINGS.items()}
        best = max(found, key=found.__getitem__)
        if best == "row" and found[best]:
            rows = sum(1 for _ in _rows(self.file))
            if str(rows) in fetched:
                last = fetched[str(rows)]
                raise DataError(
                    f"{self.images} holds {last}, but the rows of {self.file} end at {rows - 1}: number from 0"
                )
        return NAMINGS[best]


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(caption, url) of every line after the heading, if there is one; empty where it has none."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file):
            cells = [cell.strip() for cell in line.split("\t")]
            if number == 0 and {cell.lower() for cell in cells} == {"caption", "url"}:
                continue
            url = next((cell for cell in cells if cell.startswith(WEB)), "")
            yield next((cell for cell in cells if cell and cell != url), ""), url


def fetched_pictures(folder: Path) -> Mapping[str, str]:
    """The files of a folder and those below it, by their names without an end; numbers without zeros before them.

    DataError if two have the same name: one of them would get the other's caption.
    """
    found: dict[str, str] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            stem, end = os.path.splitext(name)
            if name.startswith(".") or end.lower() in NO_PICTURE:
                continue
            key = str(int(stem)) if stem.isdecimal() else stem
            path = os.path.relpath(os.path.join(where, name), folder)
            if key in found:
                raise DataError(f"{folder} holds {found[key]} and {path}, which are of one row; keep one of them")
            found[key] = path
    return found
