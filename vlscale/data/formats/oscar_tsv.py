"""VinVL's and OSCAR's TSV files: features, labels, sizes, captions (oscar/datasets/oscar_tsv.py, run_captioning.py).

A folder holds `*feature*.tsv` and beside it, if they are there,

- `*label*.tsv` or `*prediction*.tsv`: key, JSON of the detected objects (class, conf, rect), or of a mapping with
  `objects`, `image_h` and `image_w`;
- `*.hw.tsv`: key, JSON of height and width.

A row of features is key, number of boxes, base64 float32, or key and JSON of `num_boxes` and `features`; each box has
2,048 numbers and six of its place (x1/W, y1/H, x2/W, y2/H, w/W, h/H). Files are read in order, so a lineidx is not
needed. Class names become tags in the order of the regions; their numbers are not in these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlscale.data.detections import Detections
from vlscale.data.formats.base import Extras, Options, files_in, to_pixels
from vlscale.data.formats.lxmert_tsv import unpack
from vlscale.data.making.write import Sample, Source

__all__ = ["Options", "source"]

PLACE = 6  # numbers of a box's place behind its feature


class _Row(NamedTuple):
    """Where the rows of one picture are found."""

    features: bytes
    labels: tuple[Path, int] | None  # file and offset
    size: tuple[Path, int] | None


def source(paths: Sequence[Path], options: Options) -> Source[_Row]:
    """The feature files that `paths` are or hold. DataError if there is none."""
    return _Oscar([file for _, file in files_in(paths, r".*feat.*\.tsv", "feature tsv")], Extras(options))


@dataclass(frozen=True)
class _Oscar:
    files: list[Path]
    extras: Extras

    def items(self) -> Iterator[tuple[str, _Row]]:
        for path in self.files:
            labels = _offsets(path.parent, ("*label*.tsv", "*prediction*.tsv"))
            sizes = _offsets(path.parent, ("*hw.tsv",))
            with open(path, "rb") as file:
                for line in file:
                    key = line.split(b"\t", 1)[0].strip()
                    if key:
                        yield key.decode(errors="replace"), _Row(line, labels.get(key), sizes.get(key))

    def sample(self, name: str, item: _Row) -> Sample:
        features = _features(item.features)
        labels = _cell(item.labels) if item.labels else []
        objects, rects = _objects(labels)
        places = _places(features)
        if places is None and len(rects) != len(features):
            raise ValueError(f"its {features.shape[1]} numbers per box hold no place, and neither do its labels")
        size = _size(labels, _cell(item.size) if item.size else None)
        width, height = size or _size_from(places, rects)
        boxes = rects if places is None else places
        scores = [each["conf"] for each in objects if "conf" in each]
        regions = Detections(
            features if places is None else features[:, :-PLACE],
            to_pixels(boxes, width, height, normalised=places is not None),
            width,
            height,
            class_confidence=np.array(scores, dtype=np.float32) if len(scores) == len(features) else None,
        )
        tags = [str(each["class"]) for each in objects if "class" in each]
        return self.extras.sample(name, regions, {"tags": tags} if tags else {})


def _objects(labels: Any) -> tuple[list[dict[str, Any]], NDArray[np.float32]]:
    """The detected objects, and their boxes [N, 4] in pixels. ValueError if they are something else."""
    objects = labels.get("objects") if isinstance(labels, dict) else labels
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise ValueError("its labels are no list of objects")
    try:
        rects = [[float(number) for number in each["rect"]] for each in objects if "rect" in each]
        return objects, np.array(rects, dtype=np.float32).reshape(-1, 4)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its labels hold a rect that is not four numbers ({error})") from error


def _offsets(folder: Path, patterns: tuple[str, ...]) -> dict[bytes, tuple[Path, int]]:
    """Where the row of each key starts, in the first files that there are."""
    found = next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])
    out: dict[bytes, tuple[Path, int]] = {}
    for path in found:
        offset = 0
        with open(path, "rb") as file:
            for line in file:
                out[line.split(b"\t", 1)[0].strip()] = (path, offset)
                offset += len(line)
    return out


def _cell(place: tuple[Path, int]) -> Any:
    """The JSON in the second cell of the row at (file, offset). ValueError if it cannot be read."""
    path, offset = place
    with open(path, "rb") as file:
        file.seek(offset)
        cells = file.readline().split(b"\t", 1)
    try:
        return json.loads(cells[1])
    except (IndexError, ValueError) as error:
        raise ValueError(f"its row of {path.name} is no JSON ({error})") from error


def _features(line: bytes) -> NDArray[np.float32]:
    """[R, F] of a row of features."""
    cells = line.rstrip(b"\r\n").split(b"\t")
    try:
        if len(cells) == 2:
            row = json.loads(cells[1])
            count, packed = int(row["num_boxes"]), row["features"]
        else:
            count, packed = int(cells[1]), cells[-1]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"its row of features is not key, number of boxes, base64 ({error!r})") from error
    numbers = unpack(packed, "<f4", "features")
    if count < 1 or numbers.size % count:
        raise ValueError(f"its features are {numbers.size} numbers, which is not right for {count} boxes")
    return numbers.reshape(count, -1).astype(np.float32)


def _places(features: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """[R, 4] normalised boxes behind the features, or None where the last six numbers are no place."""
    if features.shape[1] <= PLACE:
        return None
    x1, y1, x2, y2, w, h = features[:, -PLACE:].T
    fits = np.isclose(x2 - x1, w, atol=0.02) & np.isclose(y2 - y1, h, atol=0.02)  # detectors count widths from 0 or 1
    inside = (features[:, -PLACE:] >= -0.02) & (features[:, -PLACE:] <= 1.02)
    return features[:, -PLACE:-2] if fits.all() and inside.all() else None


def _size(labels: Any, sizes: Any) -> tuple[int, int] | None:
    """(width, height) that the labels or the hw file tell, or None."""
    if isinstance(labels, dict) and "image_w" in labels and "image_h" in labels:
        return int(labels["image_w"]), int(labels["image_h"])
    told = sizes[0] if isinstance(sizes, list) and sizes else sizes
    if isinstance(told, Mapping) and "width" in told and "height" in told:
        return int(told["width"]), int(told["height"])
    return None


def _size_from(places: NDArray[np.float32] | None, rects: NDArray[np.float32]) -> tuple[int, int]:
    """(width, height) from boxes in pixels over the same boxes normalised."""
    if places is None or len(rects) != len(places):
        raise ValueError("neither labels nor a hw.tsv tell the picture's size")
    with np.errstate(divide="ignore", invalid="ignore"):
        width, height = np.nanmedian(rects[:, 2:] / np.where(places[:, 2:] > 0, places[:, 2:], np.nan), axis=0)
    if not np.isfinite([width, height]).all():
        raise ValueError("its boxes do not tell the picture's size")
    return round(float(width)), round(float(height))
