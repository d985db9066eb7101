"""`python -m tests.measure_clips [--rounds N]`: two decoders of clips beside one another, PyAV and OpenCV.

Clips of a drawn scene that moves (noise of a 1/f spectrum, 20 seconds, a key frame every 2 seconds or so) lie in
memory; frames come as uint8 RGB, centre crop of the short side to 224 x 224. Two requests: `window`, 32 frames at
10 a second from a random place; `sparse`, one frame a second. One thread each. Told are frames per CPU-second (medians
of interleaved rounds), and how many frames are not the ones that decoding the whole clip gives for these times.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import av
import cv2
import numpy as np
import torch

from tests.clip_files import Pixels, clip
from tests.measure_decode import drawn
from vlscale.data.clips import SAME, Clip
from vlscale.data.decode import Crop, part

SIDE, SECONDS, RATE = 224, 20, 25
CLIPS = {  # name: kind of container, height, width
    "h264 340 x 256": ("mp4", 256, 340),
    "h264 640 x 360": ("mp4", 360, 640),
    "h264 1280 x 720": ("mp4", 720, 1280),
    "vp9 340 x 256": ("webm", 256, 340),
    "gif 200 x 150": ("gif", 150, 200),
}


def scene(height: int, width: int) -> Iterator[Pixels]:
    """The frames of a camera that goes in circles over a picture, with a patch that moves on it."""
    rng = np.random.default_rng(height)
    whole = drawn(rng, height + 64, width + 64)
    patch = drawn(rng, height // 4, width // 4)
    for i in range(SECONDS * RATE):
        turn = 2 * np.pi * i / (8 * RATE)
        top, left = round(32 + 31 * np.sin(turn)), round(32 + 31 * np.cos(turn))
        shown = whole[top : top + height, left : left + width].copy()
        place = i * 3 % (width * 3 // 4)
        shown[height // 3 : height // 3 + patch.shape[0], place : place + patch.shape[1]] = patch
        yield shown


def with_pyav(data: bytes, times: Sequence[float], crop: Crop) -> Pixels:
    with Clip(data) as found:
        return found.frames(times, crop)


def with_opencv(data: bytes, times: Sequence[float], crop: Crop) -> Pixels:
    """As people use it: one seek to the first time, then the first frame at or after each time."""
    shown = np.empty((len(times), *crop.size, 3), np.uint8)
    held = io.BytesIO(data)  # OpenCV keeps no reference: without this name it crashes
    capture = cv2.VideoCapture(held, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    capture.set(cv2.CAP_PROP_POS_MSEC, times[0] * 1000)
    for i, wanted in enumerate(times):
        while capture.grab() and capture.get(cv2.CAP_PROP_POS_MSEC) < (wanted - SAME) * 1000:
            pass
        found, pixels = capture.retrieve()
        part(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if found else np.zeros((1, 1, 3), np.uint8), crop, 1, shown[i])
    capture.release()
    return shown


def whole(data: bytes, times: Sequence[float], crop: Crop) -> Pixels:
    """By decoding everything."""
    frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in av.open(io.BytesIO(data)).decode(video=0)]
    shown = np.empty((len(times), *crop.size, 3), np.uint8)
    for i, wanted in enumerate(times):
        part([pixels for time, pixels in frames if time <= wanted + SAME or time == 0][-1], crop, 1, shown[i])
    return shown


SIDES: dict[str, Callable[[bytes, Sequence[float], Crop], Pixels]] = {"pyav": with_pyav, "opencv": with_opencv}


def requests(rng: np.random.Generator) -> dict[str, list[float]]:
    start = rng.uniform(0, SECONDS - 4)
    return {"window": [start + i / 10 for i in range(32)], "sparse": [0.5 + i for i in range(SECONDS)]}


def measure(data: bytes, crop: Crop, rounds: int) -> None:
    rng = np.random.default_rng(0)
    rates: dict[tuple[str, str], list[float]] = {}
    wrong: dict[tuple[str, str], int] = {}
    for _ in range(rounds):
        for request, times in requests(rng).items():
            expected = whole(data, times, crop)
            for side, decode in SIDES.items():
                began = time.process_time()
                shown = decode(data, times, crop)
                rates.setdefault((request, side), []).append(len(times) / (time.process_time() - began))
                differs = np.abs(shown.astype(int) - expected).mean(axis=(1, 2, 3)) > 2  # colours are rounded apart
                wrong[request, side] = wrong.get((request, side), 0) + int(differs.sum())
    for (request, side), found in rates.items():
        share = wrong[request, side] / (rounds * len(requests(rng)[request]))
        print(
            f"  {request:8} {side:8} {median(found):8.0f} frames per CPU-second, {share:.0%} other frames", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for name, (kind, height, width) in CLIPS.items():
        data = clip(list(scene(height, width)), kind, rate=RATE, keys=50)
        short = min(height, width)
        crop = Crop((height - short) // 2, (width - short) // 2, short, short, (SIDE, SIDE))
        print(f"{name}, {SECONDS} s, {len(data) / 1e6:.1f} MB", flush=True)
        measure(data, crop, rounds)


if __name__ == "__main__":
    main()
