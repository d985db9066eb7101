"""What a detector says of one picture, and the `regions.npz` of a sample that holds it. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlscale.data.arrays import read_arrays

OUTSIDE = 1.0  # pixels that a box may reach out of its picture: detectors count from 0 or from 1
MAX_CLASS = 1_000_000  # far above any detector's
BY_REGION = ("classes", "class_confidence", "attributes", "attribute_confidence")  # each [R]
SHARES = ("class_confidence", "class_probs", "attribute_confidence")  # each in 0 to 1
FLOATS = ("features", "boxes", *SHARES)
_GREATEST = float(np.finfo(np.float32).max)

Floats = NDArray[Any]  # float16 or float32


class Detections(NamedTuple):
    """The regions of one picture: R of them, F numbers each, C classes."""

    features: Floats  # [R, F]
    boxes: Floats  # [R, 4] pixels, x1 y1 x2 y2
    width: int  # pixels of the picture that the boxes lie in
    height: int
    classes: NDArray[np.int64] | None = None  # [R], the best class as the detector numbers it
    class_confidence: Floats | None = None  # [R]
    class_probs: Floats | None = None  # [R, C]
    attributes: NDArray[np.int64] | None = None  # [R]
    attribute_confidence: Floats | None = None  # [R]


def write_regions(detections: Detections, dtype: str = "float16") -> bytes:
    """The bytes of `regions.npz`, the same for the same detections; features and class_probs as `dtype`.

    ValueError if the detections are not sound, or do not fit into `dtype`.
    """
    kinds = {"features": dtype, "class_probs": dtype, "classes": "int64", "attributes": "int64"}
    present = {name: value for name, value in detections._asdict().items() if value is not None}
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused below
        arrays = {
            name: np.asarray(value, dtype="int64" if isinstance(value, int) else kinds.get(name, "float32"))
            for name, value in present.items()
        }
    if np.isfinite(detections.features).all() and not np.isfinite(arrays["features"]).all():
        raise ValueError(f"its features are too large for {dtype}; write them as float32")
    check(_detections(arrays))
    out = BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def read_regions(
    data: bytes, size: tuple[float, float] | None = None, only: Collection[str] | None = None, numbers: bool = True
) -> Detections:
    """The detections that `regions.npz` holds; training and `shards.py verify` both read it here.

    Numbers with a fraction become float32. `size` is (width, height) of the picture where the file does not tell; of
    what not every file has, `only` these fields where given. ValueError if it cannot be read, lacks what every one
    has, or is not sound (see `faults`).
    """
    every = ("features", "boxes", "width", "height")
    arrays = read_arrays(data, Detections._fields if only is None else (*every, *only))
    if size and not ("width" in arrays and "height" in arrays):
        arrays.update(width=np.array(size[0]), height=np.array(size[1]))
    missing = [name for name in every if name not in arrays]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}" + (_NO_SIZE if missing[0] in every[2:] else ""))
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"its {name} are {array.dtype}; they should be numbers")
    for name in ("width", "height"):
        if arrays[name].size != 1 or not np.isfinite(arrays[name]).all():
            raise ValueError(f"its {name} has the shape {list(arrays[name].shape)}; it should be one finite number")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is a fault
        floats = {name: arrays[name].astype(np.float32, copy=False) for name in FLOATS if name in arrays}
    found = _detections({**arrays, **floats})
    check(found, numbers)
    return found


_NO_SIZE = ": neither it nor the json tells how large the picture is"


def _detections(arrays: dict[str, NDArray[Any]]) -> Detections:
    sizes = {name: int(arrays[name].item()) for name in ("width", "height")}
    return Detections(**{**arrays, **sizes})  # type: ignore[arg-type]


def check(detections: Detections, numbers: bool = True) -> None:
    """ValueError with the first fault: a shape and, if `numbers`, a value or a box outside its picture."""
    fault = next(faults(detections, numbers), None)
    if fault:
        raise ValueError(fault)


def faults(detections: Detections, numbers: bool = True) -> Iterator[str]:
    """What is wrong with the shapes and, if `numbers`, with the values; a clause each. No region is no fault."""
    features, boxes = detections.features, detections.boxes
    if features.ndim != 2 or not features.shape[1]:
        yield f"features have the shape {list(features.shape)}; they should be [regions, width]"
        return
    regions = features.shape[0]
    if boxes.shape != (regions, 4):
        yield f"boxes have the shape {list(boxes.shape)}; they should be [{regions}, 4]"
        return
    probs = detections.class_probs
    if probs is not None and (probs.ndim != 2 or probs.shape[0] != regions or not probs.shape[1]):
        yield f"class_probs have the shape {list(probs.shape)}; they should be [{regions}, classes]"
        return
    for name in BY_REGION:
        value = getattr(detections, name)
        if value is not None and value.shape != (regions,):
            yield f"{name} have the shape {list(value.shape)}; they should be [{regions}]"
            return
    if detections.width < 1 or detections.height < 1:
        yield f"the picture is {detections.width} x {detections.height} pixels"
    if numbers and regions:
        yield from _wrong_numbers(detections)


def _wrong_numbers(detections: Detections) -> Iterator[str]:
    """Of at least one region."""
    for name in FLOATS:
        value = getattr(detections, name)
        if value is None:
            continue
        low, high = float(value.min()), float(value.max())  # NaN if there is one
        if not -_GREATEST <= low <= high <= _GREATEST:
            yield f"{name} hold a number that is not finite"
            return
        if name in SHARES and (low < 0 or high > 1.001):  # float16 rounds 1 up or down
            yield f"{name} lie in {low:.3g} to {high:.3g}; they should lie in 0 to 1"
    for name in ("classes", "attributes"):
        value = getattr(detections, name)
        if value is not None and not (value.min() >= 0 and value.max() <= MAX_CLASS and (value % 1 == 0).all()):
            yield f"{name} lie in {value.min()} to {value.max()}; they should be whole numbers, 0 to {MAX_CLASS}"
    yield from _wrong_boxes(detections)


def _wrong_boxes(detections: Detections) -> Iterator[str]:
    x1, y1, x2, y2 = detections.boxes.T
    limits = np.array([detections.width, detections.height] * 2) + OUTSIDE
    outside = (detections.boxes < -OUTSIDE) | (detections.boxes > limits)
    if outside.any():
        box = _words(detections.boxes[outside.any(axis=1)][0])
        yield f"box {box} lies outside the picture of {detections.width} x {detections.height} pixels"
    turned = (x2 < x1) | (y2 < y1)
    if turned.any():
        yield f"box {_words(detections.boxes[turned][0])} is not x1 y1 x2 y2 with x1 <= x2 and y1 <= y2"


def _words(box: Floats) -> str:
    return "[" + ", ".join(f"{number:.1f}" for number in box.tolist()) + "]"
