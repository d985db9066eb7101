"""Pictures made smaller on their way into shards, with the boxes of their json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg

from vlscale.data.decode import decode, picture_size, resize
from vlscale.errors import ConfigError

if TYPE_CHECKING:
    from vlscale.data.making.write import Sample

ENDS = ("jpg", "jpeg", "png", "webp")
BOXES = ("box", "bbox", "boxes", "bboxes")


@dataclass(frozen=True)
class Shrink:
    """Pictures whose short side is longer than `short` pixels become so large, as JPEG; the others stay as they are."""

    short: int
    quality: int = 95

    def __post_init__(self) -> None:
        """ConfigError for numbers that cannot be."""
        if self.short < 1:
            raise ConfigError(f"--resize is {self.short}; write the pixels of a picture's short side, 1 or more")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality is {self.quality}; write a number in 1 to 100")

    def __call__(self, sample: Sample) -> Sample:
        """The sample with smaller pictures. ValueError if one cannot be decoded.

        `width`, `height` and the boxes of the json follow the first picture where they are of its size. regions.npz
        says itself how large the picture is that its boxes lie in, and stays as it is.
        """
        record, picture = sample.record, sample.picture
        if picture:
            old = picture_size(picture[1])
            picture = self._member(*picture)
            new = picture_size(picture[1])
            told = record.get("width", old[0]), record.get("height", old[1])
            if new != old and told == old:
                record = {**scaled(record, new[0] / old[0], new[1] / old[1]), "width": new[0], "height": new[1]}
        return sample._replace(
            record=record, picture=picture, more=tuple(self._member(field, data) for field, data in sample.more)
        )

    def _member(self, field: str, data: bytes) -> tuple[str, bytes]:
        """A picture's field and bytes, smaller if it is large; any other member as it is."""
        stem, _, end = field.rpartition(".")
        if end not in ENDS:
            return field, data
        width, height = picture_size(data)
        if min(width, height) <= self.short:
            return field, data
        factor = self.short / min(width, height)
        smaller_width, smaller_height = (max(self.short, round(side * factor)) for side in (width, height))
        pixels = np.ascontiguousarray(resize(decode(data), smaller_width, smaller_height))
        smaller = simplejpeg.encode_jpeg(pixels, quality=self.quality, colorspace="RGB", colorsubsampling="420")
        return f"{stem}.jpg" if stem else "jpg", smaller


def scaled(value: Any, x: float, y: float) -> Any:
    """`value` of a json with each box in it, four numbers of pixels, scaled."""
    if isinstance(value, dict):
        return {name: _boxes(each, x, y) if name in BOXES else scaled(each, x, y) for name, each in value.items()}
    return [scaled(each, x, y) for each in value] if isinstance(value, list) else value


def _boxes(value: Any, x: float, y: float) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) == 4 and all(isinstance(number, int | float) for number in value):
        return [round(number * scale, 2) for number, scale in zip(value, (x, y, x, y), strict=True)]
    return [_boxes(each, x, y) for each in value]
