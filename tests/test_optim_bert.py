"""BertAdam against the formula in plain numbers and against torch's Adam; its clipping, decay, state and schedule."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlscale.optim import OptimConfig, lr_at
from vlscale.optim_bert import BertAdam, triangle


def by_hand(value: float, gradients: list[float], lr: float, decay: float, eps: float = 1e-6) -> list[float]:
    """One number's way."""
    mean = square = 0.0
    way = []
    for gradient in gradients:
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient * gradient
        value -= lr * (mean / (math.sqrt(square) + eps) + decay * value)
        way.append(value)
    return way


def parameters(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (4,), (2, 3, 2))]


def given(shapes: list[nn.Parameter], steps: int = 5) -> list[list[Tensor]]:
    torch.manual_seed(7)
    return [[torch.randn_like(each) * 3 for each in shapes] for _ in range(steps)]


def train(optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]]) -> None:
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in gradients:
        for parameter, gradient in zip(flat, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def test_by_hand() -> None:
    gradients = [0.5, -2.0, 0.0, 1e-7, 30.0]
    parameter = nn.Parameter(torch.tensor([0.8], dtype=torch.float64))
    optimizer = BertAdam([parameter], lr=0.03, weight_decay=0.1)
    for gradient, want in zip(gradients, by_hand(0.8, gradients, 0.03, 0.1), strict=True):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert parameter.item() == pytest.approx(want, rel=1e-12)


def test_every_entry_by_hand() -> None:
    own = parameters()
    before = [each.detach().clone() for each in own]
    gradients = given(own)
    train(BertAdam(own, lr=0.02, weight_decay=0.01), gradients)
    for number, (start, end) in enumerate(zip(before, own, strict=True)):
        for place in range(start.numel()):
            column = [float(step[number].flatten()[place]) for step in gradients]
            want = by_hand(float(start.flatten()[place]), column, 0.02, 0.01)[-1]
            assert float(end.detach().flatten()[place]) == pytest.approx(want, abs=1e-5)


def test_it_is_adam_but_for_bias_correction() -> None:
    """torch's Adam with a step size that undoes its correction, without epsilon and decay."""
    ours, theirs = parameters(), parameters()
    gradients = given(ours)
    train(BertAdam(ours, lr=0.02, eps=0.0, weight_decay=0.0), gradients)
    adam = torch.optim.Adam(theirs, eps=0.0)
    for number, step in enumerate(gradients, start=1):
        adam.param_groups[0]["lr"] = 0.02 * (1 - 0.9**number) / math.sqrt(1 - 0.999**number)
        train(adam, [step])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_decay_moves_what_has_no_gradient() -> None:
    """An all-zero gradient is a gradient; None is none."""
    decayed, spared = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = BertAdam([decayed, spared], lr=0.5, weight_decay=0.1)
    decayed.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(decayed.detach(), torch.full((2,), 0.95))
    assert torch.equal(spared.detach(), torch.ones(2))
    assert not optimizer.state[spared]


def test_clipping_each_parameter_on_its_own() -> None:
    own, other = parameters(), parameters()
    gradients = given(own)
    gradients[2][1] = gradients[2][1] * 1e-3  # within the bound: as it is
    train(BertAdam(own, lr=0.02, clip_each=1.0), gradients)
    clipped = []
    for step in gradients:
        holders = [nn.Parameter(torch.zeros_like(each)) for each in step]
        for holder, gradient in zip(holders, step, strict=True):
            holder.grad = gradient.clone()
            nn.utils.clip_grad_norm_([holder], 1.0)
        clipped.append([holder.grad for holder in holders if holder.grad is not None])
    assert clipped[2][1].equal(gradients[2][1])
    assert not clipped[2][0].equal(gradients[2][0])
    train(BertAdam(other, lr=0.02), clipped)
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two)


def test_gradients_stay_as_they_are() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 10.0)
    BertAdam([parameter], lr=0.1, clip_each=1.0).step()
    assert torch.equal(parameter.grad, torch.full((3,), 10.0))


def test_groups_have_their_own_rates_and_decay() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups: list[dict[str, Any]] = [
        {"params": [first], "lr": 0.0},
        {"params": [second], "lr": 0.1, "weight_decay": 0.0},
    ]
    optimizer = BertAdam(groups, lr=1.0, weight_decay=0.5)
    train(optimizer, [[torch.ones(1), torch.ones(1)]])
    assert first.item() == 1.0
    assert second.item() == pytest.approx(1 - 0.1 * 0.1 / (math.sqrt(0.001) + 1e-6))
    # a step at rate 0 has filled the moments
    assert optimizer.state[first]["exp_avg"].item() == pytest.approx(0.1)


def test_a_restart_continues() -> None:
    own, other = parameters(), parameters()
    gradients = given(own, 6)
    train(BertAdam(own, lr=0.02), gradients)
    before = BertAdam(other, lr=0.02)
    train(before, gradients[:3])
    after = BertAdam(other, lr=0.5)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(after, gradients[3:])
    for one, two in zip(own, other, strict=True):
        assert torch.equal(one, two)


def test_closure() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = BertAdam([parameter], lr=0.1)

    def closure() -> float:
        loss = (parameter * 2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    assert optimizer.step(closure) == 2.0
    assert parameter.item() < 1.0


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": -1.0}, {"clip_each": -1.0}, {"betas": (0.9, 1.0)}])
def test_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BertAdam([nn.Parameter(torch.ones(1))], **{"lr": 0.1, **wrong})


def test_triangle() -> None:
    assert [triangle(step, 8, 0.25) for step in range(1, 10)] == pytest.approx(
        [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    )
    assert triangle(11, 8, 0.25) == 0.0
    assert triangle(1, 4, 0.0) == 1.0
    assert [triangle(step, 4, 1.0) for step in (1, 3, 5)] == [0.0, 0.5, 0.0]


def test_triangle_is_the_recipes_linear_schedule() -> None:
    config = OptimConfig(lr=1.0, schedule="linear", warmup=5)
    assert [triangle(step, 100, 0.05) for step in range(1, 101)] == pytest.approx(
        [lr_at(step, config, 100) for step in range(1, 101)]
    )
