"""VLP's feature files: fc6 vectors and class probabilities in HDF5 or npy, boxes in HDF5 (vlp/seq2seq_loader.py).

`--source` names them all, or their folder: `PREFIX_featNNN.h5` and `PREFIX_clsNNN.h5`, where NNN are the last three
letters of the pictures' ids, or `ID.npy` and `ID_cls_prob.npy`; and one h5 with a row per box: x1 y1 x2 y2 in pixels,
class, confidence. The picture's size is nowhere: VLP takes the largest coordinates of its boxes, and so do we. The
class of a box, which VLP drops, is left out. Captions are Karpathy's json (`--captions dataset_coco.json`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlscale.data.detections import Detections
from vlscale.data.formats.base import Extras, Options, files_in, optional
from vlscale.data.making.write import Sample, Source
from vlscale.errors import DataError

__all__ = ["Options", "source"]

FEATURES = re.compile(r"(.*)_feat(\w{3})\.h5")


class _Files(NamedTuple):
    """Where the arrays of one picture are."""

    features: Path
    probs: Path
    boxes: Path


def source(paths: Sequence[Path], options: Options) -> Source[_Files]:
    """The files that `paths` are or hold. DataError if a kind is missing, ConfigError if h5py is."""
    optional("h5py")
    files = [file for _, file in files_in(paths, r".*\.(h5|hdf5|npy)", "h5 or npy file")]
    boxes = [file for file in files if file.suffix != ".npy" and not re.search(r"_(feat|cls)\w{3}\.h5$", file.name)]
    if not boxes:
        raise DataError(f"{', '.join(map(str, paths))} holds no h5 file of boxes; name it in --source as well")
    pairs = [
        (file, file.with_name(f"{part[1]}_cls{part[2]}.h5")) for file in files if (part := FEATURES.match(file.name))
    ]
    pairs += [
        (file, file.with_name(f"{file.stem}_cls_prob.npy"))
        for file in files
        if file.suffix == ".npy" and not file.stem.endswith("_cls_prob")
    ]
    if not pairs:
        raise DataError(f"{', '.join(map(str, paths))} holds no features: PREFIX_featNNN.h5 or ID.npy")
    return _Vlp(pairs, boxes, Extras(options))


@dataclass(frozen=True)
class _Vlp:
    pairs: list[tuple[Path, Path]]
    boxes: list[Path]
    extras: Extras

    def items(self) -> Iterator[tuple[str, _Files]]:
        with ExitStack() as stack:
            boxes = [(path, stack.enter_context(_open(path))) for path in self.boxes]
            for features, probs in self.pairs:
                for name in _names(features):
                    found = next((path for path, file in boxes if name in file), self.boxes[0])
                    yield name, _Files(features, probs, found)

    def sample(self, name: str, item: _Files) -> Sample:
        features, probs, rows = (_read(path, name, kind) for kind, path in zip(_Files._fields, item, strict=True))
        if rows.ndim != 2 or rows.shape[1] != 6 or not len(rows):
            raise ValueError(f"its boxes have the shape {list(rows.shape)}; they should be [regions, 6]")
        corners = np.asarray(rows[:, :4], dtype=np.float32)
        width, height = (math.ceil(float(side)) for side in corners.reshape(-1, 2).max(axis=0))
        regions = Detections(features, corners, width, height, class_confidence=rows[:, 5], class_probs=probs)
        return self.extras.sample(name, regions)


def _open(path: Path) -> Any:
    try:
        return optional("h5py").File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is no readable HDF5 file ({error})") from error


def _names(features: Path) -> list[str]:
    """The pictures of a file, in order."""
    if features.suffix == ".npy":
        return [features.stem]
    with _open(features) as file:
        return sorted(file.keys())


def _read(path: Path, name: str, kind: str) -> NDArray[Any]:
    """The array of picture `name`. ValueError if it is missing or cannot be read."""
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        with optional("h5py").File(path, "r") as file:
            return np.asarray(file[name][:])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold its {kind} ({error})") from error
