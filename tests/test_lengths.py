from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shard_files import Members, make_tokenizer, png, write_tar
from vlscale.data.augment import KeepRatio
from vlscale.data.detections import Detections, write_regions
from vlscale.data.lengths import Lengths, Measured, Reading, Shapes, measure, measure_one, region_count
from vlscale.data.micro_batches import MicroBatches, Preprocessing
from vlscale.data.order import Draws, Order, Source, TaskOrder
from vlscale.data.philox import ManyDraws
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.data.views import parse
from vlscale.errors import ConfigError
from vlscale.types import Batch, Inputs

COUNT = 40
INPUTS = Inputs(0, 12, True, regions=6, feats=4, boxes=7, geometry="corners_size_area")
TAGGED = Inputs(0, 12, True, regions=6, feats=4, boxes=7, geometry="corners_size_area", tags=True)


def regions(number: int) -> bytes:
    """Of `number` regions."""
    rng = np.random.default_rng(number)
    return write_regions(
        Detections(
            rng.random((number, 4), np.float32), np.tile(np.array([1, 1, 9, 9], np.float32), (number, 1)), 20, 20
        )
    )


def sample(i: int) -> Members:
    captions = [" ".join(["red"] * (1 + (3 * i + each) % 11)) for each in range(1 + i % 3)]
    record = {"caption": captions, "tags": ["blue"] * (i % 5), "qa": [{"q": "a red thing", "a": "red"}] * (i % 2)}
    return [(f"s{i:03d}.json", json.dumps(record).encode()), (f"s{i:03d}.regions.npz", regions(1 + i % 8))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("lengths")
    return Shards(write_tar(folder / "a.tar", [member for i in range(COUNT) for member in sample(i)]), folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("vocabulary"), INPUTS)


def shown(batch: Batch) -> tuple[list[int], list[int]]:
    """(words, regions) of each sample of a micro-batch."""
    regions = batch.visual["clean"].mask
    assert regions is not None
    return batch.text["clean"].mask.sum(dim=1).tolist(), regions.sum(dim=1).tolist()


@pytest.mark.parametrize(
    ("inputs", "pairs"),
    [
        (INPUTS, {}),
        (INPUTS, {"pairs.answers": {}}),
        (INPUTS, {"pairs.mismatch": {"prob": 0.5, "replace": "picture"}}),
        (INPUTS, {"pairs.mismatch": {"prob": 0.5, "replace": "text"}, "pairs.answers": {}}),
        (TAGGED, {}),
        (TAGGED, {"pairs.swap_tags": {"tags": 0.5, "source": "either"}}),
        (TAGGED, {"pairs.swap_tags": {"tags": 0.3, "words": 0.3}, "pairs.mismatch": {"prob": 0.3}}),
    ],
)
def test_lengths_at_positions_are_those_of_the_micro_batches(
    shards: Shards, tokenizer: Tokenizer, tmp_path: Path, inputs: Inputs, pairs: Mapping[str, Mapping[str, object]]
) -> None:
    views = {"all": parse({"text.clean": {}, "visual.clean": {}, **pairs}, INPUTS)}
    preprocessing = Preprocessing(views, TaskOrder({"all": 1.0}, 5), 5, answers={"red": 0})
    order = Order([Source("data", (0, COUNT))], 5)
    positions = np.arange(3 * COUNT)
    loaded = MicroBatches(shards, tokenizer, inputs, preprocessing, order)(positions, "all")
    assert loaded.batch is not None, loaded.error

    lengths = measure(shards, tokenizer, "vocabulary", Reading(inputs, 0, questions="pairs.answers" in pairs), tmp_path)
    words, seen = Shapes(lengths, order, 5, views, inputs)(positions, "all")
    assert (words.tolist(), seen.tolist()) == shown(loaded.batch)
    assert len(set(words.tolist())) > 5
    assert len(set(seen.tolist())) > 4


def test_own_lengths_leave_out_what_a_task_swaps(shards: Shards, tokenizer: Tokenizer, tmp_path: Path) -> None:
    order = Order([Source("data", (0, COUNT))], 0)
    lengths = measure(shards, tokenizer, "vocabulary", Reading(INPUTS, 0), tmp_path)
    swapped = {"all": parse({"pairs.mismatch": {"prob": 1.0, "replace": "picture"}}, INPUTS)}
    shapes, positions = Shapes(lengths, order, 0, swapped, INPUTS), np.arange(COUNT)
    assert shapes.own(positions)[1].tolist() == [min(6, 1 + i % 8) for i in order(positions).tolist()]
    assert shapes(positions, "all")[1].tolist() != shapes.own(positions)[1].tolist()


def test_a_clip_counts_with_its_longest_sentence_and_all_its_frames(tmp_path: Path) -> None:
    def clip(i: int) -> Members:
        said = [{"start": k, "end": k + 1, "text": " ".join(["red"] * (k + i))} for k in range(1, 4)]
        packed, plain = BytesIO(), BytesIO()
        np.savez_compressed(packed, features=np.zeros((2 + i, 3), np.float16), times=np.arange(2 + i))
        np.savez(plain, other=np.zeros(1), features=np.zeros((2 + i, 3)), times=np.arange(2 + i))
        data = (packed, plain)[i % 2].getvalue()
        return [(f"s{i}.json", json.dumps({"sentences": said}).encode()), (f"s{i}.frames.npz", data)]

    members = [*(member for i in range(8) for member in clip(i)), ("s8.json", b"{}")]
    shards = Shards(write_tar(tmp_path / "a.tar", members), tmp_path)
    inputs = Inputs(0, 9, True, feats=3, frames=7)
    lengths = measure(shards, make_tokenizer(tmp_path, inputs), "vocabulary", Reading(inputs, 0), tmp_path / "lengths")
    assert lengths.texts.tolist() == [*(min(9, 5 + i) for i in range(8)), 2]  # special tokens counted
    assert lengths.seen.tolist() == [*(min(7, 2 + i) for i in range(8)), 2]  # the last is broken


def test_pictures_that_keep_their_shape_count_their_cells(tmp_path: Path) -> None:
    inputs = Inputs(64, 12, False, any_size=True)
    members = [
        (f"s{i}.{end}", data) for i in range(3) for end, data in (("json", b'{"caption": "a"}'), ("png", png(i, 30)))
    ]
    shards = Shards(write_tar(tmp_path / "a.tar", members), tmp_path)
    reading = Reading(inputs, 0, keep_ratio=KeepRatio(short=130, long=200))
    vocabulary = make_tokenizer(tmp_path, inputs)
    assert measure(shards, vocabulary, "", reading, tmp_path).seen.tolist() == [4, 4, 4]  # 130 x 130 pixels
    assert measure(shards, vocabulary, "", Reading(inputs, 0), tmp_path).seen.tolist() == [16, 16, 16]  # of 16 x 16


def test_a_sample_that_cannot_be_used_does_not_end_the_measuring(tokenizer: Tokenizer, tmp_path: Path) -> None:
    broken = [("s1.json", b"{"), ("s1.regions.npz", regions(2)), ("s2.json", b'{"caption": "a"}'), ("s3.txt", b"a red")]
    shards = Shards(write_tar(tmp_path / "a.tar", [*sample(7), *broken, ("s3.regions.npz", b"PK\x03\x04")]), tmp_path)
    lengths = measure(shards, tokenizer, "", Reading(INPUTS, 0), tmp_path)
    assert lengths.seen.tolist() == [6, 2, 2, 2]
    assert np.diff(lengths.first).tolist() == [2, 1, 1, 1]


def test_the_first_bytes_of_a_file_tell_its_regions(tmp_path: Path) -> None:
    assert region_count(regions(3)[:1024]) == 3
    assert region_count(b"") is None
    assert region_count(regions(3)[:60]) is None
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, boxes=np.zeros((5, 4)), features=np.zeros((5, 2)))
    assert region_count(packed.read_bytes()[:1024]) == 5
    np.savez(packed, width=np.array(3), boxes=np.zeros((5, 4)))
    assert region_count(packed.read_bytes()[:1024]) is None


def test_measured_once_for_the_same_question(
    shards: Shards, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(shards, tokenizer, "vocabulary", Reading(INPUTS, 0), tmp_path)
    monkeypatch.setattr("vlscale.data.lengths.measure_one", None)
    again = measure(shards, tokenizer, "vocabulary", Reading(INPUTS, 0), tmp_path)
    assert np.array_equal(first.texts, again.texts)
    for other in (("another vocabulary", Reading(INPUTS, 0)), ("vocabulary", Reading(INPUTS, 3))):
        with pytest.raises(TypeError):
            measure(shards, tokenizer, *other, tmp_path)
    sent = pickle.dumps(first)
    assert len(sent) < 1000, "the arrays stay in their files"
    assert np.array_equal(pickle.loads(sent).seen, first.seen)


@pytest.mark.parametrize("left", [0, 40, 130])
def test_what_a_dead_node_left_is_measured_again(
    shards: Shards, tokenizer: Tokenizer, tmp_path: Path, left: int
) -> None:
    first = measure(shards, tokenizer, "", Reading(INPUTS, 0), tmp_path).seen.tolist()
    os.truncate(next(tmp_path.glob("*/seen.npy")), left)
    assert measure(shards, tokenizer, "", Reading(INPUTS, 0), tmp_path).seen.tolist() == first


@pytest.mark.parametrize("fault", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_faster_of_two_wins(
    shards: Shards, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    def beside(*of: Any) -> Measured:
        if not told:
            told.append(True)
            told.append(measure(shards, tokenizer, "", Reading(INPUTS, 0), tmp_path))
        return measure_one(*of)

    told: list[object] = []
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr("vlscale.data.lengths.measure_one", beside)
    slower = measure(shards, tokenizer, "", Reading(INPUTS, 0), tmp_path)
    assert isinstance(told[1], Lengths)
    assert slower.texts.tolist() == told[1].texts.tolist()
    assert len([each for each in tmp_path.iterdir() if each.is_dir()]) == 1


def _measure_beside(shards: Shards, tokenizer: Tokenizer, cache: Path, out: multiprocessing.Queue[list[int]]) -> None:
    out.put(measure(shards, tokenizer, "", Reading(INPUTS, 0), cache).seen.tolist())


@pytest.mark.slow
def test_processes_that_ask_at_once_find_the_same(shards: Shards, tokenizer: Tokenizer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    out: multiprocessing.Queue[list[int]] = context.Queue()
    processes = [context.Process(target=_measure_beside, args=(shards, tokenizer, tmp_path, out)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [out.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(30)
    assert found == [found[0]] * 3
    assert len([each for each in tmp_path.iterdir() if each.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(
    shards: Shards, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="set VLSCALE_CACHE to a folder that can"):
        measure(shards, tokenizer, "", Reading(INPUTS, 0), tmp_path / "file")


@pytest.mark.parametrize("seed", [0, 42, 2**40])
@pytest.mark.parametrize("bound", [1, 2, 5, 1000, 9_500_001])
def test_many_draws_are_those_of_each_position(seed: int, bound: int) -> None:
    positions = np.concatenate([np.arange(60), 2**40 + np.arange(60)])
    draws, bounds = Draws(seed), np.full(len(positions), bound)
    expected = [(draws(int(each), "caption").integers(bound)) for each in positions]
    assert ManyDraws(seed, positions, "caption").integers(bounds).tolist() == expected
    many, one_by_one = ManyDraws(seed, positions, "pairs.swap_tags"), []
    for each in positions.tolist():
        generator = draws(each, "pairs.swap_tags")
        one_by_one.append((*generator.random(2).tolist(), generator.integers(bound)))
    assert list(zip(many.random(), many.random(), many.integers(bounds), strict=True)) == one_by_one


def test_a_refused_draw_is_drawn_anew_as_numpy_does() -> None:
    positions, bound = np.arange(2_000), 900_000_000  # a fifth of all draws are refused
    draws = Draws(3)
    expected = [draws(int(each), "caption").integers(bound) for each in positions]
    assert ManyDraws(3, positions, "caption").integers(np.full(2_000, bound)).tolist() == expected
