from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from vlscale.data.order import Draws, Order, Source
from vlscale.data.shuffle import ROUNDS, shuffled
from vlscale.errors import ConfigError, DataError


def order_of(count: int, seed: int = 0, **options: int) -> Order:
    return Order([Source("data", (0, count))], seed, **options)  # type: ignore[arg-type]


def weighed(weights: dict[str, float], counts: dict[str, int], seed: int = 0, **options: object) -> Order:
    ends = [0, *np.cumsum(list(counts.values())).tolist()]
    sources = [
        Source(name, (first, end), weights[name]) for name, (first, end) in zip(counts, pairwise(ends), strict=True)
    ]
    return Order(sources, seed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 50, 1009])
def test_every_epoch_serves_each_sample_once_in_an_order_of_its_own(count: int, window: int) -> None:
    order = order_of(count, seed=3, window=window)
    epochs = [order(np.arange(count * epoch, count * (epoch + 1))).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert [order.epoch(position) for position in (0, count - 1, count, 3 * count)] == [0, int(count == 1), 1, 3] or (
        count == 1
    )
    if count >= 50:
        assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_is_a_function_of_seed_and_position() -> None:
    forward = order_of(20, seed=1)(range(60)).tolist()
    order = order_of(20, seed=1)
    backward = [int(order([position])[0]) for position in reversed(range(60))]
    assert forward == backward[::-1]
    assert forward != order_of(20, seed=2)(range(60)).tolist()


def test_a_shuffle_is_a_bijection_and_looks_random() -> None:
    keys = np.random.default_rng(0).integers(1 << 63, size=(400, ROUNDS)).astype(np.uint64)
    for size in (1, 2, 3, 4, 5, 99, 100, 101, 4097):
        assert sorted(shuffled(np.arange(size), size, keys[0]).tolist()) == list(range(size))
    tables = np.array([shuffled(np.arange(10), 10, key) for key in keys])  # where 10 places go, 400 times
    counts = np.array([np.bincount(column, minlength=10) for column in tables.T])
    assert ((counts - 40) ** 2 / 40).sum(axis=1).max() < 35  # chi-square with 9 degrees: 35 is one in 17,000
    moved = shuffled(np.arange(100_000), 100_000, keys[1])
    assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), moved)[0, 1]) < 0.02
    ascending = np.diff(moved) == 1
    assert ascending.sum() < 10


def test_any_position_of_a_billion_samples_at_once() -> None:
    order = order_of(1_000_000_007, seed=5)
    started = time.process_time()
    far = order(np.arange(123_456_789_012, 123_456_789_012 + 4096))
    assert time.process_time() - started < 1
    assert len(set(far.tolist())) == 4096


def test_windows_read_few_shards_at_a_time_and_shuffle_shards_and_samples() -> None:
    starts = tuple(range(0, 10_001, 100))  # a hundred shards
    order = Order([Source("data", starts)], 0, window=300)
    epochs = [order(np.arange(10_000) + epoch * 10_000) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10_000))
        for window in epoch.reshape(-1, 100):
            assert len(set((window // 100).tolist())) <= 6
    assert (epochs[0] != epochs[1]).mean() > 0.9
    firsts = [epoch[:300] // 100 for epoch in epochs]
    assert set(firsts[0].tolist()) != set(firsts[1].tolist())
    assert (np.diff(epochs[0][:300]) == 1).sum() < 20


def test_sources_of_one_data_set_are_shuffled_together() -> None:
    apart = Order([Source("a", (0, 10, 30)), Source("b", (30, 50))], 1)
    assert apart(range(100)).tolist() == order_of(50, 1)(range(100)).tolist()
    assert apart.passes(75) == {"a": 1.5, "b": 1.5}


def test_weights_are_exact_shares_and_every_source_has_epochs_of_its_own() -> None:
    counts = {"coco": 700, "vg": 300, "cc": 5000}
    order = weighed({"coco": 2, "vg": 3, "cc": 1}, counts, seed=9)
    served = order(range(60_000))
    starts, seen = {"coco": 0, "vg": 700, "cc": 1000}, {}
    for name, first in starts.items():
        mine = served[(served >= first) & (served < first + counts[name])]
        seen[name] = len(mine)
        whole = len(mine) // counts[name]
        for epoch in mine[: whole * counts[name]].reshape(-1, counts[name]):
            assert sorted(epoch.tolist()) == list(range(first, first + counts[name]))
    assert {name: round(6 * count / 60_000, 2) for name, count in seen.items()} == {"coco": 2, "vg": 3, "cc": 1}
    assert order.passes(60_000) == {name: count / counts[name] for name, count in seen.items()}
    again = weighed({"coco": 2, "vg": 3, "cc": 1}, counts, seed=9)
    assert again([41_234, 7]).tolist() == served[[41_234, 7]].tolist()


def test_a_whole_step_from_one_source() -> None:
    order = weighed({"a": 1, "b": 2}, {"a": 40, "b": 100}, seed=2, mix="step", batch=10)
    steps = order(range(30_000)).reshape(-1, 10)
    of_b = steps >= 40
    assert (of_b.all(axis=1) | ~of_b.any(axis=1)).all()
    assert abs(of_b[:, 0].mean() - 2 / 3) < 0.01
    only_a = steps[~of_b[:, 0]].reshape(-1)
    assert all(sorted(epoch.tolist()) == list(range(40)) for epoch in only_a[:4000].reshape(-1, 40))
    assert order.passes(10_005)["a"] * 40 + order.passes(10_005)["b"] * 100 == pytest.approx(10_005)


@pytest.mark.parametrize("weights", [(0.1, 0.25), (113_287.0, 5_409_221.0), (1e-9, 1.0), (1 / 3, 2 / 3)])
def test_any_weights(weights: tuple[float, float]) -> None:
    order = weighed(dict(zip("ab", weights, strict=True)), {"a": 50, "b": 60})
    served = order(range(20_000))
    assert (served < 50).mean() == pytest.approx(weights[0] / sum(weights), abs=0.02)


def test_mistakes_are_told() -> None:
    with pytest.raises(DataError, match="the data set has no samples"):
        order_of(0)
    with pytest.raises(DataError, match=r"source 'b' of data\.train has no samples"):
        weighed({"a": 1, "b": 1}, {"a": 3, "b": 0})
    with pytest.raises(ConfigError, match=r"data\.weights\.b should be above 0"):
        weighed({"a": 1, "b": -1}, {"a": 3, "b": 3})


def test_draws_depend_on_seed_position_and_stream_only() -> None:
    def values(seed: int, position: int, stream: str) -> list[float]:
        return list(Draws(seed)(position, stream).random(5))

    draws = Draws(7)
    draws(1, "other").random(13)
    draws(4, "text.masked").integers(10, size=3, dtype=np.uint32)
    assert list(draws(5, "text.masked").random(5)) == values(7, 5, "text.masked")
    others = [values(8, 5, "text.masked"), values(7, 6, "text.masked"), values(7, 5, "visual.clean")]
    assert values(7, 5, "text.masked") not in others
    assert len({tuple(other) for other in others}) == 3


def test_draws_of_neighbouring_positions_are_uniform_and_uncorrelated() -> None:
    draws = Draws(0)
    table = np.array([draws(position, "x").random(4) for position in range(4000)])
    assert np.allclose(table.mean(axis=0), 0.5, atol=0.03)
    correlation = np.corrcoef(table[:-1, 0], table[1:, 0])[0, 1]
    assert abs(correlation) < 0.06
