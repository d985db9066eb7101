"""LXMERT's feature file: a TSV of one picture per line, its arrays in base64 (src/utils.py of the authors' code).

Integers are int64 and the rest float32, boxes are in pixels. Bottom-up attention's own TSV of six columns is read too
(tools/generate_tsv.py there). Texts are LXMERT's json of `sentf` and `labelf`, or any other captions.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlscale.data.formats.base import Extras, Options, detections, files_in
from vlscale.data.making.write import Sample, Source

__all__ = ["Options", "source"]

COLUMNS = {  # number of columns -> their names, in order
    10: (
        *("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
        *("num_boxes", "boxes", "features"),
    ),
    6: ("img_id", "img_w", "img_h", "num_boxes", "boxes", "features"),
}
NUMBERS = ("img_h", "img_w", "num_boxes")
WHOLE = ("objects_id", "attrs_id")  # int64


def source(paths: Sequence[Path], options: Options) -> Source[bytes]:
    """The TSV files that `paths` are or hold. DataError if there is none."""
    return _Lxmert([file for _, file in files_in(paths, r".*\.tsv", "tsv file")], Extras(options))


@dataclass(frozen=True)
class _Lxmert:
    files: list[Path]
    extras: Extras

    def items(self) -> Iterator[tuple[str, bytes]]:
        for path in self.files:
            with open(path, "rb") as file:
                for line in file:
                    name = line.split(b"\t", 1)[0].decode(errors="replace").strip()
                    if name and name != COLUMNS[10][0]:  # a heading is no picture
                        yield name, line

    def sample(self, name: str, item: bytes) -> Sample:
        cells = item.rstrip(b"\r\n").split(b"\t")
        if len(cells) not in COLUMNS:
            raise ValueError(f"its line has {len(cells)} columns; it should have {' or '.join(map(str, COLUMNS))}")
        row = dict(zip(COLUMNS[len(cells)], cells, strict=True))
        count = _number(row, "num_boxes")
        arrays: dict[str, NDArray[np.generic] | int] = {}
        for column, cell in row.items():
            if column in NUMBERS:
                arrays[column] = _number(row, column)
            elif column != "img_id":
                array = unpack(cell, "<i8" if column in WHOLE else "<f4", column)
                two = column in ("boxes", "features")
                if array.size % max(count, 1) or (not two and array.size != count):
                    raise ValueError(f"its {column} are {array.size} numbers, which is not right for {count} boxes")
                arrays[column] = array.reshape(count, -1) if two else array
        return self.extras.sample(name, detections(arrays))


def _number(row: dict[str, bytes], column: str) -> int:
    try:
        return int(row[column])
    except ValueError as error:
        raise ValueError(f"its {column} is {row[column][:20]!r}; it should be a number") from error


def unpack(cell: bytes | str, dtype: str, what: str) -> NDArray[np.generic]:
    """The numbers that a base64 cell holds. ValueError if it is damaged or cut short."""
    try:
        return np.frombuffer(base64.b64decode(cell, validate=True), dtype=dtype)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"its {what} cannot be read as base64 of {dtype} ({error})") from error
