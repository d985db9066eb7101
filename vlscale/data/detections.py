"""What a detector says of one picture, and the `regions.npz` of a sample that holds it. Nothing is unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

OUTSIDE = 1.0  # pixels that a box may reach out of its picture: detectors count from 0 or from 1
BY_REGION = ("classes", "class_confidence", "attributes", "attribute_confidence")  # each [R]

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


def read_regions(data: bytes, size: tuple[int, int] | None = None) -> Detections:
    """The detections that `regions.npz` holds; `size` is (width, height) of the picture where it does not tell.

    ValueError if it cannot be read, or lacks what every one has.
    """
    arrays = read_arrays(data, Detections._fields)
    if size and "width" not in arrays:
        arrays.update(width=np.array(size[0]), height=np.array(size[1]))
    missing = [name for name in ("features", "boxes", "width", "height") if name not in arrays]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name in ("width", "height"):
        if arrays[name].ndim != 0:
            raise ValueError(f"its {name} has the shape {list(arrays[name].shape)}; it should be one number")
    return _detections(arrays)


def read_arrays(data: bytes, names: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of an npz by name, only `names` where given. ValueError if damaged, or pickled inside."""
    if data[:4] != b"PK\x03\x04":
        raise ValueError("it is no npz" if data else "it is empty")
    try:
        with np.load(BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files if not names or name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"it is an npz that is damaged or cut short ({error})") from error
    except ValueError as error:
        pickled = "pickle" in str(error)
        raise ValueError("it holds pickled objects, which are never loaded" if pickled else str(error)) from error


def _detections(arrays: dict[str, NDArray[Any]]) -> Detections:
    sizes = {name: int(arrays[name]) for name in ("width", "height")}
    return Detections(**{**arrays, **sizes})  # type: ignore[arg-type]


def check(detections: Detections, numbers: bool = True) -> None:
    """ValueError with the first fault: a shape and, if `numbers`, a value or a box outside its picture."""
    fault = next(faults(detections, numbers), None)
    if fault:
        raise ValueError(fault)


def faults(detections: Detections, numbers: bool = True) -> Iterator[str]:
    """What is wrong with the shapes and, if `numbers`, with the values; a clause each."""
    features, boxes = detections.features, detections.boxes
    if features.ndim != 2 or 0 in features.shape:
        yield f"features have the shape {list(features.shape)}; they should be [regions, width], not empty"
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
    yield from _wrong_kinds(detections)
    if numbers:
        yield from _wrong_numbers(detections)


def _wrong_kinds(detections: Detections) -> Iterator[str]:
    for name in ("classes", "attributes"):
        value = getattr(detections, name)
        if value is not None and not np.issubdtype(value.dtype, np.integer):
            yield f"{name} are {value.dtype}; they should be integers"
    for name in ("features", "boxes", "class_confidence", "class_probs", "attribute_confidence"):
        value = getattr(detections, name)
        if value is not None and not np.issubdtype(value.dtype, np.floating):
            yield f"{name} are {value.dtype}; they should be floating"


def _wrong_numbers(detections: Detections) -> Iterator[str]:
    for name in ("features", "boxes", "class_confidence", "class_probs", "attribute_confidence"):
        value = getattr(detections, name)
        if value is not None and not np.isfinite(value).all():
            yield f"{name} hold a number that is not finite"
            return
    for name in ("class_confidence", "class_probs", "attribute_confidence"):
        value = getattr(detections, name)
        if value is not None and (value.min() < 0 or value.max() > 1.001):  # float16 rounds 1 up or down
            yield f"{name} lie in {value.min():.3g} to {value.max():.3g}; they should lie in 0 to 1"
    for name in ("classes", "attributes"):
        value = getattr(detections, name)
        if value is not None and value.min() < 0:
            yield f"{name} hold {value.min()}; they should be 0 or more"
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
