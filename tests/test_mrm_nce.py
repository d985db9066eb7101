"""Hidden regions found among other regions' features: by hand, with padding, in parts, and what is drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.models import batch_for
from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families import vilbert
from vlscale.model import PretrainModel
from vlscale.objectives import mrm_nce
from vlscale.types import Batch, Moment, lengthened

FAMILY = replace(vilbert.tiny(), dropout=0.0)


def model_of(family: vilbert.Config = FAMILY, **options: Any) -> PretrainModel:
    torch.manual_seed(0)
    network = vilbert.build(family)
    config = mrm_nce.Config(**{"across": 5, "inside": 3, **options})
    return PretrainModel(network, {"mrm_nce": mrm_nce.build(config, network)})


def batch_of(size: int = 4) -> Batch:
    return batch_for(FAMILY.inputs, FAMILY.vocab, size)


def loss_of(model: PretrainModel, batch: Batch) -> Tensor:
    return model(batch, Moment(1, seed=5)).losses["mrm_nce"].value


@pytest.mark.parametrize("padding", ["excluded", "drawn"])
def test_by_hand(padding: str) -> None:
    model, batch = model_of(padding=padding), batch_of()
    objective: Any = model.objectives["mrm_nce"]
    drawn: list[Tensor] = []
    plain = objective.draw
    objective.draw = lambda enc, samples: drawn.append(plain(enc, samples)) or drawn[-1]  # type: ignore[func-returns-value]
    loss = model(batch, Moment(1)).losses["mrm_nce"]
    visual, family = batch.visual["masked"], model.family
    assert visual.picked is not None
    assert visual.targets is not None
    assert visual.mask is not None
    states = family.fuse(family.encode_text(batch.text["masked"]), family.encode_visual(visual)).visual
    terms, right = [], []
    for sample, region in visual.picked.nonzero().tolist():
        mask = visual.mask if padding == "excluded" else torch.ones_like(visual.mask)
        predicted = objective.head(states[sample, region])
        scores = [predicted @ visual.targets[sample, region]]
        for other, place in naive_negatives(drawn[0][sample, region], mask, sample, region, across=5):
            scores.append(predicted @ visual.targets[other, place])
        terms.append(torch.logsumexp(torch.stack(scores), dim=0) - scores[0])
        right.append(bool(scores[0] > max(scores[1:])))
    torch.testing.assert_close(loss.value, torch.stack(terms).mean())
    assert loss.metrics["mrm_nce/accuracy"].item() == pytest.approx(sum(right) / len(right))


def naive_negatives(draws: Tensor, mask: Tensor, own: int, region: int, across: int) -> list[tuple[int, int]]:
    """(sample, region) of one region's negatives, from its draws."""
    rows, slots, rest = (part.tolist() for part in draws.tensor_split((across, 2 * across)))
    samples = [number for number in range(len(mask)) if number != own]
    if own < len(mask) - 1:  # the last sample stands in one's own place
        samples = [*samples[:own], len(mask) - 1, *samples[own:-1]]
    found = []
    for row, slot in zip(rows, slots, strict=True):
        other = samples[int(row * len(samples))]
        places = mask[other].nonzero()[:, 0].tolist()
        found.append((other, places[int(slot * len(places))]))
    places = [place for place in mask[own].nonzero()[:, 0].tolist() if place != region]
    at = int(mask[own, :region].sum())
    if at < len(places):  # the last region stands in one's own place
        places = [*places[:at], places[-1], *places[at:-1]]
    return found + [(own, places[int(draw * len(places))]) for draw in rest if places]


def test_negatives_are_others_and_even() -> None:
    drawable = torch.tensor([[True, True, True, False], [True, False, True, False], [True, False, False, False]])
    draws = torch.rand(3, 4, 2 * 300 + 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index, exists = mrm_nce.negatives(draws, drawable, torch.arange(3), across=300)
    sample, region = index // 4, index % 4
    assert drawable[sample, region][exists].all()
    assert exists[:, :, :300].all()
    assert not exists[2, :, 300:].any()  # its only region
    for own, place in drawable.nonzero().tolist():
        assert not (sample[own, place, :300] == own).any()
        assert (sample[own, place, 300:] == own).all()
        assert not (region[own, place, 300:] == place)[exists[own, place, 300:]].any()
        shares = torch.bincount(sample[own, place, :300], minlength=3) / 300
        assert sorted(shares.tolist()) == pytest.approx([0.0, 0.5, 0.5], abs=0.1)
    of_first = torch.bincount(region[0, 1, 300:], minlength=4) / 200
    assert of_first.tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0], abs=0.12)


def test_the_greatest_draw_stays_within() -> None:
    draws = torch.full((2, 3, 3), 1.0 - 2**-53, dtype=torch.float64)
    index, exists = mrm_nce.negatives(draws, torch.ones(2, 3, dtype=torch.bool), torch.arange(2), across=1)
    assert exists.all()
    assert index[0, 0].tolist() == [5, 1]  # the other sample's last; of its own the last but one
    assert index[1, 1].tolist() == [2, 5]  # here the last stands in the place of region 1


def test_padding_cannot_change_the_loss() -> None:
    family, batch = replace(FAMILY, regions=9), batch_of()
    values = []
    for filling, length in ((0.0, 6), (0.0, 9), (7.0, 9)):
        wide = batch.visual["masked"]
        wide = type(wide)(*(None if each is None else lengthened(each, length) for each in wide))
        assert wide.mask is not None
        assert wide.targets is not None
        pad = ~wide.mask[:, :, None]
        wide = wide._replace(feats=wide.feats.masked_fill(pad, filling), targets=wide.targets.masked_fill(pad, filling))
        values.append(loss_of(model_of(family), replace(batch, visual={"masked": wide})))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    assert values[0] > 0


def test_nothing_hidden_gives_zero_and_no_gradient() -> None:
    batch = batch_of()
    visual = batch.visual["masked"]
    assert visual.picked is not None
    visual = visual._replace(picked=torch.zeros_like(visual.picked))
    for scope in ("rank", "global"):
        model = model_of(scope=scope)
        loss = loss_of(model, replace(batch, visual={"masked": visual}))
        assert loss.item() == 0.0
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        assert gradients
        assert not any(gradient.any() for gradient in gradients)


def test_a_sample_with_one_region_and_no_other_asked_for_counts_nothing() -> None:
    batch = batch_of(2)
    visual = batch.visual["masked"]
    alone = torch.zeros_like(visual.mask)  # type: ignore[arg-type]
    alone[:, 0] = True
    only = replace(batch, visual={"masked": visual._replace(mask=alone, picked=alone)})
    loss = loss_of(model_of(across=0), only)
    assert loss.item() == 0.0  # its own feature is the only one
    assert loss_of(model_of(across=2), only) > 0


def test_refused() -> None:
    with pytest.raises(ConfigError, match="at least one negative"):
        model_of(across=0, inside=0)
    with pytest.raises(ConfigError, match=r"micro_batch to at least 2.*across=0"):
        loss_of(model_of(), batch_of(1))
    assert loss_of(model_of(across=0), batch_of(1)) > 0


def test_draws_are_the_samples_own_and_new_each_step() -> None:
    model, batch = model_of(), batch_of()
    again = [model(batch, at).losses["mrm_nce"].value for at in (Moment(1), Moment(1), Moment(2), Moment(1, seed=1))]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
    assert not torch.equal(again[0], again[3])


def whole_model() -> PretrainModel:
    return model_of(scope="global")


@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int) -> None:
    check_whole(whole_model, batch_of(8), world, number)


@pytest.mark.parametrize("block", [1, 70, 2**24])
def test_products_in_blocks_and_their_gradient(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(mrm_nce, "BLOCK", block)
    queries, keys = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    index, upstream = torch.randint(0, 7, (5, 6)), torch.randn(5, 6)
    made = mrm_nce._Products.apply(queries, keys, index)
    naive = (queries @ keys.T).gather(1, index)
    torch.testing.assert_close(made, naive)
    torch.testing.assert_close(
        torch.autograd.grad(made, queries, upstream), torch.autograd.grad(naive, queries, upstream)
    )


def test_head_flops_equal_torchs_counter() -> None:
    model, batch = model_of(), batch_of()
    objective: Any = model.objectives["mrm_nce"]
    visual = batch.visual["masked"]
    assert visual.picked is not None
    states = torch.randn(int(visual.picked.sum()), FAMILY.visual_width)
    with FlopCounterMode(display=False) as counter:
        predicted = objective.head(states)
        mrm_nce._Products.apply(predicted, torch.randn(9, FAMILY.feats), torch.zeros(len(states), 9, dtype=torch.int64))
    assert objective.head_flops(batch) == (counter.get_total_flops(), 0)


def test_it_learns_to_find_a_feature() -> None:
    model, batch = model_of(), batch_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(1, 41):
        optimizer.zero_grad()
        loss = model(batch, Moment(step)).losses["mrm_nce"].value
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
