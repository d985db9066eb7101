"""Masked visual modelling: the formula by hand, nothing hidden, padding, one mean over ranks and micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.whole_steps import check_whole, make_step, part
from vlscale.errors import ConfigError
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.nn.dictionary import same_code
from vlscale.objectives import mvm
from vlscale.types import Batch, Dims, Fused, Inputs, Moment, Stream, Text, Visual

SAMPLES, CELLS, WIDTH, CODES = 4, 6, 5, 3


class Cells(Family):
    """Cells [B, R, D] through a linear layer; a cell's code is the whole part of its first channel."""

    offers = frozenset({"text", "visual", "fuse", "codes"})

    def __init__(self) -> None:
        super().__init__()
        self.dims, self.inputs = Dims(WIDTH, WIDTH, WIDTH), Inputs(16, 4, False)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(CODES, WIDTH))

    @property
    def code_table(self) -> Tensor:
        return self.get_buffer("table")

    def pick(self, visual: Visual, cell: Tensor, kept: Tensor) -> Tensor:
        place = (cell * CELLS).long()[:, None]
        return (torch.arange(CELLS) == place) & (kept < 0.8)[:, None]

    def encode_text(self, text: Text) -> Stream:
        return Stream(text.ids[..., None].float().expand(-1, -1, WIDTH), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        codes = visual.feats[..., 0].long()
        picked = None if visual.picked is None else same_code(codes, visual.picked, visual.mask)
        return Stream(self.linear(visual.feats), visual.mask, codes=codes, picked=picked)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        assert text is not None
        assert visual is not None
        return Fused(text.hidden, visual.hidden + text.hidden.mean(dim=1, keepdim=True), None)


def model_of(**options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = Cells()
    return PretrainModel(family, {"mvm": mvm.build(mvm.Config(**options), family)})


def batch_of(picked: list[int] | None = None, mask: Tensor | None = None) -> Batch:
    """`picked`: the picked cell of each picture, -1 = none; None = the family draws."""
    draw = torch.Generator().manual_seed(1)
    feats = torch.rand(SAMPLES, CELLS, WIDTH, generator=draw)
    feats[..., 0] = torch.randint(CODES, (SAMPLES, CELLS), generator=draw).float()
    picks = None if picked is None else torch.arange(CELLS) == torch.tensor(picked)[:, None]
    ids = torch.randint(4, (SAMPLES, 3), generator=draw)
    return Batch(
        text={"masked": Text(ids, torch.ones_like(ids, dtype=torch.bool))},
        visual={"masked": Visual(feats, mask, picked=picks)},
        pair_id=torch.arange(SAMPLES),
    )


def by_hand(model: PretrainModel, batch: Batch) -> tuple[Tensor, int]:
    """(sum of the terms, their number), cell by cell."""
    visual, text = batch.visual["masked"], batch.text["masked"]
    assert visual.picked is not None
    table = model.family.code_table
    terms = []
    for row in range(len(batch)):
        for place in visual.picked[row].nonzero()[:, 0].tolist():
            code = visual.feats[row, place, 0]
            for cell in range(CELLS):
                real = visual.mask is None or bool(visual.mask[row, cell])
                if visual.feats[row, cell, 0] != code or not real:
                    continue
                state = model.family.linear(visual.feats[row, cell]) + text.ids[row].float().mean()  # type: ignore[operator]
                cosines = [torch.dot(state, entry) / (state.norm() * entry.norm()) for entry in table]
                terms.append(torch.stack(cosines).exp().sum().log() - cosines[int(code)])
    return torch.stack(terms).sum(), len(terms)


def test_formula() -> None:
    model, batch = model_of(), batch_of([0, 3, -1, 5])
    loss = model(batch, Moment(1)).losses["mvm"]
    total, number = by_hand(model, batch)
    torch.testing.assert_close(loss.value, total / number)
    assert 0 <= float(loss.metrics["mvm/accuracy"]) <= 1


def test_accuracy_counts_hidden_cells_alone() -> None:
    model, batch = model_of(), batch_of([0, 3, -1, 5])
    visual = batch.visual["masked"]
    with torch.no_grad():  # every state is the entry of code 1
        model.family.linear.weight.zero_()  # type: ignore[union-attr, operator]
        model.family.linear.bias.copy_(model.family.code_table[1])  # type: ignore[union-attr, operator]
    text = batch.text["masked"]
    batch = replace(batch, text={"masked": text._replace(ids=torch.zeros_like(text.ids))})
    assert visual.picked is not None
    codes = visual.feats[..., 0].long()
    labels = codes[same_code(codes, visual.picked, None)]
    found = model(batch, Moment(1)).losses["mvm"].metrics["mvm/accuracy"]
    torch.testing.assert_close(found, (labels == 1).float().mean())


def test_the_loss_cannot_fall_below_its_bound() -> None:
    model, batch = model_of(), batch_of([0, 3, -1, 5])
    with torch.no_grad():
        model.family.code_table.zero_()[:, 0] = torch.tensor([1.0, -1.0, -1.0])
        model.family.linear.weight.zero_()  # type: ignore[union-attr, operator]
        model.family.linear.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0]))  # type: ignore[union-attr, operator]
    feats = batch.visual["masked"].feats.clone()
    feats[..., 0] = 0
    ids = torch.zeros_like(batch.text["masked"].ids)
    batch = replace(
        batch,
        visual={"masked": batch.visual["masked"]._replace(feats=feats)},
        text={"masked": batch.text["masked"]._replace(ids=ids)},
    )
    loss = model(batch, Moment(1)).losses["mvm"].value
    assert float(loss.detach()) == pytest.approx(math.log(1 + (CODES - 1) * math.exp(-2)), rel=1e-5)


@pytest.mark.parametrize("scope", ["rank", "global"])
def test_nothing_hidden(scope: str) -> None:
    model = model_of(scope=scope)
    padding = torch.ones(SAMPLES, CELLS, dtype=torch.bool)
    padding[1, 3] = False
    loss = model(batch_of([-1, 3, -1, -1], padding), Moment(1)).losses["mvm"].value
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(bool((each.grad == 0).all()) for each in model.parameters() if each.grad is not None)


def test_padding_cannot_change_it() -> None:
    model = model_of()
    mask = torch.arange(CELLS) < torch.tensor([6, 5, 4, 6])[:, None]
    batch = batch_of([0, 3, 1, 5], mask)
    noise = batch.visual["masked"].feats.clone()
    noise[~mask] = 2.0
    noisy = replace(batch, visual={"masked": batch.visual["masked"]._replace(feats=noise)})
    first, second = (model(each, Moment(1)).losses["mvm"].value for each in (batch, noisy))
    torch.testing.assert_close(first, second)
    total, number = by_hand(model, batch)
    torch.testing.assert_close(first, total / number)


@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("picked", [[0, 3, -1, 5], None], ids=["picked", "drawn"])
def test_global_is_one_mean_however_the_batch_is_cut(world: int, number: int, picked: list[int] | None) -> None:
    check_whole(partial(model_of, scope="global"), batch_of(picked), world, number)


def test_rank_is_the_mean_of_the_micro_batches_means() -> None:
    batch = batch_of([0, 3, -1, 5])
    model = model_of()
    means = []
    for rows in (slice(0, 2), slice(2, 4)):
        total, number = by_hand(model, part(batch, rows))
        means.append(total / number)
    found = make_step(model_of, batch, 2)["losses"]["mvm"]
    torch.testing.assert_close(found, torch.stack(means).mean().detach())


def test_draws_change_with_the_step_and_the_seed_alone() -> None:
    model, batch = model_of(), batch_of()

    def loss(at: Moment) -> float:
        return float(model(batch, at).losses["mvm"].value.detach())

    assert loss(Moment(1)) == loss(Moment(1))
    assert len({loss(Moment(step)) for step in range(1, 9)}) > 4
    assert len({loss(Moment(1, seed)) for seed in range(8)}) > 4


class Uncoded(Cells):
    offers = frozenset({"text", "visual", "fuse"})


def test_a_family_without_codes_is_refused() -> None:
    family = Uncoded()
    with pytest.raises(ConfigError, match="codes"):
        PretrainModel(family, {"mvm": mvm.build(mvm.Config(), family)})
