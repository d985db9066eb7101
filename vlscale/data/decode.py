"""Picture bytes to uint8 RGB arrays [H, W, 3], and resizing; ValueError for a picture that cannot be used.

simplejpeg decodes JPEG, OpenCV the rest and the odd JPEG. The turn that a camera notes in EXIF is not
applied, as in the published pipelines, which decode with Pillow.
"""

from __future__ import annotations

import struct

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB

MAX_PIXELS = 178_956_970  # Pillow's limit for what it calls a decompression bomb


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header of a JPEG, PNG or WebP. ValueError if it is none of these."""
    if data[:2] == b"\xff\xd8":
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


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def decode(data: bytes) -> Pixels:
    """uint8 RGB [H, W, 3]. Transparent parts show white; grey and palette pictures become RGB.

    ValueError with the reason if the picture is broken, cut short, or larger than `MAX_PIXELS`.
    """
    width, height = picture_size(data)
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels; at most {MAX_PIXELS} are decoded")
    return _decode_jpeg(data) if data[:2] == b"\xff\xd8" else _decode_other(data)


def _decode_jpeg(data: bytes) -> Pixels:
    if _jpeg_header(data)[2] in ("CMYK", "YCCK"):
        return _decode_other(data)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data)
    except ValueError as error:
        if "remature end" in str(error) or "Huffman" in str(error):
            raise
        pixels = simplejpeg.decode_jpeg(data, strict=False)  # harmless, such as bytes between two segments
    return pixels


def _decode_other(data: bytes) -> Pixels:
    jpeg = data[:2] == b"\xff\xd8"
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION if jpeg else cv2.IMREAD_UNCHANGED
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise ValueError("it is damaged or cut short")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return _on_white(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))
    colours: Pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)
    return colours


def _on_white(pixels: NDArray[np.uint8]) -> Pixels:
    """RGBA [H, W, 4] composited on white."""
    alpha = pixels[..., 3:].astype(np.uint16)
    shown = pixels[..., :3] * alpha + 255 * (255 - alpha)
    return ((shown + 127) // 255).astype(np.uint8)


def resize(pixels: Pixels, width: int, height: int) -> Pixels:
    """uint8 [height, width, 3]: area averages when either side shrinks to half or less, else bicubic."""
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] >= 2 * height or pixels.shape[1] >= 2 * width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    resized: Pixels = cv2.resize(pixels, (width, height), interpolation=method)
    return resized
