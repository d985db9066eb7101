"""Hierarchical k-means over the frames of shards: a codebook of visual words.

Each node of the tree is one k-means of scikit-learn over what came to it. (Of 20,000 features of 256 numbers into 12
clusters on one core it took 0.28 s and reached 1,209 per row, faiss-cpu 1.15 0.42 s and 1,214, with a warning for each
small node.) Of all frames a seeded uniform sample is drawn, which lies on the disk, so that no more than that is held
at any time. What is done lies in `FILE.work`: ended at any point, the same call goes on, and in the end the codebook is
that of one run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vlscale.data import parallel
from vlscale.data.samples import FRAME_FIELD
from vlscale.data.shards import Shards
from vlscale.data.storage import locks
from vlscale.data.visual_words import (
    Codebook,
    Floats,
    Ints,
    descend,
    read_features,
    write_codebook,
)
from vlscale.errors import ConfigError, DataError

NODES = 64  # between two saves of a level
ROWS = 8192  # that go down the tree at once
NAMED = 10  # broken samples that are named


@dataclass(frozen=True)
class Growth:
    """How a codebook is made; the defaults are VideoBERT's, but for `rows`, `iterations` and `seed`."""

    branches: int = 12
    levels: int = 4
    rows: int = 1_000_000  # frames drawn; of each 4 bytes a number are on the disk, and in memory
    iterations: int = 100  # of one k-means at most
    seed: int = 0

    def __post_init__(self) -> None:
        """ConfigError for numbers that cannot be."""
        for name, least in (("branches", 2), ("levels", 1), ("rows", self.branches), ("iterations", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}; write {least} or more")
        if self.branches**self.levels > 2**24:
            raise ConfigError(f"--branches {self.branches} and --levels {self.levels} give more than 16 million words")


class Grown(NamedTuple):
    """What became of it."""

    frames: int  # in the shards
    rows: int  # of them drawn
    inertia: tuple[float, ...]  # mean squared distance of the rows to their centroid, by level
    leaves: int  # that a row came to
    words: int
    frames_per_second: float  # read, of those that this process read
    broken: int  # samples without usable frames
    named: tuple[tuple[str, str], ...]  # (key, reason) of the first


def grow(shards: Shards, path: Path, growth: Growth, processes: int = 1) -> Grown:
    """Make a codebook of the frames of `shards` at `path`.

    Samples without usable `frames.npz` are passed over, counted and named. ConfigError if `path` is there already, was
    begun with other options, or scikit-learn is not installed; DataError if there are too few frames.
    """
    _require_library()
    parallel.require_processes(processes)
    if path.exists():
        raise ConfigError(f"--to {path} is there already; write another, or remove it")
    with _work(path, {**asdict(growth), "shards": shards.fingerprint()}) as folder:
        counted = _count(shards, folder, processes)
        total = int(counted.frames.sum())
        if total < growth.branches:
            first = "".join(f"; the first broken one, '{key}': {reason}" for key, reason in counted.named[:1])
            raise DataError(f"the shards hold {total} frames, too few for {growth.branches} branches{first}")
        _draw(shards, counted, growth, folder, processes)
        codebook, inertia = _train(folder / "sample.npy", growth, folder, processes)
        write_codebook(codebook, path)
    shutil.rmtree(folder, ignore_errors=True)
    rows, leaves = int(codebook.counts[0].sum()), int((codebook.counts[-1] > 0).sum())
    speed = counted.read / max(counted.seconds, 1e-9)
    named = tuple(counted.named[:NAMED])
    return Grown(total, rows, inertia, leaves, codebook.words, speed, len(counted.named), named)


def _require_library() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError("visual words need scikit-learn; pip install 'vlscale[words]'") from error


@contextmanager
def _work(path: Path, origin: dict[str, object]) -> Iterator[Path]:
    """The folder of what is done, this process's alone. ConfigError if it was begun with something else."""
    folder = path.with_name(f"{path.name}.work")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--to {path} cannot be written ({error.strerror}); write a path that can") from error
    try:
        if locks.take(lock, wait=False) == "another's":
            raise ConfigError(f"another process is making {path}; let it end")
        note = folder / "origin.json"
        began = json.loads(note.read_text(encoding="utf-8")) if note.exists() else origin
        for name, here in origin.items():
            if began.get(name) != here:
                raise ConfigError(
                    f"{folder} was begun with {name} {began.get(name)}, not {here}; go on with that, or remove it"
                )
        _save(note, json.dumps(origin).encode())
        yield folder
    finally:
        os.close(lock)


class _Counted:
    """How many frames each sample has."""

    def __init__(self) -> None:
        self.frames = np.zeros(0, dtype=np.int64)  # [samples]
        self.width = 0
        self.named: list[tuple[str, str]] = []  # (key, reason) of broken samples
        self.read = 0  # frames, by this process
        self.seconds = 0.0


@dataclass(frozen=True)
class _Read:
    """The features of a sample, or some rows of them; or why there are none."""

    shards: Shards

    def __call__(self, asked: tuple[int, Ints | None]) -> tuple[int, int, Floats | None, str]:
        """(frames, numbers of each, the rows where some are asked for, why there are none)."""
        i, rows = asked
        try:
            data = self.shards.read(i, (FRAME_FIELD,))
            if FRAME_FIELD not in data:
                raise ValueError(f"it has no '{FRAME_FIELD}' but {', '.join(self.shards.fields(i))}")
            features, _ = read_features(data[FRAME_FIELD])
        except ValueError as error:
            return 0, 0, None, str(error)
        found = None if rows is None else features[rows].astype(np.float32)
        return len(features), features.shape[1], found, ""


def _count(shards: Shards, folder: Path, processes: int) -> _Counted:
    """Read all frames once, shard by shard; what an earlier process has counted is not read again."""
    log, counted, started = folder / "frames.jsonl", _Counted(), time.monotonic()
    frames: list[int] = []
    done = _lines(log)
    for line in done:
        frames += line["frames"]
        counted.named += [(key, reason) for key, reason in line["broken"]]
        counted.width = counted.width or line["width"]
    numbers = ((i, None) for i in range(len(frames), len(shards)))
    with (
        log.open("ab") as file,
        tqdm(total=len(shards), initial=len(frames), desc="frames", unit="sample", disable=None) as progress,
        closing(parallel.ordered(_Read(shards), numbers, processes)) as found,
    ):
        for shard in range(len(done), len(shards.paths)):
            own: list[int] = []
            broken: list[tuple[str, str]] = []
            first = shards.start(shard)
            for count, width, _, reason in islice(found, shards.start(shard + 1) - first):
                counted.width = counted.width or width
                if not reason and count and width != counted.width:
                    reason = f"its frames have {width} numbers, others {counted.width}"
                if reason:
                    broken.append((shards.key(first + len(own)), reason))
                own.append(0 if reason else count)
                progress.update()
            frames += own
            counted.named += broken
            counted.read += sum(own)
            _append(file, {"frames": own, "broken": broken, "width": counted.width})
    counted.frames, counted.seconds = np.array(frames, dtype=np.int64), time.monotonic() - started
    return counted


def _draw(shards: Shards, counted: _Counted, growth: Growth, folder: Path, processes: int) -> None:
    """Copy a uniform sample of the frames to `sample.npy` [rows, F], in their order."""
    total, log, path = int(counted.frames.sum()), folder / "drawn.jsonl", folder / "sample.npy"
    if total <= growth.rows:
        chosen = np.arange(total)
    else:
        chosen = np.sort(np.random.default_rng(growth.seed).choice(total, growth.rows, replace=False))
    starts = np.concatenate([[0], np.cumsum(counted.frames)])
    bounds = np.searchsorted(chosen, starts)  # [samples + 1], which of the chosen are a sample's
    done = _lines(log)
    shape = (len(chosen), counted.width)
    mode = "r+" if done else "w+"  # a file without a finished shard may be cut short
    sample: NDArray[Any] = np.lib.format.open_memmap(path, mode, np.float32, shape)
    first = shards.start(len(done))

    def asked() -> Iterator[tuple[int, Ints | None]]:
        for i in range(first, len(shards)):
            rows = chosen[bounds[i] : bounds[i + 1]] - starts[i]
            if len(rows):
                yield i, rows

    with log.open("ab") as file, closing(parallel.ordered(_Read(shards), asked(), processes)) as found:
        for shard in tqdm(range(len(done), len(shards.paths)), desc="sample", unit="shard", disable=None):
            for i in range(shards.start(shard), shards.start(shard + 1)):
                if bounds[i] == bounds[i + 1]:
                    continue
                _, _, rows, reason = next(found)
                if rows is None:
                    raise DataError(f"sample '{shards.key(i)}' has changed while it was read: {reason}; start anew")
                sample[bounds[i] : bounds[i + 1]] = rows
            sample.flush()  # type: ignore[attr-defined]
            _append(file, {"shard": shard})


def _train(path: Path, growth: Growth, folder: Path, processes: int) -> tuple[Codebook, tuple[float, ...]]:
    """The tree, level by level, and the mean squared distance of the rows at each."""
    sample = np.load(path, mmap_mode="r", allow_pickle=False)
    nodes = np.zeros(len(sample), dtype=np.int64)
    levels: list[Floats] = []
    counts, inertia = [], []
    for number in range(growth.levels):
        level = _level(path, sample.shape[1], nodes, number, levels, growth, folder, processes)
        squares = 0.0
        for start in range(0, len(sample), ROWS):
            some = slice(start, start + ROWS)
            nodes[some], square = descend(sample[some].astype(np.float64), nodes[some], level)
            squares += float(square.sum())
        levels.append(level)
        counts.append(np.bincount(nodes, minlength=growth.branches ** (number + 1)).reshape(level.shape[:2]))
        inertia.append(squares / len(sample))
    return Codebook(tuple(levels), tuple(counts)), tuple(inertia)


def _level(
    path: Path,
    width: int,
    nodes: Ints,
    number: int,
    above: Sequence[Floats],
    growth: Growth,
    folder: Path,
    processes: int,
) -> Floats:
    """The centroids [k^l, k, F] of one level, of rows at `nodes`; saved every so many nodes."""
    count, saved = growth.branches**number, folder / f"level{number}.npy"
    level = np.empty((count, growth.branches, width), dtype=np.float32)
    done = 0
    if saved.exists():
        found = np.load(saved, allow_pickle=False)
        done = len(found)
        level[:done] = found
    order = np.argsort(nodes, kind="stable")
    bounds = np.searchsorted(nodes[order], np.arange(count + 1))
    items = (
        (node, order[bounds[node] : bounds[node + 1]], above[-1].reshape(-1, width)[node] if above else None)
        for node in range(done, count)
    )
    with (
        tqdm(total=count, initial=done, desc=f"level {number + 1}", unit="node", disable=None) as progress,
        closing(parallel.ordered(_Cluster(path, growth, number), items, processes, chunk=4)) as made,
    ):
        for node, centroids in zip(range(done, count), made, strict=True):
            level[node] = centroids
            progress.update()
            if (node + 1) % NODES == 0 or node + 1 == count:
                _save_array(saved, level[: node + 1])
    return level


@dataclass(frozen=True)
class _Cluster:
    """The children of one node."""

    path: Path
    growth: Growth
    level: int

    def __call__(self, asked: tuple[int, Ints, Floats | None]) -> Floats:
        """[k, F] of (the node, its rows of the sample, its own centroid); where a child has no row it is the node's."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        node, rows, own = asked
        k, g = self.growth.branches, self.growth
        features: Floats = np.load(self.path, mmap_mode="r", allow_pickle=False)[rows]
        if len(features) < k:
            spare = own if own is not None else features.mean(axis=0)
            return np.concatenate([features, np.repeat(spare[None], k - len(features), axis=0)])
        seed = int(np.random.SeedSequence([g.seed, self.level, node]).generate_state(1)[0])
        means = KMeans(k, n_init=1, max_iter=g.iterations, random_state=seed)
        with threadpool_limits(1), warnings.catch_warnings():  # several threads sum in any order
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than children
            return np.asarray(means.fit(features).cluster_centers_, dtype=np.float32)


def _lines(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; one that was cut short is struck out."""
    if not log.exists():
        return []
    data = log.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(log, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _append(file: Any, values: dict[str, object]) -> None:
    file.write(json.dumps(values).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _save_array(path: Path, array: NDArray[Any]) -> None:
    hidden = path.with_name(f".{path.name}.part")
    with hidden.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, path)


def _save(path: Path, data: bytes) -> None:
    hidden = path.with_name(f".{path.name}.part")
    hidden.write_bytes(data)
    os.replace(hidden, path)
