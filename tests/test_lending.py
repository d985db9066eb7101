"""Micro-batches of loader workers: what the rank holds stays as it is, what it drops is used again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.shard_files import INPUTS, make_tokenizer, write_samples
from vlscale.data import lending
from vlscale.data.batches import Even
from vlscale.data.lending import Lender, Place
from vlscale.data.loader import Loader
from vlscale.data.micro_batches import Preprocessing
from vlscale.data.order import Order, Source, TaskOrder
from vlscale.data.shards import Shards
from vlscale.data.views import parse
from vlscale.types import Batch, Text, Visual

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Worker:
    """What torch tells a worker of itself."""

    id = 0


@pytest.fixture(autouse=True)
def _in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "get_worker_info", lambda: Worker)


def batch(fill: int, length: int = 3) -> Batch:
    """Tensors of several types, orders and sizes, one of them in two views."""
    pixels = torch.full((2, 4, 4, 3), fill, dtype=torch.uint8).permute(0, 3, 1, 2)
    ids = torch.full((2, length), fill)
    mask = torch.ones(2, length, dtype=torch.bool)
    return Batch(
        text={"clean": Text(ids, mask, None), "masked": Text(ids + 1, mask, ids)},
        visual={"clean": Visual(pixels), "masked": Visual(torch.empty(2, 0, 5), picked=torch.ones(2, 0).bool())},
        pair_id=torch.tensor([fill, fill + 1]),
        keys=("a", "b"),
        matched=torch.tensor([True, False]),
    )


def tensors(given: Batch) -> list[Tensor]:
    found: list[Tensor] = []

    def listed(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    given.each(listed)
    return found


def passed(lender: Lender, given: Batch) -> Batch:
    lent = lender.lend(given)
    assert lent is not None
    return lender.take(lent)


def same(found: Batch, expected: Batch) -> bool:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert found.keys == expected.keys
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_batch_arrives_as_it_was_and_stays_so_while_any_tensor_of_it_is_held() -> None:
    lender = Lender(1, 2)
    held = passed(lender, batch(1))
    assert same(held, batch(1))
    assert held.visual["clean"].feats.stride() == batch(1).visual["clean"].feats.stride()
    assert held.text["clean"].mask is held.text["masked"].mask
    for fill in range(2, 9):
        assert same(passed(lender, batch(fill)), batch(fill))
    assert same(held, batch(1))
    row = held.text["masked"].ids[1]  # of all the batch
    del held
    for fill in range(2, 9):
        passed(lender, batch(fill))
    assert row.tolist() == [2, 2, 2]


def test_memory_is_used_again() -> None:
    lender = Lender(1, 3)
    places = {passed(lender, batch(fill)).pair_id.data_ptr() for fill in range(9)}
    assert len(places) == 1
    first = lender.lend(batch(1))
    assert first is not None
    assert first.memory is None  # the rank has it


def test_when_all_is_in_use_torch_sends_the_batch() -> None:
    lender = Lender(2, 2)
    held = [passed(lender, batch(fill)) for fill in (1, 2)]
    assert lender.lend(batch(3)) is None
    held.pop()
    assert same(passed(lender, batch(3)), batch(3))
    assert same(held[0], batch(1))


def test_longer_batches_get_more_memory() -> None:
    lender = Lender(1, 1)
    for length in (3, 300, 4, 3000, 2999):
        assert same(passed(lender, batch(7, length)), batch(7, length))


def test_a_place_without_numbers() -> None:
    assert Place(0, (2, 0, 5), (5, 5, 1), torch.float32).within(torch.empty(0, dtype=torch.uint8)).shape == (2, 0, 5)


def test_batches_of_workers_are_those_of_the_rank_itself(tmp_path: Path) -> None:
    """However many of them are held."""
    shards = Shards(write_samples(tmp_path / "shards", 20, 7, {}), tmp_path / "cache")
    views = {"visual.clean": {"random_resized_crop": {}, "flip": {}}, "text.masked": {"mask_tokens": {}}}
    preprocessing = Preprocessing({"all": parse(views)}, TaskOrder({"all": 1.0}, 1), 1)
    tokenizer, order = make_tokenizer(tmp_path, INPUTS), Order([Source("data", (0, 20))], 1)

    def steps(workers: int) -> list[Batch]:
        loader = Loader(shards, tokenizer, INPUTS, preprocessing, order, Even(6, 3, 0, 1), workers)
        return [each for _, batches in loader.steps(0, 12) for each in batches]

    expected = steps(0)
    for found, wanted in zip(steps(2), expected, strict=True):
        assert same(found, wanted)
        assert np.array_equal(found.positions, wanted.positions)
