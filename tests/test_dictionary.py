"""The visual dictionary: by hand, straight through, its move after the step, alike over ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.spawn import run_ranks
from vlscale import distributed
from vlscale.nn import moving
from vlscale.nn.dictionary import ROWS, Dictionary, same_code

CODES, WIDTH, DECAY = 6, 4, 0.4


def dictionary(seed: int = 0) -> Dictionary:
    torch.manual_seed(seed)
    return Dictionary(CODES, WIDTH, DECAY)


def some_cells(size: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(size, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_nearest_and_value_by_hand() -> None:
    layer, cells = dictionary(), some_cells()
    values, codes = layer(cells)
    for place, code in enumerate(codes.flatten().tolist()):
        cell = cells.flatten(0, 1)[place]
        distances = [float((cell - entry).norm()) for entry in layer.table]
        assert code == distances.index(min(distances))
        torch.testing.assert_close(values.flatten(0, 1)[place], layer.table[code])


def test_more_cells_than_are_compared_at_once() -> None:
    layer = dictionary()
    cells = torch.randn(3, ROWS // 2, WIDTH)
    whole = torch.cdist(cells.flatten(0, 1), layer.table).argmin(dim=1)
    assert torch.equal(layer.nearest(cells).flatten(), whole)


def test_of_equal_entries_the_first() -> None:
    layer = dictionary()
    layer.table[2:] = 0
    layer.table[:2] = 100
    assert bool((layer.nearest(some_cells()) == 2).all())


def test_the_gradient_passes_straight_through() -> None:
    layer, cells = dictionary(), some_cells().requires_grad_()
    values, _ = layer(cells)
    weights = torch.randn(values.shape)
    (values * weights).sum().backward()
    torch.testing.assert_close(cells.grad, weights)


def by_hand(layer: Dictionary, cells: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """What the move makes of one step, cell by cell."""
    size, total, used = DECAY * layer.size, DECAY * layer.total, layer.used.clone()
    for cell, code in zip(cells.flatten(0, 1), codes.flatten().tolist(), strict=True):
        size[code] += 1 - DECAY
        total[code] += (1 - DECAY) * cell
        used[code] += 1
    whole = float(size.sum())
    smooth = [(float(each) + 1e-5) / (whole + CODES * 1e-5) * whole for each in size]
    table = torch.stack([row / count for row, count in zip(total, smooth, strict=True)])
    return {"table": table, "size": size, "total": total, "used": used}


def test_moves_after_the_step_by_hand() -> None:
    layer = dictionary()
    for step in range(3):
        cells = some_cells(seed=step)
        start = layer.table.clone()
        _, codes = layer(cells)
        assert torch.equal(layer.table, start)  # forward changes nothing
        expected = by_hand(layer, cells, codes)
        moving.move(layer)
        for name, value in expected.items():
            torch.testing.assert_close(layer.get_buffer(name), value, msg=name)
        if step == 0:
            unused = layer.used == 0
            assert bool((layer.table[unused] == 0).all())  # what no cell chose starts again from zero
    assert float(layer.used.sum()) == 3 * 20


@pytest.mark.parametrize("way", ["eval", "no_grad"])
def test_what_moves_nothing(way: str) -> None:
    layer = dictionary().train(way != "eval")
    start = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with torch.set_grad_enabled(way != "no_grad"):
        layer(some_cells())
    moving.move(layer)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, start[name])


def test_a_cell_that_is_not_finite_moves_nothing() -> None:
    layer, cells = dictionary(), some_cells()
    start = layer.table.clone()
    cells[0, 0, 0] = torch.nan
    layer(cells)
    moving.move(layer)
    assert torch.equal(layer.table, start)


def test_entries_stay_fp32_in_a_network_of_16_bits() -> None:
    layer = dictionary().to(torch.bfloat16)
    assert layer.table.dtype == torch.float32
    values, _ = layer(some_cells().to(torch.bfloat16))
    assert values.dtype == torch.bfloat16
    moving.move(layer)
    assert layer.total.dtype == torch.float32


def one_step(number: int) -> dict[str, Any]:
    """A step of 8 pictures on however many ranks, each in `number` micro-batches."""
    layer, cells = dictionary(), some_cells(8)
    size = len(cells) // distributed.world_size()
    own = cells[distributed.rank() * size : (distributed.rank() + 1) * size]
    for part in own.chunk(number):
        layer(part)
    moving.move(layer)
    return dict(layer.named_buffers())


@pytest.mark.parametrize("number", [1, 2])
def test_ranks_and_micro_batches_change_nothing(number: int) -> None:
    expected = one_step(1)
    first, second = run_ranks(one_step, 2, number)
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value)
        assert torch.equal(first[name], second[name])  # to the bit, or ranks drift apart


def test_same_code() -> None:
    codes = torch.tensor([[3, 1, 3, 3], [2, 2, 2, 0], [1, 1, 1, 1], [5, 4, 5, 4]])
    picked = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    expected = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    assert torch.equal(same_code(codes, picked, mask), expected)
    unmasked = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]).bool()
    assert torch.equal(same_code(codes, picked, None), unmasked)
