"""Regions for shards of pictures, by any object detector that transformers loads from a local folder.

A query's vector in the last layer is its region's feature. Where the detector has a class for 'no object' (DETR,
YOLOS), class_probs are its softmax with that column FIRST, as bottom-up attention has the background; where its classes
are judged each by itself (Conditional and Deformable DETR, RT-DETR), class_probs are the softmax without a background
and the confidence is the sigmoid that the model is trained with. `classes` are numbered as the detector does.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.decode import Pixels, decode
from vlscale.data.detections import Detections, write_regions
from vlscale.data.making.write import Member, Written, require_dtype, rewrite
from vlscale.data.samples import REGION_FIELD, picture_field
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError

LEAST = 10  # regions that stay whatever their confidence: MIN_BOXES of bottom-up attention's tools/generate_tsv.py


@dataclass(frozen=True)
class Choice:
    """Which of a detector's boxes become regions."""

    regions: int = 36  # at most, the surest first
    threshold: float = 0.2  # least confidence of all but the first `LEAST`

    def __post_init__(self) -> None:
        """ConfigError for numbers that cannot be."""
        if self.regions < 1:
            raise ConfigError(f"--regions is {self.regions}; write 1 or more")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"--threshold is {self.threshold}; write a number in 0 to 1")

    def __call__(self, confidence: NDArray[np.float32]) -> NDArray[np.int64]:
        """The chosen ones of [Q] confidences, the surest first; ties by their place."""
        order = np.argsort(-confidence, kind="stable")[: self.regions]
        above = int((confidence[order] >= self.threshold).sum())
        return order[: max(above, LEAST)]


class Detector:
    """An object detector of transformers with its image processor."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """Load from `folder`, which holds config.json, model.safetensors and preprocessor_config.json.

        ConfigError if it does not, or if the model is no object detector.
        """
        import torch
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
        from transformers.utils import logging

        if not (folder / "config.json").is_file():
            raise ConfigError(f"--detector {folder} holds no config.json; write a folder that save_pretrained made")
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        logging.disable_progress_bar()
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForObjectDetection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._model = model.eval().to(name)
        except (OSError, ValueError, ImportError, RuntimeError, KeyError, AssertionError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(f"--detector {folder} cannot be loaded on {name}: {first}") from error
        self.device = name
        self.names = [str(name) for _, name in sorted(model.config.id2label.items())]

    def __call__(self, pictures: Sequence[Pixels], choice: Choice) -> list[Detections]:
        """The regions of each picture, which do not depend on the other pictures."""
        prepared = [self._prepare(pixels) for pixels in pictures]
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, values in enumerate(prepared):  # padding would reach the queries of models without a pixel mask
            alike[values.shape].append(i)
        found: dict[int, Detections] = {}
        for rows in alike.values():
            out = self._run(np.stack([prepared[i] for i in rows]))
            for row, i in enumerate(rows):
                found[i] = self._regions({name: value[row] for name, value in out.items()}, pictures[i], choice)
        return [found[i] for i in range(len(pictures))]

    def _prepare(self, pixels: Pixels) -> NDArray[np.float32]:
        """[3, h, w], resized and normalised as the detector wants it."""
        values = self._processor(images=pixels, do_pad=False, return_tensors="np")["pixel_values"]
        return np.asarray(values[0], dtype=np.float32)

    def _run(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """`logits` [B, Q, C], `boxes` [B, Q, 4] (centre and size in 0..1) and `features` [B, Q, F]."""
        import torch

        try:
            with torch.inference_mode():
                out = self._model(pixel_values=torch.from_numpy(pixels).to(self.device))
        except torch.OutOfMemoryError as error:
            reason = (
                f"{len(pixels)} pictures of {pixels.shape[3]} x {pixels.shape[2]} pixels do not fit on {self.device}"
            )
            raise ConfigError(f"{reason}; write a smaller --batch") from error
        hidden, queries = getattr(out, "last_hidden_state", None), out.logits.shape[1]
        if hidden is None or hidden.ndim != 3 or hidden.shape[1] < queries:
            kind = type(self._model).__name__
            raise ConfigError(f"{kind} gives no vector for each of its boxes; use a detector of queries, such as DETR")
        tensors = {"logits": out.logits, "boxes": out.pred_boxes, "features": hidden[:, -queries:]}  # YOLOS: at the end
        return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}

    def _regions(self, out: dict[str, NDArray[np.float32]], pixels: Pixels, choice: Choice) -> Detections:
        """The chosen queries of one picture."""
        height, width = pixels.shape[:2]
        logits = out["logits"]
        probs = _softmax(logits)
        if logits.shape[1] == len(self.names) + 1:  # the last one is 'no object'
            probs = np.roll(probs, 1, axis=1)
            scores = probs[:, 1:]
        else:
            scores = np.asarray(1 / (1 + np.exp(-logits.clip(-80, 80))), dtype=np.float32)
        classes, confidence = scores.argmax(axis=1), scores.max(axis=1)
        rows = choice(confidence)
        x, y, w, h = out["boxes"][rows].T
        corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
        boxes = (corners.clip(0, 1) * [width, height, width, height]).astype(np.float32)
        return Detections(out["features"][rows], boxes, width, height, classes[rows], confidence[rows], probs[rows])


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True), dtype=np.float32)


def add_regions(
    shards: Shards, folder: Path, detector: Detector, choice: Choice, batch: int = 8, dtype: str = "float16"
) -> Written:
    """Copies of `shards` in `folder`, under their names, whose samples have regions and the tags of these.

    Samples whose picture is missing or broken are left out, counted and named. ConfigError if `folder` holds one of
    the shards already, DataError if no sample could be written.
    """
    if batch < 1:
        raise ConfigError(f"--batch is {batch}; write 1 or more")
    require_dtype(dtype)

    def change(numbers: range) -> Iterator[Member]:
        for start in range(numbers.start, numbers.stop, batch):
            chunk = range(start, min(start + batch, numbers.stop))
            yield from _with_regions(shards, chunk, lambda pictures: detector(pictures, choice), detector.names, dtype)

    return rewrite(shards, folder, change)


def _with_regions(
    shards: Shards,
    numbers: range,
    detect: Callable[[list[Pixels]], list[Detections]],
    names: Sequence[str],
    dtype: str,
) -> Iterator[Member]:
    raw: dict[int, dict[str, bytes]] = {}
    pictures: dict[int, Pixels] = {}
    reasons: dict[int, str] = {}
    for i in numbers:
        raw[i] = shards.read(i)
        try:
            pictures[i] = _picture(raw[i])
        except ValueError as error:
            reasons[i] = str(error)
    found = dict(zip(pictures, detect(list(pictures.values())), strict=True)) if pictures else {}
    for i in numbers:
        fields: dict[str, bytes] = {}
        if i in found:
            try:
                fields = _joined(raw[i], found[i], names, dtype)
            except ValueError as error:
                reasons[i] = str(error)
        yield Member(shards.key(i), fields, reasons.get(i, ""))


def _picture(raw: dict[str, bytes]) -> Pixels:
    field = picture_field(tuple(raw))
    if field is None:
        raise ValueError(f"it has no picture (jpg, png or webp) but {', '.join(raw)}")
    return decode(raw[field])


def _joined(raw: dict[str, bytes], regions: Detections, names: Sequence[str], dtype: str) -> dict[str, bytes]:
    """The members with `regions.npz`, and with `tags` in the json."""
    record: Any = json.loads(raw.get("json", b"{}"))
    if not isinstance(record, dict):
        raise ValueError(f"its json holds a {type(record).__name__}; it should be an object")
    assert regions.classes is not None
    tags = [names[number] for number in regions.classes.tolist()]
    record = {"width": regions.width, "height": regions.height, **record, "tags": tags}
    kept = {field: data for field, data in raw.items() if field not in (REGION_FIELD, "json")}
    return {
        **kept,
        REGION_FIELD: write_regions(regions, dtype),
        "json": json.dumps(record, ensure_ascii=False).encode(),
    }
