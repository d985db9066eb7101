"""`python -m tests.measure_decode [--jpegs 'SHARDS/*.tar'] [--workers 0 2]`: our loader beside webdataset and Pillow.

JPEG bytes in a tar to uint8 batches of 224 x 224, the same pictures and the same work on both sides, in processor time
of all processes of a side (utime and stime of its process tree), start-up left out. Every round of a side is a process
of its own; rounds are interleaved; medians, and the least of either side, which a busy machine disturbs less. Without
`--jpegs` pictures are drawn: noise of a 1/f spectrum, quality 85. With it they are put together of real ones until they
have the size. Beside `plain` (resize of the whole picture), `crop` (random resized crop and flip) and `augment` (crop,
flip, ALBEF's RandAugment) it tells how far our pixels are from Pillow's for the same crops, and how much the loader
costs over its bare decoding.

Needs webdataset and Pillow.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from tests.shard_files import write_tar, write_vocabulary
from vlscale.data.augment import RandAugment
from vlscale.data.batches import Even
from vlscale.data.decode import Encoded, Pixels
from vlscale.data.loader import Loader
from vlscale.data.micro_batches import Preprocessing
from vlscale.data.order import Order, Source, TaskOrder
from vlscale.data.shards import Shards
from vlscale.data.text import SPECIAL_TOKENS, Tokenizer
from vlscale.data.views import VisualView, parse
from vlscale.types import Inputs

SIZE, BATCH = 224, 64
SHAPES = (1.0, 4 / 3, 3 / 2, 3 / 4, 2 / 3, 4 / 3)  # width over height
COUNT = {256: 600, 512: 300}  # pictures
SHARDS = 4
STEPS = {256: 40, 512: 20}  # batches that count, after these:
WARM_UP = 10  # by then every text has been tokenised, as after the first epoch; in workers, each of which sees a part:
WARM_UP_OF_A_WORKER = 20
CAPTION = "a dog and two cats on a mat"
WORK: dict[str, dict[str, Any]] = {
    "plain": {},
    "crop": {"random_resized_crop": {"scale": [0.2, 1.0]}, "flip": {}},
    "augment": {"random_resized_crop": {"scale": [0.2, 1.0]}, "flip": {}, "rand_augment": {"num": 2, "level": 7}},
}


# --- pictures ----------------------------------------------------------------------------------------------


def drawn(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Noise whose amplitude falls with frequency as that of photographs does; the channels mostly alike."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))

    def layer() -> Any:
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        return np.fft.irfft2(phases / np.maximum(frequency, 1 / max(height, width)), s=(height, width))

    grey = layer()
    layers = np.stack([grey + 0.15 * layer() for _ in range(3)], axis=2)
    layers -= layers.mean()
    return np.asarray(np.clip(layers / layers.std() * 36 + 120, 0, 255), dtype=np.uint8)


def pasted(rng: np.random.Generator, height: int, width: int, given: list[Image.Image]) -> Pixels:
    """Real pictures beside and below one another."""
    canvas, top = Image.new("RGB", (width, height)), 0
    while top < height:
        left, lowest = 0, height
        while left < width:
            one = given[int(rng.integers(len(given)))]
            canvas.paste(one, (left, top))
            left, lowest = left + one.width, min(lowest, one.height)
        top += lowest
    return np.asarray(canvas)


def write_pictures(folder: Path, short: int, given: list[Image.Image]) -> Path:
    """Tars of JPEGs whose shorter side is `short`, in a folder of that name."""
    rng = np.random.default_rng(short)
    samples: list[list[tuple[str, bytes]]] = []
    for i in range(COUNT[short]):
        shape = SHAPES[i % len(SHAPES)]
        height, width = (short, round(short * shape)) if shape >= 1 else (round(short / shape), short)
        pixels = pasted(rng, height, width, given) if given else drawn(rng, height, width)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=85)
        samples.append([(f"{i:06d}.jpg", encoded.getvalue()), (f"{i:06d}.txt", CAPTION.encode())])
    mean = sum(len(sample[0][1]) for sample in samples) / COUNT[short] / 1000
    print(f"short side {short}: {COUNT[short]} pictures, mean {mean:.0f} kB", flush=True)
    shards = folder / str(short)
    shards.mkdir()
    for n in range(SHARDS):  # webdataset's workers share them out
        write_tar(shards / f"{n}.tar", [member for sample in samples[n::SHARDS] for member in sample])
    return shards


def read_jpegs(paths: Iterable[str]) -> list[Image.Image]:
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            members = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
            found += [Image.open(io.BytesIO(member.read())).convert("RGB") for member in members if member]
    return found


# --- the two sides -----------------------------------------------------------------------------------------


def ours(shards: Path, work: str, workers: int) -> Iterator[torch.Tensor]:
    inputs = Inputs(image_size=SIZE, text_length=30, separator=True)
    data = Shards(str(shards / "*.tar"), shards / "cache")
    write_vocabulary([*SPECIAL_TOKENS, *sorted(set(CAPTION.split()))], shards / "vocab.txt")
    preprocessing = Preprocessing(
        {"all": parse({"visual.clean": WORK[work], "text.clean": {}})}, TaskOrder({"all": 1.0}, 0), 0
    )
    order = Order([Source("data", (0, len(data)))], 0)
    tokenizer = Tokenizer(shards, inputs)
    loader = Loader(data, tokenizer, inputs, preprocessing, order, Even(BATCH, BATCH, 0, 1), workers)
    for _, (batch,) in loader.steps(0, 10_000):
        yield batch.visual["clean"].feats


def theirs(shards: Path, work: str, workers: int) -> Iterator[torch.Tensor]:
    import webdataset as wds

    paths = sorted(map(str, shards.glob("*.tar")))
    data = wds.WebDataset(paths, shardshuffle=False).repeat().shuffle(200).decode("pil")
    data = data.map(partial(their_sample, work=work)).batched(BATCH, collation_fn=their_batch, partial=False)
    for pixels, _ in wds.WebLoader(data, batch_size=None, num_workers=workers):
        yield pixels


def their_sample(one: dict[str, Any], work: str) -> tuple[torch.Tensor, str]:
    pixels = np.array(pillow_view(one["jpg"], work))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), one["txt"]


def their_batch(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.stack([pixels for pixels, _ in samples]), [text for _, text in samples]


def pillow_view(picture: Image.Image, work: str) -> Image.Image:
    """The same work as torchvision does it with Pillow, and RandAugment as ALBEF's authors do, in NumPy and OpenCV."""
    if work == "plain":
        return picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    picture = picture.crop(pillow_crop(picture)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if work == "augment":
        pixels = np.array(picture)
        for _ in range(2):
            if random.random() < 0.5:
                pixels = random.choice(AUTHORS)(pixels, random.choice((-1.0, 1.0)))
        picture = Image.fromarray(pixels)
    return picture


def pillow_crop(picture: Image.Image) -> tuple[int, int, int, int]:
    width, height = picture.size
    for _ in range(10):
        area = width * height * random.uniform(0.2, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


def by_channel(table: Callable[[Pixels], Any]) -> Callable[[Pixels, float], Pixels]:
    """Each channel through a table of its own, as the authors write it."""

    def changed(pixels: Pixels, sign: float) -> Pixels:
        channels = [np.clip(table(one), 0, 255).astype(np.uint8)[one] for one in cv2.split(pixels)]
        return np.asarray(cv2.merge(channels))

    return changed


def stretched(channel: Pixels) -> Any:
    low, high = int(channel.min()), int(channel.max())
    return (np.arange(256) - low) * (255 / max(1, high - low))


def flattened(channel: Pixels) -> Any:
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).reshape(-1)
    step = max(1, int(counts[counts > 0][:-1].sum()) // 255)
    return np.cumsum(np.concatenate([[step // 2], counts[:-1]])) // step


def brighter(pixels: Pixels, sign: float) -> Pixels:
    table = np.clip(np.arange(256) * 1.36, 0, 255).astype(np.uint8)
    return np.asarray(table[pixels])


def sharper(pixels: Pixels, sign: float) -> Pixels:
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(pixels, -1, kernel / 13).astype(np.float32)
    out = pixels.copy()
    out[1:-1, 1:-1] = np.clip(smooth + 1.36 * (pixels - smooth), 0, 255).astype(np.uint8)[1:-1, 1:-1]
    return out


def warped(matrix: Callable[[float], Any]) -> Callable[[Pixels, float], Pixels]:
    def changed(pixels: Pixels, sign: float) -> Pixels:
        return np.asarray(cv2.warpAffine(pixels, np.float32(matrix(sign)), (SIZE, SIZE), borderValue=(128, 128, 128)))

    return changed


AUTHORS: tuple[Callable[[Pixels, float], Pixels], ...] = (
    lambda pixels, sign: pixels,
    by_channel(stretched),
    by_channel(flattened),
    brighter,
    sharper,
    warped(lambda sign: [[1, sign * 0.21, 0], [0, 1, 0]]),
    warped(lambda sign: [[1, 0, 0], [sign * 0.21, 1, 0]]),
    warped(lambda sign: [[1, 0, sign * 7], [0, 1, 0]]),
    warped(lambda sign: [[1, 0, 0], [0, 1, sign * 7]]),
    warped(lambda sign: cv2.getRotationMatrix2D((SIZE / 2, SIZE / 2), sign * 21, 1)),
)
SIDES = {"ours": ours, "theirs": theirs}


# --- measuring ---------------------------------------------------------------------------------------------


def processor_seconds(root: int) -> float:
    """Of a process and all that descend from it, the ended ones that were waited for too."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    tree = [root]
    for process in tree:
        tree += children.get(process, [])
    return sum(ticks.get(process, 0) for process in tree) / os.sysconf("SC_CLK_TCK")


def measure_one(side: str, shards: Path, work: str, workers: int) -> dict[str, float]:
    """{processor time, wall time} per picture in microseconds."""
    short = int(shards.name)
    batches = SIDES[side](shards, work, workers)
    for _ in range(WARM_UP_OF_A_WORKER * workers or WARM_UP):
        next(batches)
    before, began = processor_seconds(os.getpid()), time.perf_counter()
    for _ in range(STEPS[short]):
        assert next(batches).shape == (BATCH, 3, SIZE, SIZE)
    used, took = processor_seconds(os.getpid()) - before, time.perf_counter() - began
    pictures = STEPS[short] * BATCH
    return {"cpu": used / pictures * 1e6, "wall": took / pictures * 1e6}


def bare(shards: Path, work: str) -> float:
    """Microseconds of processor time per picture of our decoding alone: bytes to a changed part."""
    view = parse({"visual.clean": WORK[work]}).visual["clean"]
    jpegs = list(jpegs_of(shards))
    rng = np.random.default_rng(0)
    began = time.process_time()
    for data in jpegs:
        view(our_crop(data, view, rng)[0][0], rng)
    return (time.process_time() - began) / len(jpegs) * 1e6


def our_crop(data: bytes, view: VisualView, rng: np.random.Generator) -> tuple[list[Pixels], Any]:
    found = Encoded(data)
    crop = view.crop(found.height, found.width, SIZE, rng)
    return found.crops([crop]), crop


def jpegs_of(shards: Path) -> Iterator[bytes]:
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file and member.name.endswith(".jpg"):
                    yield file.read()


def distance(shards: Path, work: str) -> tuple[float, float]:
    """Mean absolute difference of values to Pillow's bicubic of the same crops: (of all, of the worst picture)."""
    view, rng = parse({"visual.clean": WORK[work]}).visual["clean"], np.random.default_rng(1)
    found = []
    for data in list(jpegs_of(shards))[:100]:
        (part,), crop = our_crop(data, view, rng)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        picture = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
        expected = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        found.append(float(np.abs(part.astype(int) - expected).mean()))
    return float(np.mean(found)), max(found)


def in_a_process(side: str, shards: Path, work: str, workers: int) -> dict[str, float]:
    """`measure_one` in a new process: a fork would pay for every page of this one that it touches."""
    fresh = multiprocessing.get_context("spawn")
    receive, send = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_tell, args=(send, side, shards, work, workers))
    process.start()
    send.close()
    result: dict[str, float] = receive.recv()
    process.join()
    return result


def _tell(send: Connection, side: str, shards: Path, work: str, workers: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    send.send(measure_one(side, shards, work, workers))
    os._exit(0)  # without waiting for what is being loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jpegs", nargs="*", default=[], help="tars of real JPEGs")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--short", type=int, nargs="*", choices=list(COUNT), default=list(COUNT))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        real = read_jpegs(given.jpegs)
        for short in given.short:
            shards = write_pictures(Path(folder), short, real)
            for work in given.work:
                mean, worst = distance(shards, work)
                alone = median(bare(shards, work) for _ in range(3))
                print(f"  {work}: from Pillow {mean:.2f} (at most {worst:.2f}); bare {alone:.0f} us", flush=True)
                for workers in given.workers:
                    report(shards, work, workers, given.rounds)


def report(shards: Path, work: str, workers: int, rounds: int) -> None:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(in_a_process(side, shards, work, workers))
    cpu = {side: median(each["cpu"] for each in found[side]) for side in SIDES}
    least = {side: min(each["cpu"] for each in found[side]) for side in SIDES}
    wall = {side: median(each["wall"] for each in found[side]) for side in SIDES}
    print(
        f"    {workers} workers: {1e6 / cpu['ours']:.0f} pictures per CPU-second, webdataset + Pillow "
        f"{1e6 / cpu['theirs']:.0f}: {cpu['theirs'] / cpu['ours']:.2f} times "
        f"(least {1e6 / least['ours']:.0f}, {1e6 / least['theirs']:.0f}: {least['theirs'] / least['ours']:.2f}); "
        f"wall {wall['theirs'] / wall['ours']:.2f} times",
        flush=True,
    )


assert RandAugment() == RandAugment(num=2, level=7)  # what AUTHORS does

if __name__ == "__main__":
    main()
