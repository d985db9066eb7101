"""How long the texts of every sample are and how many regions, cells or patches it shows: measured once, then kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import zlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vlscale.data.arrays import read_arrays, read_header
from vlscale.data.augment import KeepRatio
from vlscale.data.decode import picture_size
from vlscale.data.detections import BY_REGION
from vlscale.data.order import Order
from vlscale.data.parallel import cores, ordered
from vlscale.data.philox import ManyDraws
from vlscale.data.phrases import Texts
from vlscale.data.pictures import CELL
from vlscale.data.samples import FRAME_FIELD, REGION_FIELD, WORD_FIELD, BrokenSampleError, picture_field
from vlscale.data.shards import Shards, cache_folder
from vlscale.data.shuffle import Numbers
from vlscale.data.storage.locks import alone
from vlscale.data.storage.whole import whole_folder
from vlscale.data.text import Tokenizer
from vlscale.data.views import Views
from vlscale.errors import ConfigError
from vlscale.types import Inputs

VERSION = 1  # rises when what is measured changes
PATCH = 16  # pixels of a side: a square picture counts as so many patches, as a ViT's (Dosovitskiy et al. 2021) does
HEAD = 1_024  # bytes of a regions.npz that tell how many there are
CHUNK = 256  # samples that a process measures at once
FEW = 20_000  # samples that are not worth other processes
BROKEN = 2  # words and regions of a sample that cannot be used: another will stand in its place


@dataclass(frozen=True)
class Reading:
    """What the lengths depend on beside the shards and the vocabulary."""

    inputs: Inputs
    max_words: int  # of a caption, as `data.text` has it
    questions: bool = False  # whether those are read
    keep_ratio: KeepRatio | None = None  # how pictures keep their shape; None = squares


class Measured(NamedTuple):
    """The lengths of one sample."""

    texts: list[int]  # tokens of its captions, then of its questions, special ones counted
    captions: int  # how many of them are captions
    tags: int  # tokens of its tags, special ones counted; 0 = not read
    seen: int  # regions, cells or patches


class Lengths:
    """The lengths of N samples with T texts in all, mapped from files that all processes of a machine share."""

    texts: NDArray[np.int16]  # [T] tokens
    first: NDArray[np.int64]  # [N + 1] texts of sample i are [first[i], first[i + 1])
    captions: NDArray[np.int16]  # [N] how many of them come first and are captions
    tags: NDArray[np.int16]  # [N]
    seen: NDArray[np.int16]  # [N]

    def __init__(self, folder: Path) -> None:
        """Of a folder that `measure` made."""
        self._folder = folder
        for name in ("texts", "first", "captions", "tags", "seen"):
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))

    def __reduce__(self) -> tuple[type[Lengths], tuple[Path]]:
        return Lengths, (self._folder,)

    def longest(self) -> int:
        """Words and regions of the longest sample, special tokens and all its tags counted."""
        words = np.maximum.reduceat(self.texts, self.first[:-1]).astype(np.int64)
        return int((words + self.tags + self.seen).max())

    def of_text(self, samples: Numbers, draws: ManyDraws, questions: bool) -> Numbers:
        """Tokens of the text that each of the samples [N] uses, drawn as `data.assemble` draws it."""
        first = self.first[samples]
        number = self.first[samples + 1] - first if questions else self.captions[samples].astype(np.int64)
        found: Numbers = self.texts[first + draws.integers(np.maximum(number, 1))].astype(np.int64)
        return found


def measure(
    shards: Shards, tokenizer: Tokenizer, vocabulary: str, reading: Reading, cache: Path | None = None
) -> Lengths:
    """The lengths of all samples, kept in `cache` (default `cache_folder()/lengths`).

    Of several processes that ask at once, one measures and the others wait for it. `vocabulary` is the text of the
    tokenizer's file. ConfigError if the folder cannot be written; DataError if a shard cannot be read.
    """
    root = cache or cache_folder() / "lengths"
    digest = hashlib.sha256(f"{VERSION} {PATCH} {shards.fingerprint()} {_told(reading)} {vocabulary}".encode())
    folder = root / digest.hexdigest()[:32]
    try:
        found = _kept(folder)
        if found is None:
            root.mkdir(parents=True, exist_ok=True)
            with alone(root / f"{folder.name}.lock"):
                found = _kept(folder)
                if found is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    texts = Texts(shards, tokenizer, *_how(reading))
                    _make(folder, shards, partial(measure_one, shards, texts, reading))
                    found = _kept(folder)
    except OSError as error:
        raise ConfigError(
            f"the lengths of the samples cannot be written to {root} ({error.strerror}); "
            "set VLSCALE_CACHE to a folder that can"
        ) from error
    if found is None:
        raise ConfigError(f"{folder} is damaged and another user's; have it removed, or set VLSCALE_CACHE elsewhere")
    return found


def _told(reading: Reading) -> str:
    inputs = {**asdict(reading.inputs), "fields": sorted(reading.inputs.fields)}
    return str({**asdict(reading), "inputs": inputs})


def _how(reading: Reading) -> tuple[int, Mapping[str, int] | None]:
    return reading.max_words, {} if reading.questions else None


def _kept(folder: Path) -> Lengths | None:
    """None where there are none, or the node that wrote them died before they were on the disk."""
    try:
        return Lengths(folder)
    except (FileNotFoundError, NotADirectoryError, EOFError, ValueError):
        return None


def _make(folder: Path, shards: Shards, measure_one: Callable[[int], Measured]) -> None:
    """Measure all, write beside, then rename; where another node was faster, its folder stays."""
    columns = {"texts": array("h"), "first": array("q", [0]), **{name: array("h") for name in Measured._fields[1:]}}
    processes = cores() if len(shards) > FEW else 1
    every = ordered(measure_one, iter(range(len(shards))), processes, CHUNK)
    with tqdm(every, total=len(shards), desc="lengths", unit=" samples", disable=None) as bar:
        for found in bar:
            columns["texts"].extend(found.texts)
            columns["first"].append(len(columns["texts"]))
            for name in Measured._fields[1:]:
                columns[name].append(getattr(found, name))
    with whole_folder(folder) as scratch:
        for name, column in columns.items():
            with open(scratch / f"{name}.npy", "wb") as file:
                np.save(file, np.asarray(column))
                file.flush()
                os.fsync(file.fileno())


def measure_one(shards: Shards, texts: Texts, reading: Reading, i: int) -> Measured:
    """The lengths of sample `i`; those of one that cannot be used are `BROKEN`."""
    try:
        if reading.inputs.frames:
            return _clip(shards, texts, reading.inputs, i)
        phrases = texts(i)
        tags = len(texts.tags(i).ids) if reading.inputs.tags else 0
        seen = _regions(shards, i, reading.inputs.regions) if reading.inputs.regions else _patches(shards, i, reading)
    except (BrokenSampleError, ValueError, KeyError):
        return Measured([BROKEN], 1, BROKEN if reading.inputs.tags else 0, BROKEN)
    captions = sum(not phrase.asked for phrase in phrases)
    return Measured([len(phrase.ids) for phrase in phrases], captions, tags, seen)


def _clip(shards: Shards, texts: Texts, inputs: Inputs, i: int) -> Measured:
    """A clip counts with the longest of its sentences and with as many of its frames as are read."""
    longest = max(len(texts.fit(each.text).ids) for each in texts.timed(i, needed=False))
    if inputs.image_size:
        return Measured([longest], 1, 0, inputs.frames)
    field = WORD_FIELD if inputs.codes else FRAME_FIELD
    number = region_count(shards.head(i, field, HEAD))
    if number is None:
        number = len(read_arrays(shards.read(i, (field,))[field], ("times",))["times"])
    return Measured([longest], 1, 0, max(1, min(number, inputs.frames)))


def _regions(shards: Shards, i: int, most: int) -> int:
    """How many regions are read, from the first bytes of the file where they tell. ValueError if it is broken."""
    number = region_count(shards.head(i, REGION_FIELD, HEAD))
    if number is None:
        number = len(read_arrays(shards.read(i, (REGION_FIELD,))[REGION_FIELD], ("boxes",))["boxes"])
    return max(1, min(number, most))


def region_count(head: bytes) -> int | None:
    """R of a regions.npz by its first bytes, where its first array has a row per region; None if they do not tell. So
    for the frames of a frames.npz or visual_words.npz."""
    if head[:4] != b"PK\x03\x04" or len(head) < 30:
        return None
    packing, name_size, extra_size = (*struct.unpack("<H", head[8:10]), *struct.unpack("<HH", head[26:30]))
    name, content = head[30 : 30 + name_size].decode("latin-1"), head[30 + name_size + extra_size :]
    if name.removesuffix(".npy") not in ("features", "boxes", "class_probs", "times", "codes", *BY_REGION):
        return None
    try:
        opened = BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, HEAD) if packing else content)
        return int(read_header(opened)[0][0])
    except (ValueError, IndexError, zlib.error):
        return None


def _patches(shards: Shards, i: int, reading: Reading) -> int:
    """Patches of a square picture; cells of one that keeps its shape."""
    if reading.keep_ratio is None:
        return (reading.inputs.image_size // PATCH) ** 2
    field = picture_field(shards.fields(i))
    if field is None:
        raise ValueError("no picture")
    width, height = picture_size(shards.read(i, (field,))[field])
    sides = reading.keep_ratio.size(height, width)
    return max(1, sides[0] // CELL) * max(1, sides[1] // CELL)


class Shapes:
    """The words and what is seen of the samples at positions, as `data.assemble` will put them together."""

    def __init__(
        self,
        lengths: Lengths,
        order: Order,
        seed: int,
        views: Mapping[str, Views],
        inputs: Inputs,
    ) -> None:
        """`order` and `seed` as the loader's, `views` by task."""
        self._lengths, self.order, self._seed, self._views = lengths, order, seed, views
        self._tags, self._longest = inputs.tags, inputs.text_length
        self._asks = any(each.answers for each in views.values())

    def own(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """(words [N], seen [N]) where every sample keeps its own: what is known before the task is."""
        return self._shapes(positions, Views(), self._asks)

    def __call__(self, positions: Numbers, task: str) -> tuple[Numbers, Numbers]:
        """(words [N], seen [N]) in a step of `task`, which may pair samples with parts of others."""
        return self._shapes(positions, self._views[task], self._views[task].answers is not None)

    def _shapes(self, positions: Numbers, views: Views, questions: bool) -> tuple[Numbers, Numbers]:
        own = self.order(positions)
        words = tags = picture = foreign = own
        told = np.zeros(len(own), dtype=bool)  # whose tags are another's words
        if views.mismatch:
            draws = ManyDraws(self._seed, positions, "pairs.mismatch")
            swapped = draws.random() < views.mismatch.prob
            foreign = np.where(swapped, self._other(own, draws), own)
            if views.mismatch.replace == "text":
                words = tags = foreign
            else:
                picture = foreign
        if views.swap_tags:
            draws = ManyDraws(self._seed, positions, "pairs.swap_tags")
            chance, either = draws.random(), draws.random()
            other = self._other(own, draws)
            swap = views.swap_tags
            of_words, of_tags = chance < swap.words, (chance >= swap.words) & (chance < swap.words + swap.tags)
            words, tags = np.where(of_words, other, words), np.where(of_tags, other, tags)
            foreign = np.where(of_words | of_tags, other, foreign)
            told = of_tags & (swap.source == "either") & (either < 0.5)
        length = self._text(words, positions, "caption", questions)
        if self._tags:
            named = self._lengths.tags[tags].astype(np.int64)
            if told.any():
                named = np.where(told, self._text(foreign, positions, "tags", questions), named)
            length = np.minimum(length + named - 1, self._longest)  # one [CLS] for both: `data.tags`
        return length, self._lengths.seen[picture].astype(np.int64)

    def _text(self, samples: Numbers, positions: Numbers, stream: str, questions: bool) -> Numbers:
        return self._lengths.of_text(samples, ManyDraws(self._seed, positions, stream), questions)

    def _other(self, own: Numbers, draws: ManyDraws) -> Numbers:
        """Any sample but `own`, as `data.assemble` draws it."""
        count = len(self._lengths.seen)
        drawn = draws.integers(np.full(len(own), max(1, count - 1)))
        other: Numbers = (drawn + (drawn >= own)) % count
        return other
