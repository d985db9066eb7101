"""Clips for tests, encoded in memory by PyAV: mp4, webm and gif of given pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
KINDS: Mapping[str, tuple[str, str, str]] = {  # FFmpeg's container, codec and pixels
    "mp4": ("mp4", "libx264", "yuv420p"),
    "mpeg4": ("mp4", "mpeg4", "yuv420p"),
    "webm": ("webm", "libvpx-vp9", "yuv420p"),
    "alpha": ("webm", "libvpx-vp9", "yuva420p"),
    "gif": ("gif", "gif", "rgb8"),
}


def clip(
    pictures: Sequence[Pixels],
    kind: str = "mp4",
    rate: int = 10,
    times: Sequence[float] | None = None,
    turned: int = 0,
    audio: float = 0.0,
    keys: int = 12,
    options: Mapping[str, str] | None = None,
) -> bytes:
    """Pictures uint8 [h, w, 3 or 4], h and w even, as a clip of `rate` frames a second or with these time stamps.

    `turned` degrees counter-clockwise is what a player is told to do; `audio` seconds of silence go with it; every
    `keys`-th frame is a key frame.
    """
    container, codec, layout = KINDS[kind]
    made = io.BytesIO()
    with av.open(made, "w", format=container, options=dict(options or {})) as out:
        settings = {} if kind == "gif" else {"g": str(keys), "threads": "1"}
        stream = out.add_stream(codec, rate=rate, options=settings)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = layout
        stream.codec_context.time_base = Fraction(1, 1000 if times else rate)
        if turned:
            stream.set_display_rotation(turned)
        sound = out.add_stream("aac", rate=8000) if audio else None
        for i, pixels in enumerate(pictures):
            frame = VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = (round(times[i] * 1000) if times else i), stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            for start in range(0, int(8000 * audio), 1024):
                silent = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                silent.sample_rate, silent.pts = 8000, start
                out.mux(sound.encode(silent))
            out.mux(sound.encode(None))
    return made.getvalue()


def counting(count: int, height: int = 32, width: int = 48) -> list[Pixels]:
    """Pictures that differ in brightness by so much that no codec hides which is which: at most 25."""
    return [np.full((height, width, 3), 5 + 10 * i, np.uint8) for i in range(count)]


def number(pixels: Pixels) -> int:
    """Which picture of `counting` it is."""
    return round((float(pixels.mean()) - 5) / 10)
