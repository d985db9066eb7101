"""A queue sharded over ranks is the replicated one: contents, loss, gradients; each rank holds its part only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.distributed.spawn import run_ranks
from tests.states import whole_queue
from vlscale import distributed
from vlscale.nn.queue import KeyQueue, QueueOptions


def queries(rows: int, width: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    online, teachers = F.normalize(torch.randn(2, rows, width, generator=generator), dim=2)
    return online.requires_grad_(), teachers


def use(queue: KeyQueue, online: Tensor, teachers: Tensor) -> dict[str, Tensor]:
    """The sum of what a loss makes of a queue, and its gradients."""
    temperature = torch.full((1,), 0.07, requires_grad=True)
    total = queue.log_sum_exp(online, temperature)
    soft, soft_total = queue.soft_keys(teachers, temperature)
    torch.autograd.backward((total - (online * soft).sum(1) / temperature).sum())
    assert online.grad is not None
    assert temperature.grad is not None
    made = {"total": total.detach(), "soft": soft, "soft_total": soft_total, "gradient": online.grad}
    return {**made, "temperature": temperature.grad}


def on_a_rank(options: QueueOptions, width: int, rows: int) -> dict[str, Any]:
    queue = KeyQueue(options, width, seed=3)
    made = use(queue, *queries(rows, width, distributed.rank()))
    made["temperature"] = distributed.sum_over_ranks({"": made["temperature"]})[""].float().view(1)
    return {**made, "bytes": queue.keys.numel() * queue.keys.element_size()}


def compare(options: QueueOptions, width: int, rows: int, world: int, timeout: float = 120) -> None:
    found = run_ranks(on_a_rank, world, options, width, rows, timeout=timeout)
    every = [queries(rows, width, rank) for rank in range(world)]
    online = torch.cat([each.detach() for each, _ in every]).requires_grad_()
    whole = KeyQueue(options, width, seed=3)  # one process: replicated
    expected = use(whole, online, torch.cat([teachers for _, teachers in every]))
    for name in ("total", "soft", "soft_total", "gradient"):
        difference = torch.cat([each[name] for each in found]) - expected[name]
        assert float(difference.norm()) <= 1e-5 * float(expected[name].norm()), name
    for each in found:
        torch.testing.assert_close(each["temperature"], expected["temperature"], rtol=1e-4, atol=1e-3)
        assert each["bytes"] * world == whole.keys.numel() * whole.keys.element_size()


def test_three_ranks_hold_a_third_each() -> None:
    compare(QueueOptions(queue=9000, queue_store="sharded"), 16, 5, 3)


@pytest.mark.slow
def test_a_million_keys_on_four_ranks() -> None:
    compare(QueueOptions(queue=1_048_576, queue_store="sharded"), 256, 8, 4, timeout=500)


def pushed(batches: list[int]) -> dict[str, Tensor]:
    queue = KeyQueue(QueueOptions(queue=12, queue_store="sharded", queue_start="empty"), 4)
    for step, size in enumerate(batches, start=1):
        generator = torch.Generator().manual_seed(step)
        queue.push(torch.randn(size, 4, generator=generator), torch.arange(size) + 100 * step, step)
    return whole_queue(queue)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_batches_of_any_size_enter_alike(world: int) -> None:
    batches = [5, 1, 2, 12, 7, 3, 30, 8, 4]
    expected = pushed(batches)
    for found in run_ranks(pushed, world, batches):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def odd_capacity() -> str:
    try:
        KeyQueue(QueueOptions(queue=9, queue_store="sharded"), 4)
    except ValueError as error:
        return str(error)
    return ""


def test_a_capacity_that_does_not_divide_is_refused() -> None:
    assert run_ranks(odd_capacity, 2) == ["queue=9 cannot be sharded over 2 ranks; write a multiple of 2"] * 2
