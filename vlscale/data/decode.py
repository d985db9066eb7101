"""Picture bytes to uint8 RGB arrays [H, W, 3], and resizing; ValueError for a picture that cannot be used.

simplejpeg decodes JPEG, OpenCV the rest and the odd JPEG. The turn that a camera notes in EXIF is not
applied, as in the published pipelines, which decode with Pillow.

Most of a JPEG's cost is its entropy coding, which no crop avoids but by stopping below its last row; then comes the
resize. Decoding at 1/2 is cheaper than whole, at 3/4 dearer; `resize` says what its filters cost (docs/benchmarks.md).
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB

MAX_PIXELS = 178_956_970  # Pillow's limit for what it calls a decompression bomb
MARGIN = 4  # rows of a JPEG decoded below the last one wanted: its chroma blends into the next one's
ALIAS = 1.5  # a side that shrinks more is filtered first
COARSE = 2.25  # and one that shrinks more than this by more than its nearest neighbours
SHARP = 1.15  # up to here cubic interpolation is nearer to Pillow's, from here on linear
SCRATCH = 1 << 25  # bytes that a thread keeps to decode into: pictures of 11 million pixels
_JPEG = b"\xff\xd8"  # how one starts


class Crop(NamedTuple):
    """A part of a picture, in the picture's own pixels, and the size that it is to have."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]  # (height, width)
    bilinear: bool = False  # where it is enlarged too

    @classmethod
    def middle(cls, height: int, width: int, size: int) -> Crop:
        """The middle square of a picture of these sides, [size, size]."""
        side = min(height, width)
        return cls((height - side) // 2, (width - side) // 2, side, side, (size, size))


class _Scratch(threading.local):
    """Memory of one thread that picture after picture is worked on in.

    It is a single large piece, for which numpy asks the system for huge pages; of it only what is used is there.
    """

    def __init__(self) -> None:
        self._held = np.empty(SCRATCH, dtype=np.uint8)

    def __call__(self, height: int, width: int) -> Pixels:
        """[height, width, 3], until the next call; larger ones are of their own."""
        size = 3 * height * width
        room = self._held[:size] if size <= SCRATCH else np.empty(size, dtype=np.uint8)
        return room.reshape(height, width, 3)


_decoded_into, _smoothed_into = _Scratch(), _Scratch()


class Encoded:
    """The bytes of a picture whose size is known, decoded no finer and no further down than it is needed."""

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
        """ValueError if `data` is no JPEG, PNG or WebP, or if it would become more than `max_pixels`."""
        self._is_jpeg = data[:2] == _JPEG
        if self._is_jpeg:
            self.width, self.height, colours = _jpeg_header(data)
            self._is_jpeg = colours not in ("CMYK", "YCCK")  # which OpenCV knows to turn into RGB
        else:
            self.width, self.height = picture_size(data)
        if self.width < 1 or self.height < 1 or self.width * self.height > max_pixels:
            raise ValueError(f"it has {self.width} x {self.height} pixels; at most {max_pixels} are decoded")
        self._data = data

    def whole(self) -> Pixels:
        """uint8 RGB [H, W, 3]. Transparent parts show white; grey and palette pictures become RGB.

        ValueError with the reason if the picture is broken or cut short.
        """
        if self._is_jpeg:
            return self._jpeg(self._data, 1, np.empty((self.height, self.width, 3), dtype=np.uint8))
        pixels = _decode_other(self._data)
        if pixels.shape[:2] != (self.height, self.width):
            raise ValueError(
                f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels, its header {self.width} x {self.height}"
            )
        return pixels

    def crops(self, wanted: Sequence[Crop], into: Sequence[Pixels | None] = ()) -> list[Pixels]:
        """uint8 RGB [*size, 3] of every crop, by one decoding that is fine enough for all of them.

        They are written `into` these arrays, one of each crop's size or None for each; without them to memory of
        their own.

        A JPEG that is at least twice as fine is decoded at 1/2, 1/4 or 1/8 by its own transform. The edges of a crop
        then lie between such pixels: each is at most half a pixel of the result from where it should be.
        Damage below the last row that is wanted is not noticed; a file that is cut short always is (ValueError).
        """
        factor, pixels = self._decoded(wanted)
        rooms = into or [None] * len(wanted)
        return [part(pixels, crop, factor, room) for crop, room in zip(wanted, rooms, strict=True)]

    def _decoded(self, wanted: Sequence[Crop]) -> tuple[int, Pixels]:
        if not self._is_jpeg:
            return 1, self.whole()
        shrinks = min(min(crop.height / crop.size[0], crop.width / crop.size[1]) for crop in wanted)
        factor = 8 if shrinks >= 8 else 4 if shrinks >= 4 else 2 if shrinks >= 2 else 1
        rows = max(crop.top + crop.height for crop in wanted) + MARGIN
        upper = _upper_part(self._data, rows) if rows < self.height else None
        data, rows = (self._data, self.height) if upper is None else (upper, rows)
        room = _decoded_into(-(-rows // factor), -(-self.width // factor))
        return factor, self._jpeg(data, factor, room, smooth=shrinks > ALIAS)

    def _jpeg(self, data: bytes | bytearray, factor: int, pixels: Pixels, smooth: bool = False) -> Pixels:
        """All of it at 1 / `factor`, in the memory of `pixels`: [ceil(H / factor), ceil(W / factor), 3].

        Where the result is to be made `smooth`, colours that the file has at half the size are doubled, not
        interpolated: after that they differ by 0.05 of 255.
        """
        height, width, _ = pixels.shape
        least = {"min_height": height, "min_width": width, "min_factor": factor, "fastupsample": smooth}
        try:
            simplejpeg.decode_jpeg(data, buffer=pixels, **least)
        except ValueError as error:
            first = str(error)  # simplejpeg tells the first complaint, once it has filled the buffer
            if "remature end" in first or "Huffman" in first:
                raise
            if "extraneous bytes" not in first:  # such as those that an upper part leaves behind its rows
                simplejpeg.decode_jpeg(data, buffer=pixels, strict=False, **least)
        return pixels


def decode(data: bytes) -> Pixels:
    """uint8 RGB [H, W, 3] of a whole picture; ValueError as of `Encoded`."""
    return Encoded(data).whole()


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header of a JPEG, PNG or WebP. ValueError if it is none of these."""
    if data[:2] == _JPEG:
        return _jpeg_header(data)[:2]
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data)
    raise ValueError("it is not a JPEG, PNG or WebP picture" if data else "it is empty")


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    """(width, height, colours)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError as error:  # simplejpeg's answer to a header that ends before its sizes
        raise ValueError("its header is damaged or cut short") from error
    return width, height, colours


def _upper_part(data: bytes, rows: int) -> bytearray | None:
    """A JPEG whose header tells `rows` rows, so that decoders stop there.

    None of a progressive one, whose passes go over all rows, and of one without its end, which is for the decoder to
    complain of.
    """
    if not data.endswith(b"\xff\xd9"):
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xC0, 0xC1):  # a sequential frame: length (2 bytes), precision (1), height (2)
            upper = bytearray(data)
            struct.pack_into(">H", upper, place + 5, rows)
            return upper
        if marker == 0xDA:  # a scan already, so the frame is of another kind
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _decode_other(data: bytes) -> Pixels:
    jpeg = data[:2] == _JPEG
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION if jpeg else cv2.IMREAD_UNCHANGED
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ValueError(f"it is damaged: {error.err}") from error
    if pixels is None:
        raise ValueError("it is damaged or cut short")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return on_white(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))
    colours: Pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)
    return colours


def on_white(pixels: NDArray[np.uint8]) -> Pixels:
    """RGBA uint8 [H, W, 4] composited on white: RGB [H, W, 3]."""
    alpha = pixels[..., 3:].astype(np.uint16)
    shown = pixels[..., :3] * alpha + 255 * (255 - alpha)
    return ((shown + 127) // 255).astype(np.uint8)


def part(pixels: Pixels, crop: Crop, factor: int, into: Pixels | None) -> Pixels:
    """`crop` of a picture that was decoded at 1 / `factor`: uint8 [*size, 3] in memory of its own or `into` some."""
    top, left = round(crop.top / factor), round(crop.left / factor)
    bottom, right = round((crop.top + crop.height) / factor), round((crop.left + crop.width) / factor)
    cut = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
    height, width = crop.size
    resized = resize(cut, width, height, crop.bilinear, into)
    if into is not None and resized is not into:
        np.copyto(into, resized)
        return into
    return cut.copy() if resized is cut else resized


def resize(pixels: Pixels, width: int, height: int, bilinear: bool = False, into: Pixels | None = None) -> Pixels:
    """uint8 [height, width, 3], anti-aliased along each side that shrinks by more than 1.5.

    A picture that shrinks by more than 2.25 becomes what Pillow's bicubic filter makes of it; one that does by more
    than 1.5 is smoothed along that side first, in half the time. The others are interpolated, in a quarter of the
    time: cubically unless they shrink by more than 1.15, or `bilinear`. The result may be written `into` an array.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    more = max(down, across)
    if more > COARSE:
        return _as_pillow(pixels, height, width, into)
    if more > ALIAS:
        pixels = _smoothed(pixels, down, across)
    linear = bilinear or SHARP < more <= ALIAS
    method = cv2.INTER_LINEAR if linear else cv2.INTER_CUBIC
    resized: Pixels = cv2.resize(pixels, (width, height), dst=into, interpolation=method)
    return resized


def _smoothed(pixels: Pixels, down: float, across: float) -> Pixels:
    """Filtered along the sides that shrink by s > 1.5 with the weights (s, 8 - 2 s, s) / 8, s at most 2.

    At s = 2 nothing is left of what is as fine as two pixels. Below that a sharper filter is nearer to Pillow's:
    photographs differ by 1.7 of 255 at s = 1.5, with the filter of s = 2 by 2.8.
    """
    size = tuple(3 if shrinks > ALIAS else 1 for shrinks in (across, down))
    width, height = ((2 * math.log(8 / min(shrinks, 2) - 2)) ** -0.5 for shrinks in (across, down))
    room = _smoothed_into(*pixels.shape[:2])
    smooth: Pixels = cv2.GaussianBlur(pixels, size, dst=room, sigmaX=width, sigmaY=height)
    return smooth


def _as_pillow(pixels: Pixels, height: int, width: int, into: Pixels | None) -> Pixels:
    """Pillow's bicubic filter as torch computes it, three times as fast and equal to within rounding."""
    import torch  # here: whoever only looks into shards needs no torch

    whole = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    planes = torch.nn.functional.interpolate(whole, (height, width), mode="bicubic", antialias=True)[0].numpy()
    resized: Pixels = cv2.merge(list(planes), dst=into)
    return resized
