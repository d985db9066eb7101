"""What can go wrong with the data and the disk, looked for in seconds, before the model is built."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlscale.data.bad import Budget
from vlscale.data.clip_files import check_footage, frame_fields
from vlscale.data.clip_windows import Timed
from vlscale.data.phrases import Words, read_sentences, read_timed
from vlscale.data.samples import (
    PICTURE_FIELDS,
    REGION_FIELD,
    TEXT_FIELDS,
    BrokenSampleError,
    picture,
    picture_field,
    regions,
)
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.errors import ConfigError, DataError
from vlscale.types import Inputs

ALL_TEXTS = 50_000  # up to so many samples every text is read
SOME_TEXTS = 1_000  # above, so many drawn ones and the first of each shard
HELD_OUT_TEXTS = 32  # of the validation samples
FETCHED_TEXTS = 100  # of each shard that is looked into, where shards must be fetched
SHARDS_FETCHED = 4  # at most so many of those
SHARDS_DECODED = 32  # at most so many shards must show a picture that decodes
TRIES = 8  # pictures of such a shard
MAX_UNKNOWN = 0.5  # share of [UNK] above which the vocabulary is not the captions'


@dataclass(frozen=True)
class Report:
    """What was found."""

    samples: int
    shards: int
    seconds: float


def check(
    shards: Shards,
    tokenizer: Tokenizer,
    inputs: Inputs,
    *,
    batch: int,
    max_words: int,
    out: Path,
    disk: int,
    questions: bool = False,
    seed: int = 0,
    budget: Budget | None = None,
    texts: bool = True,
) -> Report:
    """Whether a run on these shards can start, and can write checkpoints of `disk` bytes in all to `out`.

    No shard and no member may be empty, samples must number at least `batch`, pictures decode, captions hold
    words that the vocabulary knows, where `texts` are read; of the samples that are looked at, as many may be broken
    as `budget` allows in training (None: none). DataError or ConfigError names the first thing that is wrong.
    """
    began = time.monotonic()
    check_disk(out, disk)
    check_count(shards, batch)
    check_members(shards, inputs)
    looked_at = _looked_at(shards, seed)
    if inputs.frames:
        check_clips(shards, looked_at, inputs, budget)
    elif inputs.image_size:
        check_pictures(shards, looked_at, budget)
    if inputs.regions and not inputs.frames:
        check_regions(shards, looked_at, inputs, inputs.fields, budget)
    if texts:
        check_texts(shards, looked_at, tokenizer, max_words, questions, budget, clips=inputs.frames > 0)
    return Report(len(shards), len(shards.paths), time.monotonic() - began)


def check_held_out(
    shards: Shards,
    tokenizer: Tokenizer,
    inputs: Inputs,
    max_words: int,
    questions: bool = False,
    budget: Budget | None = None,
    texts: bool = True,
) -> None:
    """Whether validation shards can be used, by their first samples; raises as `check`."""
    check_count(shards, 1)
    check_members(shards, inputs)
    looked_at = range(min(len(shards), HELD_OUT_TEXTS))
    if inputs.frames:
        check_clips(shards, looked_at, inputs, budget)
    elif inputs.image_size:
        check_pictures(shards, looked_at, budget)
    if texts:
        check_texts(shards, looked_at, tokenizer, max_words, questions, budget, clips=inputs.frames > 0)


def check_count(shards: Shards, batch: int) -> None:
    """DataError for a shard without samples, or fewer samples than one step takes."""
    for n, path in enumerate(shards.paths):
        if shards.start(n) == shards.start(n + 1):
            raise DataError(f"shard {path} holds no samples; leave it out or make it again")
    if len(shards) < batch:
        raise DataError(
            f"data.train holds {len(shards)} samples but a step takes {batch}; "
            f"name more shards or write data.batch={len(shards)} or less"
        )


def check_members(shards: Shards, inputs: Inputs) -> None:
    """DataError for an empty member of a field that the family reads; by the index, so that nothing is read."""
    visual = (*(PICTURE_FIELDS if inputs.image_size else ()), *((REGION_FIELD,) if inputs.regions else ()))
    visual = frame_fields(inputs) if inputs.frames else visual
    empty = [
        (i, field)
        for i, field in shards.empty_members({*visual, *TEXT_FIELDS})
        if field != "txt" or "json" not in shards.fields(i)  # with a json, a txt is seldom asked
    ]
    if empty:
        i, field = empty[0]
        others = f", and {len(empty) - 1} more members are" if len(empty) > 1 else ""
        raise DataError(
            f"'{field}' of sample '{shards.key(i)}' of shard {shards.shard(i)} is empty{others}; "
            "make the shards again without such samples"
        )


def check_pictures(shards: Shards, looked_at: Sequence[int], budget: Budget | None = None) -> None:
    """DataError for too many samples without a picture, or a shard whose first pictures do not decode."""
    without = [i for i in looked_at if picture_field(shards.fields(i)) is None]
    for n in _some_shards(shards):
        _one_can_be_read(shards, n, partial(picture, shards))
    _check_number(without, len(looked_at), budget, partial(picture, shards))


def check_clips(shards: Shards, looked_at: Sequence[int], inputs: Inputs, budget: Budget | None = None) -> None:
    """DataError for too many samples without a clip, or without its features or visual words where those are read, or
    a shard whose first ones cannot be used."""
    fields = frame_fields(inputs)
    without = [i for i in looked_at if not any(field in shards.fields(i) for field in fields)]
    read = partial(check_footage, shards, inputs=inputs)
    for n in _some_shards(shards):
        _one_can_be_read(shards, n, read)
    _check_number(without, len(looked_at), budget, read)


def check_regions(
    shards: Shards, looked_at: Sequence[int], inputs: Inputs, wanted: frozenset[str], budget: Budget | None = None
) -> None:
    """DataError for too many samples without regions, or a shard whose first are broken or lack a `wanted` field."""
    without = [i for i in looked_at if REGION_FIELD not in shards.fields(i)]
    for n in _some_shards(shards):
        _one_can_be_read(shards, n, partial(_regions, shards, inputs, wanted))
    _check_number(without, len(looked_at), budget, partial(_regions, shards, inputs, wanted))


def _regions(shards: Shards, inputs: Inputs, wanted: frozenset[str], i: int) -> None:
    regions(shards, i, inputs, wanted)


def _check_number(broken: Sequence[int], looked_at: int, budget: Budget | None, read: Callable[[int], object]) -> None:
    """DataError if these samples, at which `read` raises, are more than the budget allows of those looked at."""
    if not broken or (budget and not budget.spent(len(broken), looked_at)):
        return
    try:
        read(broken[0])
    except BrokenSampleError as error:
        if budget is None:
            raise
        key, value = budget.limit(looked_at)
        enough = math.ceil(1_000 * len(broken) / looked_at) / 1_000
        raise DataError(
            f"{len(broken)} of the {looked_at} samples looked at cannot be used, more than {key}={value:g} allows; "
            f"the first: {error}; make the shards again without such samples, or write data.bad_budget={enough:g}"
        ) from error


def _some_shards(shards: Shards) -> list[int]:
    most = SHARDS_FETCHED if shards.remote else SHARDS_DECODED
    chosen: list[int] = np.unique(np.linspace(0, len(shards.paths) - 1, most).astype(int)).tolist()
    return chosen


def _one_can_be_read(shards: Shards, n: int, read: Callable[[int], object]) -> None:
    """A broken sample is skipped in training; when all that were tried are broken, the shard is."""
    tried = range(shards.start(n), min(shards.start(n) + TRIES, shards.start(n + 1)))
    last: BrokenSampleError | None = None
    for i in tried:
        try:
            read(i)
            return
        except BrokenSampleError as error:
            last = error
    if last is not None:
        raise DataError(f"none of the first {len(tried)} samples of a shard can be used; the last: {last}")


def check_texts(
    shards: Shards,
    looked_at: Sequence[int],
    tokenizer: Tokenizer,
    max_words: int,
    questions: bool = False,
    budget: Budget | None = None,
    clips: bool = False,
) -> None:
    """DataError for too many captions (of `clips`: sentences) that are missing or empty, or a shard whose first ones
    are; ConfigError if the vocabulary knows too few words.
    """
    known: list[NDArray[np.bool_]] = []
    broken: list[int] = []
    read: Callable[[int], Sequence[Words | Timed]] = partial(
        read_sentences, shards, max_words=max_words, questions=questions
    )
    if clips:
        read = partial(read_timed, shards, max_words=max_words)
    for n in _some_shards(shards) if budget else ():
        _one_can_be_read(shards, n, read)
    for i in looked_at:
        try:
            texts = read(i)
        except BrokenSampleError:
            broken.append(i)
            continue
        if len(known) < SOME_TEXTS:
            known += [tokenizer.known(words.text) for words in texts]
    _check_number(broken, len(looked_at), budget if known else None, read)
    unknown = 1 - float(np.concatenate(known).mean())
    if unknown > MAX_UNKNOWN:
        raise ConfigError(
            f"the vocabulary does not know {unknown:.0%} of the captions' words; "
            "write text.vocab=null to build one from the captions, or the path of one in their language"
        )


def check_disk(out: Path, needed: int) -> None:
    """ConfigError if the file system of `out` has less than `needed` bytes free."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{out} has {free / 2**30:.1f} GiB free but the checkpoints need {needed / 2**30:.1f} GiB; "
            "write another --out, or a smaller checkpoint.keep or greater checkpoint.keep_every"
        )


def _looked_at(shards: Shards, seed: int) -> list[int]:
    """The samples whose texts are read: all, or the first of each shard and some drawn ones.

    Of shards that must be fetched, the first of the few that are looked into.
    """
    if shards.remote:
        spans = ((shards.start(n), shards.start(n + 1)) for n in _some_shards(shards))
        return [i for first, end in spans for i in range(first, min(first + FETCHED_TEXTS, end))]
    if len(shards) <= ALL_TEXTS:
        return list(range(len(shards)))
    firsts = [shards.start(n) for n in range(len(shards.paths))]
    drawn = np.random.default_rng(seed).choice(len(shards), SOME_TEXTS, replace=False)
    return sorted({*firsts, *drawn.tolist()})
