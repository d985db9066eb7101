"""SigLIP's loss: by hand, round the ring of ranks, and in steps of several micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.distributed.spawn import run_ranks
from tests.tables import Gradients, Tables, mean, rows, step, tables
from vlscale import distributed
from vlscale.model import PretrainModel
from vlscale.objectives import sigmoid
from vlscale.objectives.base import Objective
from vlscale.types import Loss, Moment

BIAS = -1.5  # near zero, so that positives and negatives weigh alike


def objectives(family: Tables) -> dict[str, Objective]:
    return {"sigmoid": sigmoid.build(sigmoid.Config(bias=BIAS), family)}


def of_rank(family: Tables) -> dict[str, Objective]:
    return {"sigmoid": sigmoid.build(sigmoid.Config(bias=BIAS, scope="rank"), family)}


def naive(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(image)) - 1
    return -F.logsigmoid(signs * (scale * image.float() @ text.float().T + bias)).sum() / len(image)


def wanted(family: Tables) -> tuple[Tensor, Gradients]:
    """Loss and gradients of the whole batch."""
    bias = torch.full((1,), BIAS, requires_grad=True)
    named = {
        "family.image": family.image,
        "family.text": family.text,
        "family.temperature.value": family.temperature.value,
        "objectives.sigmoid.bias": bias,
    }
    loss = naive(family.image, family.text, 1 / family.temperature.value, bias)
    return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def check(found: tuple[Tensor, Gradients], family: Tables) -> None:
    loss, gradients = wanted(family)
    torch.testing.assert_close(found[0], loss, rtol=1e-6, atol=1e-6)
    assert found[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-2, f"{name} tests nothing"
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def loss_of(family: Tables, batch_size: int) -> Loss:
    with torch.no_grad():
        loss: Loss = PretrainModel(family, objectives(family))(rows(0, batch_size), Moment(1)).losses["sigmoid"]
    return loss


def test_by_hand() -> None:
    family = Tables(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]]), temperature=0.25)
    logits = [[4 * 0.6 - 1.5, 4 * 0.0 - 1.5], [4 * 0.8 - 1.5, 4 * 1.0 - 1.5]]
    terms = [math.log1p(math.exp(-x if i == j else x)) for i, row in enumerate(logits) for j, x in enumerate(row)]
    loss = loss_of(family, 2)
    assert float(loss.value) == pytest.approx(sum(terms) / 2, rel=1e-6)
    assert {name: float(value) for name, value in loss.metrics.items()} == {
        "sigmoid/bias": BIAS,
        "sigmoid/recall": 1.0,
        "temperature": 0.25,
    }


def test_starts_as_published() -> None:
    objective = sigmoid.build(sigmoid.Config(), tables(2))
    assert objective.bias.tolist() == [-10.0]
    assert objective.whole


def test_recall_counts_true_pairs_alone() -> None:
    family = Tables(torch.eye(3), torch.tensor([[1.0, 1, 1], [0, 0.9, 0], [0, 0, 0.6]]), temperature=0.5)
    assert float(loss_of(family, 3).metrics["sigmoid/recall"]) == pytest.approx(2 / 3)  # 2 * 0.6 < 1.5


def test_one_rank_has_its_own_block_alone() -> None:
    family = tables(5)
    check(step(objectives, family, 5, 1), family)
    check(step(of_rank, tables(5), 5, 1), family)


@contextmanager
def watched() -> Iterator[list[tuple[int, ...]]]:
    """Shapes that travel round the ring; nothing is gathered."""
    shapes: list[tuple[int, ...]] = []
    send = distributed.pass_on

    def pass_on(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return send(tensor)

    def gather(tensors: object) -> None:
        raise AssertionError("the ring gathers nothing")

    with mock.patch.object(distributed, "pass_on", pass_on), mock.patch.object(distributed, "gather", gather):
        yield shapes


Ring = tuple[tuple[Tensor, Gradients], list[tuple[int, ...]]]


def ring(size: int) -> Ring:
    family = tables(size * distributed.world_size())
    with watched() as shapes:
        return step(objectives, family, size, 1), shapes


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_are_one_large_batch_and_no_rank_holds_it(world: int) -> None:
    found: list[Ring] = run_ranks(ring, world, 3)
    check(mean([each for each, _ in found]), tables(3 * world))
    assert [shapes for _, shapes in found] == [[(3, 12)] * world] * world  # texts of width 6 and their gradients


def ring_without_gradient(frozen: bool) -> tuple[Tensor, bool, list[tuple[int, ...]]]:
    family = tables(4)
    family.text.requires_grad_(False)
    with watched() as shapes, torch.set_grad_enabled(frozen):
        model = PretrainModel(family, objectives(family))
        loss = model(rows(2 * distributed.rank(), 2), Moment(1)).losses["sigmoid"].value
    if frozen:
        loss.backward()
    return loss.detach(), loss.requires_grad, shapes


@pytest.mark.parametrize("frozen", [False, True], ids=["evaluation", "frozen-texts"])
def test_texts_without_gradient_travel_alone(frozen: bool) -> None:
    found: list[tuple[Tensor, bool, list[tuple[int, ...]]]] = run_ranks(ring_without_gradient, 2, frozen)
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, wanted(tables(4))[0])
    assert [(grad, shapes) for _, grad, shapes in found] == [(frozen, [(2, 6)])] * 2


def ring_of_bf16() -> tuple[Tensor, Tensor]:
    family = tables(4).to(torch.bfloat16)
    return step(objectives, family, 2, 1)[0], family.text.grad  # type: ignore[return-value]


def test_bf16_embeddings_are_multiplied_in_fp32() -> None:
    found: list[tuple[Tensor, Tensor]] = run_ranks(ring_of_bf16, 2)
    loss, gradients = wanted(tables(4).to(torch.bfloat16).float())  # type: ignore[arg-type]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss, rtol=1e-6, atol=1e-6)
    text = (found[0][1].float() + found[1][1].float()) / 2
    assert found[0][1].dtype == torch.bfloat16
    torch.testing.assert_close(text, gradients["family.text"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("of", [2, 4])
def test_several_micro_batches_are_one_large_batch(of: int) -> None:
    family = tables(8)
    check(step(objectives, family, 8 // of, of), tables(8))


def two_by_two() -> tuple[Tensor, Gradients]:
    return step(objectives, tables(8), 2, 2)


def test_several_micro_batches_on_two_ranks_are_one_large_batch() -> None:
    found: list[tuple[Tensor, Gradients]] = run_ranks(two_by_two, 2)
    check(mean(found), tables(8))
