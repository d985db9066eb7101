"""What a sample shows over time: its clip, the features of its frames, or their visual words. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.arrays import read_arrays
from vlscale.data.clip_windows import Clips, Window, duration, within
from vlscale.data.clips import MAX_CLIP_PIXELS, Clip
from vlscale.data.decode import Crop
from vlscale.data.frames import Frames
from vlscale.data.samples import (
    CLIP_FIELDS,
    FRAME_FIELD,
    MAX_MEMBER_BYTES,
    WORD_FIELD,
    BrokenSampleError,
    read_members,
    timed_sentences,
)
from vlscale.data.shards import Shards
from vlscale.types import Inputs

Floats = NDArray[np.floating[Any]]
MAX_FRAMES = 1_000_000  # of one sample: a week of one a second


class Track(NamedTuple):
    """A row per moment; frame t lasts from `times[t]` to the next one."""

    rows: NDArray[Any]  # features [T, F], or visual words int64 [T]
    times: Floats  # [T] seconds, rising


def frame_fields(inputs: Inputs) -> tuple[str, ...]:
    """The fields of which a family that reads clips needs one."""
    if inputs.image_size:
        return CLIP_FIELDS
    return (WORD_FIELD,) if inputs.codes else (FRAME_FIELD,)


def clip_field(fields: Sequence[str]) -> str | None:
    """The field that holds the clip, or None."""
    return next((name for name in CLIP_FIELDS if name in fields), None)


def read_tracks(data: bytes, name: str = "features") -> list[Track]:
    """The tracks of a `frames.npz` (`features` [T, F] and `times` [T]; further ones of other rates are `features_X` and
    `times_X`, in the order of their names) or of a `visual_words.npz` (`codes`).

    ValueError with the reason if it is damaged, lacks something or holds what cannot be.
    """
    arrays = read_arrays(data)
    names = sorted(each for each in arrays if each == name or each.startswith(f"{name}_"))
    if name not in names:
        raise ValueError(f"it lacks '{name}'")
    return [_track(arrays, each, each.replace(name, "times", 1)) for each in names]


def _track(arrays: Mapping[str, NDArray[Any]], name: str, clock: str) -> Track:
    rows, times = arrays[name], arrays.get(clock)
    if times is None:
        raise ValueError(f"it lacks '{clock}', the seconds at which each row of '{name}' begins")
    numbers, kinds = ("visual words", "iu") if name.startswith("codes") else ("features", "f")
    if rows.dtype.kind not in kinds or rows.ndim != (1 if kinds == "iu" else 2):
        raise ValueError(f"'{name}' is {rows.dtype} of the shape {list(rows.shape)}; write {numbers}, a row per frame")
    if times.shape != (len(rows),) or times.dtype.kind not in "fiu":
        raise ValueError(
            f"'{clock}' is {times.dtype} of the shape {list(times.shape)}, but '{name}' has {len(rows)} rows"
        )
    if not 0 < len(rows) <= MAX_FRAMES:
        raise ValueError(f"'{name}' has {len(rows)} rows; from 1 to {MAX_FRAMES} are read")
    seconds = times.astype(np.float64)
    if not np.isfinite(seconds).all() or seconds[0] < 0 or (np.diff(seconds) <= 0).any():
        raise ValueError(f"'{clock}' should rise from 0 or later")
    return Track(rows, seconds)


class Footage:
    """What one sample shows, read once however many clips are cut from it. BrokenSampleError if it cannot be used."""

    def __init__(self, shards: Shards, i: int, inputs: Inputs, max_pixels: int = MAX_CLIP_PIXELS) -> None:
        self._at = shards.shard(i), shards.key(i)
        self._inputs = inputs
        self._clip: Clip | None = None
        self._decoded: dict[tuple[tuple[float, ...], Crop], Frames] = {}
        self._tracks: list[Track] = []
        fields = shards.fields(i)
        field = next((name for name in frame_fields(inputs) if name in fields), None)
        if field is None:
            wanted = " or ".join(frame_fields(inputs))
            raise self._broken(f"has no {wanted} but {', '.join(fields)}")
        self._field = field
        try:
            data = read_members(shards, i, (field,), MAX_MEMBER_BYTES)[field]
            if inputs.image_size:
                self._clip = Clip(data, min(max_pixels, MAX_CLIP_PIXELS))
                self.duration = self._clip.duration
            else:
                self._tracks = read_tracks(data, "codes" if inputs.codes else "features")
                self._check()
                self.duration = max(duration(track.times) for track in self._tracks)
        except ValueError as error:
            raise self._broken(f"its '{field}': {error}") from error

    def _broken(self, reason: str) -> BrokenSampleError:
        return BrokenSampleError(*self._at, reason)

    def _check(self) -> None:
        if self._inputs.codes:
            words = self._tracks[0].rows
            if not 0 <= words.min() <= words.max() < self._inputs.codes:
                found = f"it has visual words from {words.min()} to {words.max()}"
                raise ValueError(f"{found}, but family.codes={self._inputs.codes}")
        else:
            width = sum(track.rows.shape[1] for track in self._tracks)
            if width != self._inputs.feats:
                raise ValueError(f"it has features of {width} numbers, not family.feats={self._inputs.feats}")

    def stretch(self, window: Window, options: Clips, rng: Generator) -> Window:
        """The window within the footage; of one that has more pixels' frames than are read, the run that is taken."""
        if window.start >= self.duration:
            raise self._broken(
                f"a sentence is said from {window.start:g} s to {window.end:g} s, but its '{self._field}' ends at "
                f"{self.duration:g} s"
            )
        end = min(window.end, self.duration)
        if self._clip is None or options.start == "first":
            return window._replace(end=end)
        spare = max(0.0, end - window.start - self._inputs.frames / options.fps)
        return window._replace(start=window.start + spare * float(rng.random()), end=end)

    def times(self, window: Window, options: Clips, most: int) -> list[float]:
        """Seconds of the frames of pixels: `fps` a second from the window's start on, up to its end and `most`."""
        count = int(np.ceil((window.end - window.start) * options.fps - 1e-6))
        return [window.start + k / options.fps for k in range(min(most, max(1, count)))]

    def pixels(self, times: Sequence[float], wanted: Crop) -> Frames:
        """The part `wanted` of the frames shown at these times; decoded once for all views that show the same."""
        assert self._clip is not None, "pixels are of clips"
        what = (tuple(times), wanted)
        if what not in self._decoded:
            try:
                self._decoded[what] = Frames(self._clip.frames(times, wanted), window=self._inputs.window)
            except ValueError as error:
                raise self._broken(f"its '{self._field}': {error}") from error
        return self._decoded[what]

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of its pixels."""
        assert self._clip is not None, "pixels are of clips"
        return self._clip.height, self._clip.width

    def rows(self, window: Window, options: Clips, most: int, rng: Generator) -> tuple[Frames, Floats]:
        """(features or visual words of the window's frames, at most `most` of them; the times [T] at which they begin).

        Tracks of fewer rows are stretched to the longest: each of their rows is there, in order. One without a row in
        the window is zeros there.
        """
        spans = [within(track.times, window.start, window.end) for track in self._tracks]
        counts = [
            max(0, min(span.stop, len(track.rows)) - span.start)
            for span, track in zip(spans, self._tracks, strict=True)
        ]
        longest = int(np.argmax(counts))
        count = counts[longest]
        places = np.arange(count)
        if count > most:
            first = int(rng.integers(count - most + 1)) if options.start == "random" else 0
            places = places[first : first + most]
        times = self._tracks[longest].times[spans[longest].start + places]
        if self._inputs.codes:
            words = self._tracks[0].rows[spans[0].start + places].astype(np.int64)
            empty = np.zeros((len(words), 0), np.float32)
            return Frames(empty, codes=words, vocabulary=self._inputs.codes), times
        parts = []
        for track, span, number in zip(self._tracks, spans, counts, strict=True):
            rows = span.start + places * number // max(count, 1)
            found = track.rows[rows] if number else np.zeros((len(places), track.rows.shape[1]))
            parts.append(found.astype(np.float32))
        feats = np.concatenate(parts, axis=1)
        if not np.isfinite(feats).all():
            raise self._broken(f"its '{self._field}': features that are no finite numbers")
        return Frames(feats), times


def check_footage(shards: Shards, i: int, inputs: Inputs) -> None:
    """BrokenSampleError if what sample `i` shows cannot be read, or is over before its first sentence begins."""
    footage = Footage(shards, i, inputs)
    first = timed_sentences(shards, i, needed=False)[0]
    footage.stretch(Window(first.start, first.end, ()), Clips(), np.random.default_rng(0))
