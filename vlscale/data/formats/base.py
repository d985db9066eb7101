"""What the formats share: options, optional libraries, and near names of the same arrays."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlscale.data.detections import OUTSIDE, Detections
from vlscale.data.formats import recognise
from vlscale.data.formats.captions import Texts, read_texts
from vlscale.data.making.write import Sample
from vlscale.errors import ConfigError, DataError

Arrays = Mapping[str, Any]  # of one picture, by the names of whoever wrote them
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
# A file that tells normalised boxes and no size of the picture: written as if the picture had this many pixels each
# way, which gives back the same normalised boxes.
UNKNOWN_SIDE = 1_000

NAMES = {  # of `Detections` -> the names in use, ours first
    "features": ("features", "x", "feature", "feats", "feat", "roi_features"),
    "boxes": ("boxes", "bbox", "bboxes", "box", "rois"),
    "normalised": ("norm_bb", "norm_bbox", "norm_boxes", "normalized_boxes", "normalized_bbox"),
    "width": ("width", "img_w", "image_w", "image_width", "img_width", "w"),
    "height": ("height", "img_h", "image_h", "image_height", "img_height", "h"),
    "classes": ("classes", "objects_id", "objects", "obj_ids", "cls_id"),
    "class_confidence": ("class_confidence", "objects_conf", "conf", "confidence", "obj_probs", "scores"),
    "class_probs": ("class_probs", "soft_labels", "cls_prob", "cls_probs", "class_prob"),
    "attributes": ("attributes", "attrs_id", "attr_ids"),
    "attribute_confidence": ("attribute_confidence", "attrs_conf", "attr_probs"),
    "count": ("num_boxes", "num_bbox", "num_bboxes", "num_box"),
}


class Options(NamedTuple):
    """What the command line says of a source."""

    captions: tuple[Path, ...] = ()
    vocab: Path | None = None
    class_names: Path | None = None
    images: Path | None = None  # folder that relative picture paths are in
    split: tuple[str, ...] = ()  # which parts of a file that holds several; empty: all
    rates: tuple[float, ...] = ()  # rows a second of each folder of frames' features; empty: one


def optional(module: str) -> Any:
    """A library that only some formats need. ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        reason = f"this format is read with {package}, which is not installed; `pip install lmdb msgpack lz4 h5py`"
        raise ConfigError(reason) from error


class Extras:
    """Captions and class names, which go with any format's regions."""

    def __init__(self, options: Options) -> None:
        """Read the files. DataError if one cannot be read."""
        self.texts: Texts | None = read_texts(options.captions) if options.captions else None
        self.class_names = read_names(options.class_names) if options.class_names else None

    def sample(self, name: str, regions: Detections, record: Mapping[str, object] | None = None) -> Sample:
        """The sample of these regions. ValueError if there are captions, but none for it."""
        texts = texts_of(self.texts, name) if self.texts else {}
        tags = {"tags": tags_of(regions, self.class_names)} if self.class_names else {}
        sizes = {"width": regions.width, "height": regions.height}
        return Sample({**texts, **tags, **sizes, **(record or {})}, regions=regions)


def texts_of(texts: Texts, name: str) -> dict[str, object]:
    """Captions and questions of a picture. ValueError if there are none."""
    found = texts.of(name)
    if not found:
        raise ValueError("the captions have no text for it")
    return found


def read_names(path: Path) -> list[str]:
    """The detector's class names, one per line; of `a,b` the first. DataError if it is no text."""
    try:
        return [line.split(",")[0].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is no UTF-8 text; write one class name per line") from error


def tags_of(regions: Detections, names: Sequence[str]) -> list[str]:
    """The name of each region's class. ValueError if there are more classes than names.

    Class probabilities of one column more than there are names start with the background.
    """
    if regions.classes is not None:
        best = regions.classes
    elif regions.class_probs is not None:
        background = regions.class_probs.shape[1] - len(names)
        if background not in (0, 1):
            raise ValueError(f"it has {regions.class_probs.shape[1]} classes for {len(names)} class names")
        best = regions.class_probs[:, background:].argmax(axis=1)
    else:
        raise ValueError("it has no classes that could be named")
    if best.max(initial=0) >= len(names):
        raise ValueError(f"it has class {best.max()} for {len(names)} class names")
    return [names[number] for number in best.tolist()]


def detections(arrays: Arrays) -> Detections:
    """The arrays of one picture under our names, with boxes in pixels. ValueError with what is missing or wrong.

    Features may stand as [F, R]; normalised boxes become pixels; boxes that reach out by a pixel are cut.
    """
    found = {ours: arrays[theirs] for ours, names in NAMES.items() for theirs in names[::-1] if theirs in arrays}
    if "features" not in found or not {"boxes", "normalised"} & set(found):
        missing = "features" if "features" not in found else "boxes"
        some = ", ".join(sorted(arrays)[:12])
        raise ValueError(f"it has no {missing} (one of {', '.join(NAMES[missing])}), only {some}")
    boxes = np.asarray(found["normalised" if "normalised" in found else "boxes"], dtype=np.float32)
    if boxes.ndim != 2 or boxes.shape[1] < 4:
        raise ValueError(f"its boxes have the shape {list(boxes.shape)}; they should be [regions, 4]")
    regions = int(found.get("count", len(boxes)))
    features = np.asarray(found["features"])
    if features.ndim == 2 and features.shape[1] == len(boxes) != features.shape[0]:
        features = features.T
    rest = {name: _array(name, found[name])[:regions] for name in BY_REGION if found.get(name) is not None}
    width, height = _size(found)
    pixels = to_pixels(boxes[:regions, :4], width, height, "normalised" in found)
    return Detections(features[:regions], pixels, width, height, **rest)


BY_REGION = ("classes", "class_confidence", "class_probs", "attributes", "attribute_confidence")


def _array(name: str, value: object) -> NDArray[Any]:
    integers = name in ("classes", "attributes")
    return np.asarray(value).astype(np.int64) if integers else np.asarray(value)


def _size(found: Arrays) -> tuple[int, int]:
    if "width" in found and "height" in found:
        return int(np.asarray(found["width"]).item()), int(np.asarray(found["height"]).item())
    if "normalised" in found:
        return UNKNOWN_SIDE, UNKNOWN_SIDE
    names = f"{', '.join(NAMES['width'][:3])} and {', '.join(NAMES['height'][:3])}"
    raise ValueError(f"it does not tell the picture's size ({names})")


def to_pixels(boxes: NDArray[Any], width: int, height: int, normalised: bool) -> NDArray[np.float32]:
    """float32 [R, 4] in pixels; what reaches out by a pixel or by rounding of float16 is cut."""
    sides = np.array([width, height, width, height], dtype=np.float32)
    pixels = boxes * sides if normalised else boxes.astype(np.float32)
    slack = np.maximum(OUTSIDE, sides / 1_000)  # float16 has steps of 1/1024 below 1
    inside = ((pixels >= -slack) & (pixels <= sides + slack)).all()
    return np.clip(pixels, 0, sides) if inside else pixels


def files_in(paths: Sequence[Path], pattern: str, what: str) -> Iterator[tuple[Path, Path]]:
    """(folder, file) of the files that `paths` are or hold, sorted, but for hidden ones. DataError if there is none."""
    found = False
    other: Path | None = None  # the first file that is none
    for path in paths:
        folder = path if path.is_dir() else path.parent
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if hidden or not file.is_file():
                continue
            if re.fullmatch(pattern, file.name, re.IGNORECASE):
                found = True
                yield folder, file
            other = other or file
    if not found:
        known = recognise.format_in(other) if other else ""
        hint = f"; {other.name} looks like {known}: write --from {known}" if other and known else ""
        raise DataError(f"{', '.join(map(str, paths))} holds no {what}{hint}")
