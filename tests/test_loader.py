from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.shard_files import INPUTS, make_tokenizer, png, sample, shared, write_samples
from vlscale.data.batches import Even
from vlscale.data.loader import Loader
from vlscale.data.micro_batches import Preprocessing
from vlscale.data.order import Order, Source, TaskOrder
from vlscale.data.retrieval import retrieval_batches
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.data.views import parse
from vlscale.ds_config import accumulation_steps
from vlscale.errors import ConfigError, DataError
from vlscale.types import Batch

# Python 3.12 warns of every fork from a process with threads; torch's workers are forked
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
]

COUNT, BATCH = 20, 8
EVERYTHING: dict[str, dict[str, dict[str, Any]]] = {
    "visual.clean": {"random_resized_crop": {}, "flip": {}, "rand_augment": {}},
    "text.clean": {},
    "text.masked": {"mask_tokens": {"prob": 0.4}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("loader")
    listed = {3: sample(3, ["a red thing", "a blue thing number 3", "a green thing"])}
    return Shards(write_samples(folder / "shards", COUNT, 7, listed), folder / "cache")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("vocab"))


def make_loader(shards: Shards, tokenizer: Tokenizer, **other: Any) -> Loader:
    options = {"batch": BATCH, "micro_batch": BATCH, "rank": 0, "world": 1, "workers": 0, "seed": 11} | other
    seed, workers, views = options.pop("seed"), options.pop("workers"), options.pop("views", EVERYTHING)
    preprocessing = Preprocessing({"all": parse(views)}, TaskOrder({"all": 1.0}, seed), seed, max_words=30)
    order = Order([Source("data", (0, len(shards)))], seed)
    return Loader(shards, tokenizer, INPUTS, preprocessing, order, Even(**options), workers)


def contents(batch: Batch) -> list[tuple[Any, ...]]:
    """Each sample of a batch without its padding."""
    rows: list[tuple[Any, ...]] = []
    for i, key in enumerate(batch.keys):
        clean, masked = batch.text["clean"], batch.text["masked"]
        assert masked.labels is not None
        assert torch.equal(clean.mask, masked.mask)
        keep = clean.mask[i]
        texts = (clean.ids[i][keep], masked.ids[i][keep], masked.labels[i][keep])
        pixels = batch.visual["clean"].feats[i].numpy().tobytes()
        row = (key, int(batch.pair_id[i]), *(tuple(text.tolist()) for text in texts))
        rows.append((*row, hashlib.sha256(pixels).hexdigest()))
    return rows


def serve(shards: Shards, tokenizer: Tokenizer, start: int, stop: int, world: int = 1, **other: Any) -> list[Any]:
    """The samples of steps start + 1 .. stop in global order."""
    ranks = [
        list(make_loader(shards, tokenizer, rank=rank, world=world, **other).steps(start, stop))
        for rank in range(world)
    ]
    rows: list[tuple[Any, ...]] = []
    for parts in zip(*ranks, strict=True):
        assert len({step for step, _ in parts}) == 1
        for micro_batches in zip(*(batches for _, batches in parts), strict=True):
            rows.extend(row for batch in micro_batches for row in contents(batch))
    return rows


@pytest.fixture(scope="module")
def expected(shards: Shards, tokenizer: Tokenizer) -> list[Any]:
    return serve(shards, tokenizer, 0, 6)


def test_batches(shards: Shards, tokenizer: Tokenizer) -> None:
    loader = make_loader(shards, tokenizer, micro_batch=4)
    steps = list(loader.steps(2, 4))
    assert [step for step, _ in steps] == [3, 4]
    assert [len(batch) for _, batches in steps for batch in batches] == [4] * 4
    batch = steps[0][1][0]
    feats, text = batch.visual["clean"].feats, batch.text["masked"]
    assert feats.shape == (4, 3, 16, 16)
    assert feats.dtype == torch.uint8
    assert feats.is_contiguous(memory_format=torch.channels_last)
    assert text.mask.dtype == torch.bool
    assert text.labels is not None
    assert (text.ids[~text.mask] == tokenizer.pad).all()
    assert (text.labels[~text.mask] == -100).all()
    assert (text.labels != -100).any(dim=1).all()
    assert (text.ids[:, 0] == tokenizer.cls).all()
    assert batch.text["clean"].labels is None
    assert loader.order.num_samples == COUNT


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 2), (2, 4), (2, 2), (4, 2), (4, 1)])
def test_samples_do_not_depend_on_ranks_or_micro_batch(
    shards: Shards, tokenizer: Tokenizer, expected: list[Any], world: int, micro_batch: int
) -> None:
    assert serve(shards, tokenizer, 0, 6, world=world, micro_batch=micro_batch) == expected


@pytest.mark.parametrize(("workers", "world", "micro_batch"), [(1, 1, 8), (2, 1, 2), (2, 2, 2)])
def test_samples_do_not_depend_on_workers(
    shards: Shards, tokenizer: Tokenizer, expected: list[Any], workers: int, world: int, micro_batch: int
) -> None:
    assert serve(shards, tokenizer, 0, 6, world=world, workers=workers, micro_batch=micro_batch) == expected


def test_each_epoch_serves_every_sample_once(expected: list[Any]) -> None:
    indices = [row[1] for row in expected]
    assert len(indices) == 48
    assert sorted(indices[:COUNT]) == sorted(indices[COUNT : 2 * COUNT]) == list(range(COUNT))
    assert indices[:COUNT] != indices[COUNT : 2 * COUNT]


def test_resuming_goes_on_with_the_same_samples(shards: Shards, tokenizer: Tokenizer, expected: list[Any]) -> None:
    assert serve(shards, tokenizer, 3, 6) == expected[3 * BATCH :]


WORDS: dict[str, dict[str, Any]] = {"text.clean": {}}  # nothing to decode, so that many ranks and workers are quick


def keys_of(shards: Shards, tokenizer: Tokenizer, steps: tuple[int, int], world: int, **other: Any) -> list[str]:
    """The keys of the samples of steps first + 1 .. last, in global order."""
    found: list[tuple[int, str]] = []
    for rank in range(world):
        loader = make_loader(shards, tokenizer, rank=rank, world=world, views=WORDS, batch=24, **other)
        for _, batches in loader.steps(*steps):
            found += [pair for batch in batches for pair in zip(batch.positions, batch.keys, strict=True)]
    assert [position for position, _ in sorted(found)] == list(range(24 * steps[0], 24 * steps[1]))
    return [key for _, key in sorted(found)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """240 samples of words: ten steps of 24 an epoch."""
    folder = tmp_path_factory.mktemp("many")
    return Shards(write_samples(folder / "shards", 240, 60, {}), folder / "cache")


def ledger(keys: list[str]) -> str:
    """A hash over the keys of three epochs, in each of which every sample stands once."""
    assert len(keys) == 720
    assert all(len(set(keys[epoch : epoch + 240])) == 240 for epoch in (0, 240, 480))
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_epochs_for_any_ranks_workers_and_micro_batch(many: Shards, tokenizer: Tokenizer) -> None:
    hashes = {
        (world, workers, micro_batch): ledger(
            keys_of(many, tokenizer, (0, 30), world, workers=workers, micro_batch=micro_batch)
        )
        for world in (1, 2, 4)
        for workers in (0, 1, 2, 4)
        for micro_batch in (1, 2, 3, 6, 12, 24)
        if 24 % (micro_batch * world) == 0 and (workers == 0 or micro_batch in (2, 6))
    }
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.parametrize(("first", "then", "back"), [(4, 2, 4), (4, 1, 4), (2, 4, 1)])
def test_resume_anywhere_on_other_ranks(many: Shards, tokenizer: Tokenizer, first: int, then: int, back: int) -> None:
    whole = keys_of(many, tokenizer, (0, 30), 1, micro_batch=24)
    ledger(whole)
    for cut in np.random.default_rng(first).choice(np.arange(1, 29), 7, replace=False).tolist():
        parts = [(0, cut, first, 6), (cut, cut + 1, then, 2), (cut + 1, 30, back, 1)]
        series = [
            key
            for start, stop, world, micro_batch in parts
            for key in keys_of(many, tokenizer, (start, stop), world, micro_batch=micro_batch)
        ]
        assert series == whole


def test_resuming_is_at_once(many: Shards, tokenizer: Tokenizer) -> None:
    loader = make_loader(many, tokenizer, views=WORDS)
    started = time.monotonic()
    step, _ = next(loader.steps(10**9, 10**9 + 2))
    assert step == 10**9 + 1
    assert time.monotonic() - started < 1


def test_seeds_differ_and_so_do_epochs(shards: Shards, tokenizer: Tokenizer, expected: list[Any]) -> None:
    assert serve(shards, tokenizer, 0, 6, seed=12) != expected
    by_sample: dict[int, set[Any]] = {}
    for row in expected[: 2 * COUNT]:
        by_sample.setdefault(row[1], set()).add(row[-1])
    assert sum(len(pictures) == 2 for pictures in by_sample.values()) > COUNT / 2


def test_one_of_several_captions_is_drawn(shards: Shards, tokenizer: Tokenizer) -> None:
    loader = make_loader(shards, tokenizer)
    rows = [row for _, (batch,) in loader.steps(0, 100) for row in contents(batch) if row[0] == "s003"]
    counts = sorted([row[2] for row in rows].count(text) for text in {row[2] for row in rows})
    assert len(counts) == 3
    assert counts[0] >= 5


def test_nothing_is_left_behind_when_closed(shards: Shards, tokenizer: Tokenizer) -> None:
    for workers in (0, 2):
        steps = make_loader(shards, tokenizer, workers=workers, micro_batch=2).steps(0, 1000)
        next(steps)
        assert len(multiprocessing.active_children()) == workers
        steps.close()
        assert multiprocessing.active_children() == []
        assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


class Stuck(Shards):
    """Nothing comes of sample 5 before somebody writes into `waiting` beside the shards."""

    def read(self, i: int, only: Collection[str] | None = None) -> dict[str, bytes]:
        if i == 5:
            (Path(self.paths[0]).parent / "waiting").read_bytes()
        return super().read(i, only)

    def key(self, i: int) -> str:
        return f"\x1b{super().key(i)}"  # not for a terminal


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_that_hangs_is_known_by_its_sample(tokenizer: Tokenizer, workers: int, tmp_path: Path) -> None:
    stuck = Stuck(write_samples(tmp_path / "shards", COUNT, 7, {}), tmp_path / "cache")
    waiting = tmp_path / "shards" / "waiting"
    os.mkfifo(waiting)
    loader = make_loader(stuck, tokenizer, workers=workers)
    assert loader.working()[0].endswith(" idle")
    reader = threading.Thread(target=list, args=(loader.steps(0, -(-COUNT // BATCH)),), daemon=True)  # an epoch
    reader.start()
    who = "loader worker 0" if workers else "the loader's thread"
    expected = [f"{who} at sample \\x1b{stuck.key(5)[1:]} of {stuck.shard(5)}"]
    end = time.monotonic() + 60
    while loader.working() != expected and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.1)
    assert loader.working() == expected
    held = waiting.rename(tmp_path / "held")
    waiting.touch()
    held.write_bytes(b"")  # it goes on
    reader.join(60)
    assert not reader.is_alive()


def test_workers_are_out_of_the_process_group(shards: Shards, tokenizer: Tokenizer) -> None:
    steps = make_loader(shards, tokenizer, workers=1).steps(0, 1000)
    next(steps)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)
    steps.close()


@pytest.mark.parametrize(
    ("batch", "micro_batch", "world", "says"),
    [
        (
            100,
            16,
            4,
            "data.batch=100 is not a multiple of data.micro_batch=16 times 4 ranks; write .*=64 or 128",
        ),
        (3, 2, 2, "write data.batch=4"),
        (0, 2, 2, "both should be at least 1"),
    ],
)
def test_a_batch_that_does_not_split_is_refused(batch: int, micro_batch: int, world: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        accumulation_steps(batch, micro_batch, world)


# --- bad samples -------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Shards:
    """Sample 5 does not decode, and 6, its stand-in, has no caption."""
    special = {5: sample(5, picture=png(5)[:300]), 6: sample(6, "")}
    return Shards(write_samples(tmp_path / "shards", COUNT, 7, special), tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_replaced_counted_and_named(damaged: Shards, tokenizer: Tokenizer, workers: int) -> None:
    loader = make_loader(damaged, tokenizer, workers=workers, batch=COUNT, micro_batch=COUNT)
    (_, (batch,)), _ = loader.steps(0, 2)
    assert sorted(batch.pair_id.tolist()) == sorted([*(i for i in range(COUNT) if i not in (5, 6)), 7, 7])
    assert loader.bad_samples == 2 * 3  # in each epoch 5, then 6 twice
    taken = loader.take_bad()
    assert len(taken) == 2 * 3
    assert {(Path(bad.shard).name, bad.key) for bad in taken} == {("part-000.tar", "s005"), ("part-000.tar", "s006")}
    assert any("picture in 'png' cannot be decoded" in bad.reason for bad in taken)
    assert any("caption in 'json' is empty" in bad.reason for bad in taken)
    assert loader.take_bad() == []


def test_replacements_do_not_depend_on_ranks(damaged: Shards, tokenizer: Tokenizer) -> None:
    assert serve(damaged, tokenizer, 0, 3, world=2, micro_batch=2) == serve(damaged, tokenizer, 0, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_usable_sample_end_the_run(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    special = {i: sample(i, picture=b"no picture") for i in range(8)}
    shards = Shards(write_samples(tmp_path / "shards", 8, 8, special), tmp_path / "cache")
    loader = make_loader(shards, tokenizer, workers=workers)
    with pytest.raises(DataError, match=r"^100 samples in a row cannot be used; the last one: sample 's"):
        list(loader.steps(0, 1))
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_state(damaged: Shards, shards: Shards, tokenizer: Tokenizer) -> None:
    loader = make_loader(damaged, tokenizer)
    list(loader.steps(0, 3))
    state = json.loads(json.dumps(loader.state()))
    again = make_loader(damaged, tokenizer)
    again.load_state(state)
    assert again.bad_samples == loader.bad_samples > 0
    assert len(json.dumps(state)) < 1_000
    with pytest.raises(DataError, match=r"data.train \(20 samples\) are not those the run began with"):
        make_loader(shards, tokenizer).load_state(state)
    with pytest.raises(DataError, match="of another version of vlscale"):
        again.load_state({key: value for key, value in state.items() if key != "order"})
    with pytest.raises(ConfigError, match="seed=5 is not the run's; write seed=11"):
        make_loader(damaged, tokenizer, seed=5).load_state(state)


# --- retrieval ---------------------------------------------------------------------------------------------


def retrieve(shards: Shards, tokenizer: Tokenizer, rank: int, world: int, batch: int, limit: int = 0) -> list[Any]:
    options: dict[str, Any] = {"rank": rank, "world": world, "batch": batch, "limit": limit}
    return list(retrieval_batches(shards, tokenizer, INPUTS, max_words=30, **options))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_retrieval_covers_every_picture_and_caption_once(shards: Shards, tokenizer: Tokenizer, world: int) -> None:
    ranks = [retrieve(shards, tokenizer, rank, world, batch=3) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for part in ranks for batch in part]
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(COUNT))
    owners = sorted(i for batch in batches for i in batch.owner.tolist())
    assert owners == sorted([*range(COUNT), 3, 3])
    for batch in batches:
        assert 1 <= len(batch.index) <= 3
        assert batch.text.ids.shape[0] == len(batch.owner)
        assert batch.visual.feats.shape == (len(batch.index), 3, 16, 16)
        assert set(batch.owner.tolist()) == set(batch.index.tolist())


def test_retrieval_limit_and_bad_pictures(damaged: Shards, tokenizer: Tokenizer) -> None:
    batches = retrieve(damaged, tokenizer, 0, 1, batch=4, limit=10)
    assert [i for batch in batches for i in batch.index.tolist()] == [0, 1, 2, 3, 4, 7, 8, 9]


def test_real_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = shared() / "open"
    names = [str(folder / name / f"{name}-val-*.tar") for name in ("openstax_figures", "noto_emoji")]
    loader = make_loader(Shards(names, tmp_path), tokenizer, batch=16, micro_batch=16)
    batches = [batch for _, (batch,) in loader.steps(0, 3)]
    assert loader.take_bad() == []
    assert len({key for batch in batches for key in batch.keys}) == 48
    assert all(np.isin(batch.text["masked"].ids.numpy(), range(tokenizer.vocab_size)).all() for batch in batches)
