"""Clips (mp4, webm, gif) to frames: the ones shown at given times, uint8 RGB; ValueError for what cannot be used.

PyAV (FFmpeg) decodes, on one thread: cores belong to the loader's workers. Decoding begins at the key frame before
the first time that is wanted, and frames between wanted ones become no pixels. Nothing but the bytes given is opened:
the container is told by its first bytes, so a playlist, which names other files, never is one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import av
import numpy as np
from av.codec import CodecContext
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vlscale.data.decode import Crop, Pixels, on_white, part

MAX_CLIP_PIXELS = 1 << 25  # of a frame: 8k; a decoder holds up to 17 of them
MAX_SECONDS = 6 * 3600.0  # of a clip
MAX_DECODED = 1 << 36  # pixels on the way to the frames of one call: minutes of work
SAME = 1e-3  # seconds: webm's clock ticks so
AHEAD = 5.0  # seconds from which on a jump may pay where key frames are not known
REORDERED = 0.25  # seconds: a key frame's number in an mp4's index is when it is decoded, somewhat before it is shown
LONE = 1 / 25  # seconds that a single frame without a duration lasts
MAX_BOXES = 1_000_000  # of an mp4
_ALPHA: Mapping[str, str] = {"vp9": "libvpx-vp9", "vp8": "libvpx"}  # FFmpeg's own decoders leave transparency out
_GIF, _MP4, _WEBM = "gif", "mov", "matroska"  # FFmpeg's names


class Clip:
    """The bytes of a clip whose length and size are known. Times are seconds from its beginning.

    `duration` is in seconds, above 0; `height` and `width` are of its frames as they are shown, turned as the camera
    noted. Its sound is not looked at.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_CLIP_PIXELS, max_seconds: float = MAX_SECONDS) -> None:
        """Decodes the first frame.

        ValueError with the reason if `data` is no mp4, webm or gif, is cut short or damaged, has no frames or no time
        stamps, or if its frames have more pixels or it is longer than allowed.
        """
        self._reader = _Reader(data, max_pixels)
        with _damage():
            self.duration = self._reader.duration() or LONE
            first = self._reader.next()
            if first is None:
                raise ValueError("it holds no frame that can be decoded")
            self._shown = first
            self._next: VideoFrame | None = None
            self._first = self._time(first)
            self._jumps = self._reader.can_seek
            sides = first.height, first.width
            self.height, self.width = sides[::-1] if _turns(first) % 2 else sides
        if not 0 < self.duration <= max_seconds:
            raise ValueError(f"it lasts {self.duration:.6g} seconds; up to {max_seconds:.6g} are read")

    def frames(self, times: Sequence[float], crop: Crop, into: Pixels | None = None) -> Pixels:
        """uint8 RGB [T, *crop.size, 3]: `crop` of the frame that is shown at each time.

        That is the last one whose time stamp is not later; before the first one it is the first, after the end the
        last. Times may come in any order and more than once. Transparent parts show white. Written `into` an array
        [T, *crop.size, 3] where there is one.

        ValueError with the reason if a frame on the way is damaged.
        """
        pixels = np.empty((len(times), *crop.size, 3), np.uint8) if into is None else into
        self._reader.decoded = 0
        last: tuple[VideoFrame, int] | None = None
        with _damage():
            for i in sorted(range(len(times)), key=times.__getitem__):
                shown = self._at(times[i])
                if last is not None and shown is last[0]:
                    pixels[i] = pixels[last[1]]
                else:
                    part(self._pixels(shown), crop, 1, pixels[i])
                last = shown, i
        return pixels

    def close(self) -> None:
        """Give back what the decoder holds; that happens too when nobody refers to the clip any more."""
        self._reader.container.close()

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _at(self, time: float) -> VideoFrame:
        """The frame that is shown then."""
        time = max(time + SAME, self._first)
        if time < self._time(self._shown):
            self._seek(time)
        elif self._jumps and self._reader.jump_pays(self._time(self._shown), time):
            before = self._time(self._shown)
            self._seek(time)
            self._jumps = self._time(self._shown) >= before
        while self._step() and self._next is not None and self._time(self._next) <= time:
            self._shown, self._next = self._next, None
        return self._shown

    def _step(self) -> bool:
        """Whether there is a frame after the one that is shown, which is then `_next`."""
        if self._next is None:
            self._next = self._reader.next()
        return self._next is not None

    def _seek(self, time: float) -> None:
        """Show a frame of at most `time`, near it."""
        back = 0.0
        while True:
            begin = time - back <= self._first
            self._reader.seek(None if begin else time - back)
            found = self._reader.next()
            if found is not None and (begin or self._time(found) <= time):
                self._shown, self._next = found, None
                return
            if begin:
                raise ValueError("its frames cannot be decoded a second time")
            back = 4 * back or 1.0

    def _time(self, frame: VideoFrame) -> float:
        if frame.time is None:
            raise ValueError("its frames have no time stamps")
        return frame.time - self._reader.start

    def _pixels(self, frame: VideoFrame) -> Pixels:
        """RGB [H, W, 3], the right way up."""
        turns = _turns(frame)
        height, width = (self.width, self.height) if turns % 2 else (self.height, self.width)
        clear = any(component.is_alpha for component in frame.format.components)
        array = frame.to_ndarray(format="rgba" if clear else "rgb24", width=width, height=height)
        pixels = on_white(np.asarray(array, np.uint8)) if clear else np.asarray(array, np.uint8)
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _turns(frame: VideoFrame) -> int:
    """Quarters of a circle that it is shown turned by, counter-clockwise; the nearest of 0 to 3."""
    return round(frame.rotation / 90) % 4


class _Reader:
    """The frames of a clip one after another, from the beginning or from a key frame on."""

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self._data, self._max_pixels = data, max_pixels
        self._kind = _kind(data)
        _check_whole(data, self._kind)
        self.can_seek = self._kind != _GIF  # whose frames build on all before them
        self.decoded = 0  # pixels
        with _damage():
            self._open()
            start = self.container.start_time
        self.start = 0.0 if start is None else start / 1e6  # seconds on its own clock

    def _open(self) -> None:
        self.container: InputContainer = av.open(
            io.BytesIO(self._data),
            "r",
            format=self._kind,
            options={"protocol_whitelist": ""},
            metadata_errors="replace",
        )
        if not self.container.streams.video:
            raise ValueError("it has no video stream")
        best = self.container.streams.best("video")
        self._stream = best if isinstance(best, VideoStream) else self.container.streams.video[0]
        codec: VideoCodecContext | None = self._stream.codec_context
        if codec is None:
            raise ValueError("FFmpeg has no decoder for its video")
        if codec.width * codec.height > self._max_pixels:
            raise ValueError(f"it has {codec.width} x {codec.height} pixels; at most {self._max_pixels} are decoded")
        if self._stream.metadata.get("alpha_mode") == "1" and codec.name in _ALPHA:
            transparent = CodecContext.create(_ALPHA[codec.name], "r")
            codec = transparent if isinstance(transparent, VideoCodecContext) else codec
        codec.thread_count = 1
        codec.options = {"max_pixels": str(self._max_pixels)}
        self._codec = codec
        self._frames = _decoded(self.container, self._stream, codec)

    def duration(self) -> float:
        """Seconds from the beginning to the end, as the header tells or else the packets; 0 where neither does."""
        stream = self._stream
        end = (self.container.duration or 0) / 1e6  # a webm's is when it ends on its clock
        if self._kind != _WEBM:
            end += self.start
        if stream.time_base:
            if stream.duration:
                end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
            entries = stream.index_entries
            if end > 0 and self._kind == _MP4 and len(entries):
                end = max(end, float(entries[len(entries) - 1].timestamp * stream.time_base))
        return max(0.0, end - self.start) or self._packets_end()

    def _packets_end(self) -> float:
        """The end of what is shown last, by reading all and decoding nothing; then it is at the beginning again."""
        base = float(self._stream.time_base or 0)
        ends = [
            packet.pts + (packet.duration or 0)
            for packet in self.container.demux(self._stream)
            if packet.pts is not None
        ]
        self.seek(None)
        return max(ends, default=0) * base - self.start

    def next(self) -> VideoFrame | None:
        """The next frame in the order that they are shown in; None after the last."""
        frame = next(self._frames, None)
        if frame is not None:
            if frame.is_corrupt:
                raise ValueError(f"the frame at {frame.time or 0:.6g} seconds of its clock is damaged")
            self.decoded += frame.width * frame.height
            if self.decoded > MAX_DECODED:
                reason = "write it anew with a key frame every few seconds"
                raise ValueError(f"{self.decoded} pixels had to be decoded to get at a few frames; {reason}")
        return frame

    def seek(self, time: float | None) -> None:
        """Go on from the key frame that is shown at `time` or before it; from the first frame if None."""
        if time is not None and self.can_seek and self._stream.time_base:
            try:
                self.container.seek(round((time + self.start) / self._stream.time_base), stream=self._stream)
            except (av.FFmpegError, OverflowError):
                self.can_seek = False
            else:
                self._codec.flush_buffers()
                self._frames = _decoded(self.container, self._stream, self._codec)
                return
        self.container.close()
        self._open()

    def jump_pays(self, now: float, time: float) -> bool:
        """Whether a key frame lies between the frame that is shown `now` and `time`, as far as one knows."""
        entries, base = self._stream.index_entries, self._stream.time_base
        if len(entries) < 2 or not base:
            return time - now > AHEAD
        found = entries.search_timestamp(int((time + self.start - REORDERED) / base))
        return found >= 0 and float(entries[found].timestamp * base) - self.start > now + SAME


def _decoded(container: InputContainer, stream: VideoStream, codec: VideoCodecContext) -> Iterator[VideoFrame]:
    for packet in container.demux(stream):
        yield from codec.decode(packet)


@contextmanager
def _damage() -> Iterator[None]:
    """What FFmpeg complains of as a ValueError."""
    try:
        yield
    except av.FFmpegError as error:
        raise ValueError(f"it is damaged or cut short ({error.strerror})") from error


def _kind(data: bytes) -> str:
    """Of container. ValueError if it is none of those that are read."""
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _GIF
    if data[:4] == b"\x1aE\xdf\xa3":
        return _WEBM
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return _MP4
    raise ValueError("it is not an mp4, webm or gif clip" if data else "it is empty")


def _check_whole(data: bytes, kind: str) -> None:
    """ValueError if the container says that it is longer."""
    told = len(data)
    if kind == _MP4:
        told = _boxes_end(data)
    elif kind == _WEBM:
        told = _segment_end(data)
    elif not data[-64:].rstrip(b"\0").endswith(b";"):
        raise ValueError("it is cut short: no end of the gif follows its last frame")
    if told > len(data):
        raise ValueError(f"it is cut short: {len(data)} of {told} bytes")


def _boxes_end(data: bytes) -> int:
    """Where the last of an mp4's boxes with pictures ends."""
    place = end = 0
    for _ in range(MAX_BOXES):
        if place + 8 > len(data):
            return end
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if size == 1:  # it is in the next eight bytes
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:  # 0: up to the end
            return end
        place += size
        if name in (b"moov", b"mdat", b"moof"):
            end = place
    raise ValueError(f"it has more than {MAX_BOXES} boxes")


def _segment_end(data: bytes) -> int:
    """Where a webm's only segment ends; 0 where it does not tell."""
    place = 4
    for name in (b"", b"\x18S\x80g"):
        if data[place : place + len(name)] != name:
            return 0
        place += len(name)
        length = 9 - (data[place] if place < len(data) else 0).bit_length()  # of the number that follows, in bytes
        value = int.from_bytes(data[place : place + length], "big") & ((1 << 7 * length) - 1)
        if value == (1 << 7 * length) - 1:
            return 0
        place += length + value
    return place
