from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.shard_files import shared
from vlscale.data.balance import cut, deal
from vlscale.data.batches import BUCKET, Balanced, Batching, Spread, TokenBuckets, bucket_batches, fewest
from vlscale.data.lengths import Lengths, Shapes
from vlscale.data.order import Order, Source, TaskOrder
from vlscale.data.shuffle import Numbers
from vlscale.data.views import parse
from vlscale.errors import ConfigError
from vlscale.types import Inputs

INPUTS = Inputs(0, 62, True, regions=100)
ONE_TASK = TaskOrder({"all": 1.0}, 0)


def uniter_like(count: int, seed: int = 0) -> tuple[Numbers, Numbers]:
    """(words, regions): 10 to 40 words, most of them few; 10 to 100 regions (UNITER keeps so many, some 40)."""
    rng = np.random.default_rng(seed)
    words = np.clip(np.round(rng.lognormal(np.log(14), 0.35, count)), 10, 40)
    regions = np.clip(np.round(rng.gamma(3.0, 13.0, count)), 10, 100)
    return words.astype(np.int64), regions.astype(np.int64)


def shapes_of(folder: Path, words: Numbers, seen: Numbers, seed: int = 0, mismatch: bool = False) -> Shapes:
    """Of samples with one caption each."""
    count = len(words)
    columns = {"texts": words, "captions": np.ones(count), "tags": np.zeros(count), "seen": seen}
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column.astype(np.int16))
    np.save(folder / "first.npy", np.arange(count + 1))
    views = parse({"pairs.mismatch": {"prob": 0.5, "replace": "picture"}} if mismatch else {}, INPUTS)
    return Shapes(Lengths(folder), Order([Source("data", (0, count))], seed), seed, {"all": views}, INPUTS)


def micro_batches(batching: Batching, step: int) -> list[Numbers]:
    return [batching(step, number) for number in range(batching.per_step)]


def padded(words: Numbers, seen: Numbers) -> int:
    return len(words) * int(words.max() + seen.max())


# --- balance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "per_rank"), [(3_264, 6), (2_560, 8)])  # uniter_base and uniter_large on 8 ranks
@pytest.mark.parametrize("mismatch", [False, True])
def test_little_is_padded_and_ranks_carry_the_same(tmp_path: Path, batch: int, per_rank: int, mismatch: bool) -> None:
    world, pool = 8, 64
    words, seen = uniter_like(pool * batch)
    shapes = shapes_of(tmp_path, words, seen, mismatch=mismatch)
    balanced = Balanced(shapes, ONE_TASK, Spread(per_rank, 0, world, 0), batch=batch, pool=pool, runs=16)
    useful = paid = 0
    for step in (1, 17, 40, 64):
        found = [shapes(each, "all") for each in balanced.micro_batches(step, per_rank * world)]
        cost = np.array([padded(*each) for each in found])
        useful += sum(int(each[0].sum() + each[1].sum()) for each in found)
        paid += int(cost.sum())
        ranks = cost.reshape(per_rank, world).sum(axis=0)
        assert ranks.max() <= 1.05 * ranks.mean(), "between ranks"
        waited = cost.reshape(per_rank, world).max(axis=1).sum()
        assert waited <= 1.05 * cost.sum() / world, "if ranks wait for one another at each micro-step"
        assert cost.max() <= 1.05 * cost.mean(), "between any two micro-batches"
    assert useful / paid >= 0.95
    even = sum(padded(*shapes.own(np.arange(first, first + 200))) for first in range(0, 9_600, 200))
    assert sum(map(np.sum, shapes.own(np.arange(9_600)))) / even < 0.5, "what batches of equal number have"


def test_steps_have_like_lengths_and_all_lengths() -> None:
    words, seen = uniter_like(64 * 960)
    dealt = deal(words, seen, 64, 16, np.random.default_rng(0))
    assert np.array_equal(np.sort(dealt.ravel()), np.arange(64 * 960))
    length = words + seen
    means = length[dealt].mean(axis=1)
    assert means.max() / means.min() < 1.05
    for quantile in (0.1, 0.5, 0.9):
        shorter = (length[dealt] < np.quantile(length, quantile)).mean(axis=1)
        assert np.allclose(shorter, quantile, atol=0.14), "but for a run"


@pytest.mark.parametrize("count", [7, 8, 50])
def test_each_micro_batch_has_a_sample(count: int) -> None:
    words, seen = uniter_like(count)
    made = cut(words, seen, 7)
    assert sorted(np.concatenate(made).tolist()) == list(range(count))
    assert all(len(each) for each in made)
    cost = [padded(words[each], seen[each]) for each in made]
    assert cost == sorted(cost, reverse=True)


@pytest.mark.parametrize("shapes", [1, 3, 100])
def test_a_small_step_is_dealt_whole(shapes: int) -> None:
    words, seen = np.array([5, 5, 5, 90, 90, 91]), np.full(6, 10)
    dealt = deal(words, seen, 2, shapes, np.random.default_rng(0))
    assert dealt.shape == (2, 3)
    assert sorted(dealt.ravel().tolist()) == list(range(6))


# --- data.batching=cost ------------------------------------------------------------------------------------


def balanced(shapes: Shapes, per_step: int, rank: int, world: int, pool: int) -> Balanced:
    return Balanced(shapes, ONE_TASK, Spread(per_step, rank, world, 0), batch=48, pool=pool, runs=4)


@pytest.mark.parametrize("pool", [1, 4])
def test_samples_of_a_step_depend_on_neither_ranks_nor_micro_batches(tmp_path: Path, pool: int) -> None:
    shapes = shapes_of(tmp_path, *uniter_like(500))
    series = {}
    for per_step, world in ((1, 1), (6, 1), (3, 2), (2, 4), (1, 8), (16, 3)):
        ranks = [balanced(shapes, per_step, rank, world, pool) for rank in range(world)]
        series[per_step, world] = [
            np.sort(np.concatenate([each for rank in ranks for each in micro_batches(rank, step)])).tolist()
            for step in range(1, 9)
        ]
    first = series.pop((1, 1))
    assert all(other == first for other in series.values())
    assert sorted(np.concatenate(first).tolist()) == list(range(8 * 48)), "each position once"
    assert (first[0] == list(range(48))) == (pool == 1)
    assert balanced(shapes, 1, 0, 1, pool).served(8) == 8 * 48


def test_a_micro_batch_is_found_in_any_order_by_any_process(tmp_path: Path) -> None:
    shapes = shapes_of(tmp_path, *uniter_like(500), mismatch=True)
    one = balanced(shapes, 3, 1, 2, pool=4)
    forward = [micro_batches(one, step) for step in range(1, 12)]
    other = pickle.loads(pickle.dumps(balanced(shapes, 3, 1, 2, pool=4)))
    for step in (11, 2, 7, 1):
        for number in (2, 0, 1):
            assert np.array_equal(other(step, number), forward[step - 1][number])


def test_pictures_of_mismatched_pairs_are_counted(tmp_path: Path) -> None:
    """A step is cut by what it really shows, though it was dealt before that was known."""
    shapes = shapes_of(tmp_path, *uniter_like(9_600), mismatch=True)
    one = Balanced(shapes, ONE_TASK, Spread(6, 0, 8, 0), batch=2_400, pool=4, runs=8)
    found = [shapes(each, "all") for each in one.micro_batches(2, 48)]
    cost = np.array([padded(*each) for each in found])
    assert cost.max() <= 1.05 * cost.mean()
    assert sum(int(words.sum() + seen.sum()) for words, seen in found) / cost.sum() > 0.85


def test_as_few_micro_batches_as_a_budget_allows(tmp_path: Path) -> None:
    shapes = shapes_of(tmp_path, *uniter_like(4_000))
    one = Balanced(shapes, ONE_TASK, Spread(1, 0, 1, 0), batch=240, pool=4, runs=4)
    number = fewest(one, 240, 2, 2_500)
    assert 240 % (2 * number) == 0
    dearest = [one.greatest_cost(step, 2 * number) for step in range(1, 17)]
    assert 1_250 < max(dearest) <= 2_500
    smaller = max(each for each in range(1, number) if 120 % each == 0)
    assert max(one.greatest_cost(step, 2 * smaller) for step in range(1, 17)) > 2_500
    with pytest.raises(
        ConfigError, match=r"data.tokens=100 is less than one sample takes; write at least data.tokens=1\d\d$"
    ):
        fewest(one, 240, 2, 100)


def test_steps_of_one_source_stay_so(tmp_path: Path) -> None:
    words, seen = uniter_like(600)
    shapes_of(tmp_path, words, seen)
    sources = [Source("a", (0, 200), 1.0), Source("b", (200, 600), 3.0)]
    order = Order(sources, 0, mix="step", batch=48)
    shapes = Shapes(Lengths(tmp_path), order, 0, {"all": parse({}, INPUTS)}, INPUTS)
    sizes = {"batch": 48, "pool": 16, "runs": 4}
    one = Balanced(shapes, ONE_TASK, Spread(1, 0, 1, 0), **sizes)
    found = [order(one.positions(step)) < 200 for step in range(1, 33)]
    assert {bool(each.all()) for each in found} == {True, False}
    assert not any(each.any() and not each.all() for each in found)
    assert sorted(np.concatenate([one.positions(step) for step in range(1, 33)]).tolist()) == list(range(32 * 48))


def test_no_sample_stands_twice_in_a_step_and_every_epoch_is_whole(tmp_path: Path) -> None:
    """A sample and its copy of the next epoch are alike in shape: they must not be dealt together."""
    shapes = shapes_of(tmp_path, *uniter_like(1_000))
    one = Balanced(shapes, ONE_TASK, Spread(1, 0, 1, 0), batch=100, pool=64, runs=16)
    steps = [shapes.order(one.positions(step)).tolist() for step in range(1, 65)]
    assert all(len(set(step)) == 100 for step in steps)
    for epoch in range(6):
        assert len({sample for step in steps[10 * epoch : 10 * epoch + 10] for sample in step}) == 1_000
    odd = Balanced(shapes, ONE_TASK, Spread(1, 0, 1, 0), batch=300, pool=8, runs=4)  # steps that reach into two epochs
    found = [odd.positions(step).tolist() for step in range(1, 9)]
    assert sorted(position for step in found for position in step) == list(range(2_400))
    assert found[3] == list(range(900, 1_200))


def test_a_budget_that_takes_a_whole_bucket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes a whole bucket"):
        TokenBuckets(shapes_of(tmp_path, *uniter_like(100)), Spread(1, 0, 1, 0), 140 * BUCKET, 140)


# --- data.batching=token_buckets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["droplast", "keeplast"])
def test_the_authors_sampler_is_matched(kept: str) -> None:
    """Their shuffled order, their batches (reference/uniter)."""
    told = json.loads((shared().parent / "reference" / "uniter" / "token_bucket_sampler.json").read_text())
    order, lengths, size = np.array(told[kept]["shuffled_ids"]), np.array(told["lens"]), told["bucket_size"]
    found = [
        order[start : start + size][batch].tolist()
        for start in range(0, len(order), size)
        for batch in bucket_batches(
            lengths[order[start : start + size]], told["max_tokens"], told["size_multiple"], kept == "keeplast"
        )
    ]
    assert found == told[kept]["batches_in_bucket_order"]
    assert sorted(found) == sorted(told[kept]["batches_yielded"])


def test_token_buckets_go_to_ranks_in_turn(tmp_path: Path) -> None:
    shapes = shapes_of(tmp_path, *uniter_like(20_000))
    alone = TokenBuckets(shapes, Spread(4, 0, 1, 0), 10_240, 140)
    ranks = [TokenBuckets(shapes, Spread(2, rank, 2, 0), 10_240, 140) for rank in range(2)]
    served = []
    for step in range(1, 80):
        whole = micro_batches(alone, step)
        parts = [micro_batches(rank, step) for rank in ranks]
        assert [each.tolist() for each in whole] == [
            each.tolist() for pair in zip(*parts, strict=True) for each in pair
        ]
        served += [each for batch in whole for each in batch.tolist()]
    assert len(set(served)) == len(served), "no position twice"
    buckets = {each // BUCKET for each in served}
    assert buckets == set(range(len(buckets)))
    assert len(served) / (len(buckets) * BUCKET) > 0.85, "few are dropped"
    assert len(served) <= alone.served(79) <= len(buckets) * BUCKET
    assert alone.served(79) == ranks[1].served(79)
    later = TokenBuckets(shapes, Spread(4, 0, 1, 0), 10_240, 140)
    assert [each.tolist() for each in micro_batches(later, 79)] == [each.tolist() for each in micro_batches(alone, 79)]


def test_a_budget_below_the_longest_samples_is_refused(tmp_path: Path) -> None:
    shapes = shapes_of(tmp_path, *uniter_like(20))
    with pytest.raises(ConfigError, match=r"write at least data.tokens=1120$"):
        TokenBuckets(shapes, Spread(1, 0, 1, 0), 1_000, 140)
