"""Clips: the frames shown at given times, cropped; containers of all kinds; damage is a ValueError."""

from __future__ import annotations

import io
import json
import math
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from tests.clip_files import KINDS, Pixels, clip, counting, number
from tests.runs import ROOT, environment
from vlscale.data import clips
from vlscale.data.clips import Clip
from vlscale.data.decode import Crop, resize


def whole(found: Clip) -> Crop:
    return Crop(0, 0, found.height, found.width, (found.height, found.width))


def numbers(data: bytes, times: list[float]) -> list[int]:
    """Which of the `counting` pictures are shown."""
    with Clip(data) as found:
        return [number(pixels) for pixels in found.frames(times, whole(found))]


def textured(count: int, height: int = 64, width: int = 96) -> list[Pixels]:
    """Windows on a picture, each a pixel further: every frame differs and none is easy."""
    rng = np.random.default_rng(0)
    wide = resize(rng.integers(0, 256, (height // 2, width + count, 3)).astype(np.uint8), 2 * width + count, height)
    return [np.ascontiguousarray(wide[:, i : i + width]) for i in range(count)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_frame_that_is_shown_at_a_time(kind: str) -> None:
    """The last one whose time stamp is not later; in any order; the first before the beginning, the last at the end."""
    times = [1.95, 0.0, 0.05, 0.1, 0.3, 0.39, 1.2, -1.0, 9.0, 0.1]
    data = clip(counting(20), kind)
    assert numbers(data, times) == [19, 0, 0, 1, 3, 3, 12, 0, 19, 1]
    with Clip(data) as found:
        assert (found.height, found.width) == (32, 48)
        assert found.duration == pytest.approx(2.0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_frames_do_not_depend_on_where_one_was_before(kind: str) -> None:
    """Jumps to key frames, forward and back, give what decoding from the beginning gives."""
    data = clip(textured(50), kind)
    with av.open(io.BytesIO(data)) as container:
        all_frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    rng = np.random.default_rng(1)
    with Clip(data) as found:
        for _ in range(12):
            picked = rng.integers(0, 50, rng.integers(1, 5)).tolist()
            for i, pixels in zip(picked, found.frames([i / 10 + 0.02 for i in picked], whole(found)), strict=True):
                assert np.array_equal(pixels, all_frames[i]) or kind == "alpha"


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_no_more_is_decoded_than_needed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the key frame before the first time on; a second request goes on where the first one ended."""
    height, width = 64, 96
    with Clip(clip(textured(100), kind, keys=20)) as found:
        found.frames([9.0], whole(found))  # by now a webm's key frames are known
        found.frames([4.5, 4.7], whole(found))
        assert found._reader.decoded <= 12 * height * width  # 40 .. 47, and those that lie between in the file
        found.frames([4.8, 4.9], whole(found))
        assert found._reader.decoded <= 3 * height * width
        monkeypatch.setattr(clips, "MAX_DECODED", 5 * height * width)
        with pytest.raises(ValueError, match=r"had to be decoded to get at a few frames; .* key frame"):
            found.frames([1.9], whole(found))


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_uneven_time_stamps_and_a_late_beginning(kind: str) -> None:
    uneven = clip(counting(6), kind, times=[0, 0.1, 0.5, 0.55, 2.0, 2.3])
    assert numbers(uneven, [0, 0.09, 0.1, 0.45, 0.5, 1.9, 2.0, 2.2, 2.3]) == [0, 0, 1, 1, 2, 3, 4, 4, 5]
    late = clip(counting(3), kind, times=[3, 3.1, 3.2])
    assert numbers(late, [0, 0.09, 0.1, 0.15, 0.25]) == [0, 0, 1, 1, 2]
    with Clip(late) as found:
        assert found.duration == pytest.approx(0.3)


def test_a_crop_is_resized_as_of_a_picture() -> None:
    data = clip(textured(5), "mp4")
    with Clip(data) as found:
        (plain,) = found.frames([0.2], whole(found))
        room = np.zeros((1, 24, 20, 3), np.uint8)
        crop = Crop(3, 7, 48, 40, (24, 20))
        shown = found.frames([0.2], crop, room)
        assert np.array_equal(shown[0], resize(plain[3:51, 7:47], 20, 24))
        assert shown is room


def test_what_the_camera_noted_is_obeyed_and_sound_is_not_looked_at() -> None:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24] = 255  # the upper left
    corners = {0: (0, 0), 90: (1, 0), 180: (1, 1), 270: (0, 1)}  # counter-clockwise
    for turned, (row, column) in corners.items():
        with Clip(clip([picture] * 3, turned=turned, audio=1.0)) as found:
            assert (found.height, found.width) == ((48, 32) if turned % 180 else (32, 48))
            (shown,) = found.frames([0.1], whole(found))
        means = shown.reshape(2, found.height // 2, 2, found.width // 2, 3).mean(axis=(1, 3, 4))
        assert (means[row, column], means.sum()) == (pytest.approx(255, abs=3), pytest.approx(255, abs=12))


def test_a_turn_that_is_no_quarter_of_a_circle_is_the_nearest() -> None:
    data = bytearray(clip([np.zeros((32, 48, 3), np.uint8)] * 3))
    place = data.index(b"tkhd") + 4 + 40  # its matrix, of 16.16 numbers
    for degrees, sides in ((10, (32, 48)), (100, (48, 32)), (135, (32, 48)), (350, (32, 48))):
        cos, sin = (round(65536 * part(math.radians(degrees))) for part in (math.cos, math.sin))
        struct.pack_into(">iiiii", data, place, cos, sin, 0, -sin, cos)
        with Clip(bytes(data)) as found:
            assert (found.height, found.width) == sides
            assert found.frames([0.1], whole(found)).shape == (1, *sides, 3)


@pytest.mark.parametrize("kind", ["alpha", "gif"])
def test_transparent_parts_show_white(kind: str) -> None:
    picture = np.zeros((32, 48, 4), np.uint8)
    picture[:, :24] = (200, 0, 0, 255)
    data = clip([picture] * 2, "alpha") if kind == "alpha" else see_through_gif(picture)
    with Clip(data) as found:
        (shown,) = found.frames([0.0], whole(found))
    assert np.abs(shown[:, :20].astype(int) - [200, 0, 0]).max() < 12
    assert shown[:, 28:].min() > 250


def see_through_gif(picture: Pixels) -> bytes:
    """Two frames, each over nothing: the one before is disposed of."""
    image = pytest.importorskip("PIL.Image")
    made = io.BytesIO()
    frames = [image.fromarray(picture), image.fromarray(picture)]
    frames[0].save(made, "GIF", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    return made.getvalue()


def test_a_gif_keeps_what_its_frames_do_not_paint() -> None:
    """Its later frames hold only what changes."""
    image = pytest.importorskip("PIL.Image")
    first = np.full((32, 48, 3), 255, np.uint8)
    first[4:12, 4:12] = (0, 0, 200)
    second = first.copy()
    second[20:28, 30:40] = (0, 160, 0)
    made = io.BytesIO()
    image.fromarray(first).save(made, "GIF", save_all=True, append_images=[image.fromarray(second)], duration=100)
    with Clip(made.getvalue()) as found:
        assert np.abs(found.frames([0.15], whole(found))[0].astype(int) - second).max() < 12


def test_fragments_and_a_stream_that_was_sent_live() -> None:
    """Without an index, and without a duration in the header."""
    for kind, options in (("mp4", {"movflags": "frag_keyframe+empty_moov"}), ("webm", {"live": "1"})):
        data = clip(counting(20), kind, options=options)
        assert numbers(data, [0.0, 1.3, 0.25]) == [0, 13, 2]
        with Clip(data) as found:
            assert found.duration == pytest.approx(2.0, abs=0.11)


@pytest.mark.parametrize(
    ("kind", "cut", "reason"),
    [
        ("mp4", 0, "it is empty"),
        ("mp4", 20, "it is damaged or cut short"),
        ("mp4", 500, "it is cut short: 500 of"),
        ("mp4", -1, "it is cut short"),
        ("webm", 500, "it is cut short: 500 of"),
        ("webm", -1, "it is cut short"),
        ("gif", 5, "it is not an mp4, webm or gif clip"),
        ("gif", 5_000, "it is cut short: no end of the gif"),
        ("gif", -1, "it is cut short: no end of the gif"),
    ],
)
def test_a_file_that_is_cut_short(kind: str, cut: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Clip(clip(counting(20), kind)[:cut])


def test_clips_that_are_too_large_too_long_or_hold_no_pictures() -> None:
    data = clip(counting(20))
    with pytest.raises(ValueError, match="it has 48 x 32 pixels; at most 1535 are decoded"):
        Clip(data, max_pixels=1535)
    with pytest.raises(ValueError, match=r"it lasts 2 seconds; up to 1\.5 are read"):
        Clip(data, max_seconds=1.5)
    for other in (b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n", b"RIFF0000AVI LIST"):
        with pytest.raises(ValueError, match="it is not an mp4, webm or gif clip"):
            Clip(other)
    with pytest.raises(ValueError, match="it has no video stream"):
        Clip(only_sound())


def only_sound() -> bytes:
    made = io.BytesIO()
    with av.open(made, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return made.getvalue()


def test_what_a_header_asks_for_takes_no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(counting(20), "gif")
    monkeypatch.setattr(clips, "MAX_DECODED", 32 * 48)  # its first frame
    with Clip(data) as found:
        assert found.duration == pytest.approx(2.0)
    monkeypatch.setattr(clips, "MAX_BOXES", 100)
    with pytest.raises(ValueError, match="more than 100 boxes"):
        Clip(b"\0\0\0\x08free" * 200)


def test_a_frame_that_is_damaged_is_not_shown() -> None:
    """Though what lies before it in the same clip is."""
    data = bytearray(clip(textured(40), "mp4", keys=10))
    with av.open(io.BytesIO(bytes(data))) as container:
        hurt = list(container.streams.video[0].index_entries)[20]
    for place in range(hurt.pos + hurt.size // 3, hurt.pos + hurt.size, 7):
        data[place] ^= 255
    with Clip(bytes(data)) as found:
        found.frames([0.5, 1.5], whole(found))
        with pytest.raises(ValueError, match="is damaged"):
            found.frames([2.9], whole(found))


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Decode clips with bytes cut off, cut out and changed; RuntimeError if one took long."""
    rng = np.random.default_rng(seed)
    sound = {kind: clip(textured(20), kind, audio=1.0 if kind == "mp4" else 0.0) for kind in KINDS}
    sound["fragments"] = clip(textured(20), options={"movflags": "frag_keyframe+empty_moov"})
    sound["live"] = clip(textured(20), "webm", options={"live": "1"})
    outcomes = {f"{kind} {how}": 0 for kind in sound for how in ("shown", "refused")}
    for trial in range(count):
        kind = list(sound)[trial % len(sound)]
        data = bytearray(sound[kind])
        if trial % 4 == 0:
            del data[int(rng.integers(1, len(data))) :]
        elif trial % 4 == 1:
            place = int(rng.integers(len(data)))
            del data[place : place + int(rng.integers(1, 200))]
        first, end = ((0, 900), (len(data) - 1500, len(data)), (0, len(data)))[
            int(rng.integers(3))
        ]  # headers are there
        for place in rng.integers(max(0, first), min(end, len(data)), rng.integers(0, 20)):
            data[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        began = time.monotonic()
        try:
            with Clip(bytes(data)) as found:
                crop = Crop(0, 0, min(8, found.height), min(8, found.width), (8, 8))
                assert found.frames(rng.uniform(0, 3, 4).tolist(), crop).shape == (4, 8, 8, 3)
            outcomes[f"{kind} shown"] += 1
        except ValueError as error:
            outcomes[f"{kind} refused"] += 5 < len(str(error)) < 200
        if time.monotonic() - began > 30:
            raise RuntimeError(f"trial {trial} of seed {seed}")
    return outcomes


def fuzzed(count: int, seed: int) -> None:
    """In a process that may not take 4 GiB and whose memory is measured; nothing is printed on the way."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.test_clips", str(count), str(seed)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-4_000:]
    outcomes = json.loads(done.stdout)
    assert all(outcomes.values()), outcomes


def test_damage_is_a_value_error_or_frames() -> None:
    fuzzed(400, 0)


@pytest.mark.slow
def test_much_damage() -> None:
    fuzzed(3_000, 1)


@pytest.mark.slow
def test_nothing_is_left_behind() -> None:
    """Memory stays where it was, whether clips are sound, damaged or dropped without being closed."""
    import gc

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    sound = clip(textured(30))
    hurt = bytearray(sound)
    hurt[len(hurt) // 3 : len(hurt) // 3 + 300] = bytes(300)
    sizes = []
    for _ in range(4):
        for _ in range(100):
            for data in (sound, bytes(hurt), sound[:-9]):
                try:
                    found = Clip(data)
                    found.frames([0.5, 2.5, 0.2], whole(found))
                except ValueError:
                    pass
        gc.collect()
        sizes.append(resident())
    assert sizes[-1] - sizes[1] < 16 << 20, sizes  # 600 clips; the first round warms up


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
    print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]))))
