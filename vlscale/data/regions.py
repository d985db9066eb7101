"""Regions of a detector: `regions.npz` to arrays, a region's place in each system's way, and what is hidden.

R regions of a picture, F numbers of a feature, C classes of the detector. Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.augment import require
from vlscale.data.detections import read_regions

if TYPE_CHECKING:
    from vlscale.types import Geometry, Inputs

Floats = NDArray[np.float32]
# fields of `Visual` that a file may hold beside `features` and `boxes`, and what they become
FIELDS: Mapping[str, type[np.generic]] = {
    "classes": np.int64,
    "class_confidence": np.float32,
    "class_probs": np.float32,
    "attributes": np.int64,
    "attribute_confidence": np.float32,
}


class Regions(NamedTuple):
    """What a detector found in one picture, in the file's order."""

    feats: Floats  # [R, F]
    boxes: Floats  # [R, 4] pixels x1 y1 x2 y2
    size: tuple[float, float]  # width and height of the picture in pixels
    fields: dict[str, NDArray[Any]]  # [R, ...] each, by name of `FIELDS`


def parse(data: bytes, most: int, wanted: frozenset[str], size: tuple[float, float] | None) -> Regions:
    """The first `most` regions of a `regions.npz`, with the wanted ones of `FIELDS`.

    `size` is the picture's (width, height) where the file does not tell. ValueError with the reason if the file
    is damaged, lacks something or holds what cannot be (`vlscale.data.detections.faults`).
    """
    kinds = {name: kind for name, kind in FIELDS.items() if name in wanted}
    found = read_regions(data, size, kinds)
    held = {name: getattr(found, name) for name in kinds}
    missing = [name for name, values in held.items() if values is None]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    fields = {name: values[:most].astype(kinds[name], copy=False) for name, values in held.items()}
    size = float(found.width), float(found.height)
    return Regions(found.features[:most], found.boxes[:most], size, fields)


def check_widths(found: Regions, inputs: Inputs) -> None:
    """ValueError if features, distributions or class numbers are not those that the family is built for."""
    feats, probs, classes = found.feats.shape[1], found.fields.get("class_probs"), found.fields.get("classes")
    if feats != inputs.feats:
        raise ValueError(f"it has features of {feats} numbers, not family.feats={inputs.feats}")
    if probs is not None and probs.shape[1] != inputs.classes:
        raise ValueError(f"it has class_probs of {probs.shape[1]} classes, not family.classes={inputs.classes}")
    if classes is not None and len(classes) and not 0 <= classes.min() <= classes.max() < inputs.classes:
        raise ValueError(f"it has classes from {classes.min()} to {classes.max()}, but family.classes={inputs.classes}")


# --- where a region is -------------------------------------------------------------------------------------


def corners(regions: Regions) -> Floats:
    """[R, 4] x1/W, y1/H, x2/W, y2/H (LXMERT: pretrain/lxmert_data.py)."""
    width, height = regions.size
    return np.divide(regions.boxes, np.array([width, height, width, height], dtype=np.float32), dtype=np.float32)


def corners_area(regions: Regions) -> Floats:
    """[R, 5] and the share of the picture's area (ViLBERT: section 3.1)."""
    x1, y1, x2, y2 = places = corners(regions).T
    return np.stack([*places, (x2 - x1) * (y2 - y1)], axis=1)


def corners_size(regions: Regions) -> Floats:
    """[R, 6] and w/W, h/H (OSCAR: section 3)."""
    x1, y1, x2, y2 = places = corners(regions).T
    return np.stack([*places, x2 - x1, y2 - y1], axis=1)


def corners_size_area(regions: Regions) -> Floats:
    """[R, 7] and the share of the area (UNITER: section 3.1)."""
    x1, y1, x2, y2 = places = corners(regions).T
    width, height = x2 - x1, y2 - y1
    return np.stack([*places, width, height, width * height], axis=1)


def extent_area_score(regions: Regions) -> Floats:
    """[R, 6] corners in units of the greatest x and y of any box, the area in them, the detector's confidence.

    VLP (vlp/seq2seq_loader.py), which divides by the boxes' extent and not by the picture's size.
    """
    extent = regions.boxes.reshape(-1, 2).max(axis=0, initial=0.0) + 1e-5  # the authors' guard against 0
    x1, y1, x2, y2 = places = (regions.boxes / np.tile(extent, 2).astype(np.float32)).T
    area = np.maximum(0.0, (x2 - x1) * (y2 - y1))
    return np.stack([*places, area, regions.fields["class_confidence"]], axis=1)


PLACES: Mapping[Geometry, Callable[[Regions], Floats]] = {
    "corners": corners,
    "corners_area": corners_area,
    "corners_size": corners_size,
    "corners_size_area": corners_size_area,
    "extent_area_score": extent_area_score,
}


# --- what is hidden ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskRegions:
    """Each region is picked with probability `prob`; what it was is left to restore.

    A picked region's feature becomes zero with probability `zero_share`, that of a region of another picture with
    `random_share`, else stays. UNITER: all zero, at least one; ViLBERT: 0.9 zero, no other; LXMERT: 0.8, 0.1.
    """

    prob: float = 0.15
    zero_share: float = 1.0
    random_share: float = 0.0
    at_least_one: bool = True

    def __post_init__(self) -> None:
        require(0 < self.prob <= 1, "prob", "a number above 0 and at most 1")
        require(0 <= self.zero_share <= 1, "zero_share", "a number in [0, 1]")
        rest = round(1 - self.zero_share, 9)
        require(0 <= self.random_share <= rest, "random_share", f"a number in [0, {rest:g}]")

    def __call__(
        self, feats: Floats, other: Callable[[Generator], Floats | None], rng: Generator
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """(features [R, F], picked [R]); `other` gives a region of another picture, [F], or None if it has none."""
        draws = rng.random((2, len(feats)))
        picked = draws[0] < self.prob
        if self.at_least_one and len(feats) and not picked.any():
            picked[rng.integers(len(feats))] = True
        hidden = feats.copy()
        hidden[picked & (draws[1] < self.zero_share)] = 0.0
        swapped = picked & (draws[1] >= self.zero_share) & (draws[1] < self.zero_share + self.random_share)
        for row in np.flatnonzero(swapped):
            found = other(rng)
            if found is not None:
                hidden[row] = found
        return hidden, picked
