"""Word-region alignment: the plan against exact transport and a naive loop, signs, padding, precision, ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import batch_for
from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families import albef, uniter
from vlscale.flops import step_flops
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import wra
from vlscale.objectives.wra import cosine_cost, transport_plan
from vlscale.types import Batch, Moment


def model_of(**options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = uniter.build(replace(uniter.tiny(), dropout=0.0))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return PretrainModel(family, {"wra": wra.build(wra.Config(**options), family)})


def batch_of(size: int = 4, **options: Any) -> Batch:
    config = uniter.tiny()
    return batch_for(config.inputs, config.vocab, size, **options)


def loss_of(model: PretrainModel, batch: Batch) -> Tensor:
    return model(batch, Moment(1)).losses["wra"].value


def naive_distance(text: Tensor, visual: Tensor, beta: float, iterations: int) -> Tensor:
    """[] of one pair without padding, [L, D] and [R, D], scalar by scalar; the plan is a constant."""
    words, regions = range(len(text)), range(len(visual))
    cost = [[1 - F.cosine_similarity(text[i], visual[j], dim=0, eps=1e-10) for j in regions] for i in words]
    kernel = [[(-cost[i][j].detach() / beta).exp().item() for j in regions] for i in words]
    plan = [[1.0 for _ in regions] for _ in words]
    scale = [1.0 / len(text) for _ in words]
    for _ in range(iterations):
        step = [[kernel[i][j] * plan[i][j] for j in regions] for i in words]
        other = [1 / (len(visual) * sum(step[i][j] * scale[i] for i in words)) for j in regions]
        scale = [1 / (len(text) * sum(step[i][j] * other[j] for j in regions)) for i in words]
        plan = [[scale[i] * step[i][j] * other[j] for j in regions] for i in words]
    return torch.stack([cost[i][j] * plan[i][j] for i in words for j in regions]).sum()


@pytest.mark.parametrize(("beta", "iterations"), [(0.5, 50), (0.2, 3)])
def test_by_hand(beta: float, iterations: int) -> None:
    model, batch = model_of(beta=beta, iterations=iterations), batch_of()
    family: Any = model.family
    text, visual = batch.text["clean"], batch.visual["clean"]
    fused = family.fuse(family.encode_text(text), family.encode_visual(visual))
    assert batch.matched is not None
    assert visual.mask is not None
    distances = [
        naive_distance(fused.text[i][text.mask[i]], fused.visual[i][visual.mask[i]], beta, iterations) for i in range(4)
    ]
    signs = [1 if matched else -1 for matched in batch.matched.tolist()]
    assert set(signs) == {1, -1}
    want = torch.stack([sign * distance for sign, distance in zip(signs, distances, strict=True)]).sum() / 4
    loss = model(batch, Moment(1)).losses["wra"]
    torch.testing.assert_close(loss.value, want, rtol=1e-4, atol=1e-6)
    weight = family.region_embeddings.projection.weight
    given, naive = (torch.autograd.grad(each, weight)[0] for each in (loss.value, want))
    torch.testing.assert_close(given, naive, rtol=1e-3, atol=1e-6)
    for name, sign in (("matched", 1), ("mismatched", -1)):
        mean = torch.stack([d for d, s in zip(distances, signs, strict=True) if s == sign]).mean().detach()
        torch.testing.assert_close(loss.metrics[f"wra/{name}"], mean, rtol=1e-4, atol=1e-6)


def test_the_plan_comes_near_exact_transport() -> None:
    """As many words as regions: the best plan is a permutation, found by trying them all."""
    torch.manual_seed(3)
    cost = 2 * torch.rand(1, 4, 4)
    everything = torch.ones(1, 4, dtype=torch.bool)
    plan = transport_plan(cost, everything, everything, iterations=200)
    best = min(sum(cost[0, i, j].item() for i, j in enumerate(order)) / 4 for order in itertools.permutations(range(4)))
    assert (cost * plan).sum().item() == pytest.approx(best, abs=1e-3)
    assert cost.mean().item() > best + 0.1


def test_marginals_and_padding_of_the_plan() -> None:
    torch.manual_seed(1)
    words = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    regions = torch.arange(5) < torch.tensor([3, 5, 2])[:, None]
    cost = cosine_cost(torch.randn(3, 6, 8), torch.randn(3, 5, 8), words, regions)
    real = words[:, :, None] & regions[:, None, :]
    assert not cost[~real].any()
    plan = transport_plan(cost, words, regions)
    assert not plan[~real].any()
    torch.testing.assert_close(plan.sum(dim=2), words / words.sum(dim=1, keepdim=True))
    torch.testing.assert_close(plan.sum(dim=1), regions / regions.sum(dim=1, keepdim=True), rtol=0, atol=2e-2)
    for sample in range(3):
        inner = cost[sample : sample + 1, words[sample]][:, :, regions[sample]]
        every = [torch.ones(1, number, dtype=torch.bool) for number in inner.shape[1:]]
        alone = transport_plan(inner, every[0], every[1])
        torch.testing.assert_close(plan[sample : sample + 1, words[sample]][:, :, regions[sample]], alone)


def test_nothing_to_transport_is_zero_and_stays_finite() -> None:
    words, regions = torch.tensor([[True, True], [False, False]]), torch.tensor([[False], [True]])
    states = torch.randn(2, 2, 3, requires_grad=True)
    cost = cosine_cost(states, torch.zeros(2, 1, 3), words, regions)
    plan = transport_plan(cost.detach(), words, regions)
    assert not plan.any()
    (cost * plan).sum().backward()
    assert states.grad is not None
    assert not states.grad.any()


def test_a_zero_state_has_a_finite_cost() -> None:
    every = torch.ones(1, 2, dtype=torch.bool)
    cost = cosine_cost(torch.zeros(1, 2, 3), torch.randn(1, 2, 3), every, every)
    torch.testing.assert_close(cost, torch.ones(1, 2, 2))


def test_padding_cannot_change_it() -> None:
    model, batch = model_of(), batch_of()
    visual = batch.visual["clean"]
    assert visual.mask is not None
    spoilt = visual._replace(feats=visual.feats.masked_fill(~visual.mask[..., None], 9.0))
    changed = replace(batch, visual={**batch.visual, "clean": spoilt})
    assert not visual.mask.all()
    for other in (changed, batch_of(padding=3)):
        torch.testing.assert_close(loss_of(model, other), loss_of(model, batch))


def test_without_the_loaders_word_every_pair_matches() -> None:
    model, batch = model_of(), batch_of()
    every = replace(batch, matched=torch.ones(4, dtype=torch.bool))
    none = replace(batch, matched=torch.zeros(4, dtype=torch.bool))
    assert loss_of(model, every) > 0
    torch.testing.assert_close(loss_of(model, replace(batch, matched=None)), loss_of(model, every))
    torch.testing.assert_close(loss_of(model, none), -loss_of(model, every))


def test_fp32_whatever_the_network_computes_in() -> None:
    model, batch = model_of().to(torch.bfloat16), batch_of()
    found = model.objectives["wra"].align(Encodings(model.family, batch, Moment(1), {}))  # type: ignore[operator,arg-type]
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert loss_of(model, batch).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of(model_of(), batch)
    assert inside.dtype == torch.float32


def test_families_whose_words_and_regions_do_not_share_a_stack_are_refused() -> None:
    family = albef.build(albef.tiny())
    with pytest.raises(ConfigError, match="single_stream"):
        PretrainModel(family, {"wra": wra.build(wra.Config(), family)})


def test_flops_equal_torchs_counter() -> None:
    model, batch = model_of(), batch_of()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(1))
    assert step_flops(model, batch).forward == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int) -> None:
    check_whole(model_of, batch_of(8), world, number)
