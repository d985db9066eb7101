from __future__ import annotations

import numpy as np
import pytest

from vlscale.data.order import Draws, Order
from vlscale.errors import DataError


def test_every_epoch_serves_each_sample_once_in_an_order_of_its_own() -> None:
    order = Order(50, seed=3)
    epochs = [[order(position) for position in range(50 * e, 50 * e + 50)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(index for _, index in epoch) == list(range(50))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 3


def test_order_is_a_function_of_seed_and_position() -> None:
    forward = [Order(20, seed=1)(position) for position in range(60)]
    order = Order(20, seed=1)
    backward = [order(position) for position in reversed(range(60))]
    assert forward == backward[::-1]
    assert forward != [Order(20, seed=2)(position) for position in range(60)]


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no samples"):
        Order(0, seed=0)


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
