"""Answers of questions by hand: who counts, padding of the batch by unanswered pairs, ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.whole_steps import check_whole
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.objectives import answer
from vlscale.types import IGNORE, Batch, Dims, Fused, Inputs, Moment, Stream, Text, Visual

WIDTH, POOLED, ANSWERS = 6, 4, 9


class Pairs(Family):
    """A text beside a picture as one vector of a width of its own."""

    offers = frozenset({"text", "visual", "fuse"})

    def __init__(self, pooled: int = POOLED) -> None:
        super().__init__()
        self.dims, self.inputs = Dims(WIDTH, WIDTH, WIDTH, pooled=pooled), Inputs(0, 4, False)
        self.linear = nn.Linear(WIDTH, pooled or WIDTH)

    def encode_text(self, text: Text) -> Stream:
        return Stream(text.ids[..., None].float().expand(-1, -1, WIDTH), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        return Stream(visual.feats, visual.mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        assert text is not None
        assert visual is not None
        pooled = self.linear(text.hidden.mean(dim=1) + visual.hidden.mean(dim=1))
        return Fused(text=text.hidden, visual=visual.hidden, pooled=pooled)


def model_of(pooled: int = POOLED, **options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = Pairs(pooled)
    config = answer.Config(**{"answers": ANSWERS, **options})
    model = PretrainModel(family, {"answer": answer.build(config, family)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def batch_of(answers: list[int] | None, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(size, 3, WIDTH, generator=generator)
    ids = torch.randint(0, 3, (size, 2), generator=generator)
    return Batch(
        {"masked": Text(ids, ids >= 0)},
        {"masked": Visual(feats)},
        torch.arange(size),
        answers=None if answers is None else torch.tensor(answers),
    )


def logits(model: Any, batch: Batch) -> Tensor:
    """By hand."""
    text, feats = batch.text["masked"].ids.float().mean(dim=1), batch.visual["masked"].feats.mean(dim=1)
    head = model.objectives["answer"].head
    hidden = F.gelu(head.dense(model.family.linear(text[:, None] + feats)))
    hidden = (hidden - hidden.mean(dim=1, keepdim=True)) / hidden.std(dim=1, keepdim=True, unbiased=False)
    out: Tensor = head.decoder(hidden * head.norm.weight + head.norm.bias)
    return out


def test_by_hand() -> None:
    model, batch = model_of(), batch_of([3, IGNORE, 0, 8])
    scores = logits(model, batch)
    best = int(scores[3].argmax())
    assert batch.answers is not None
    batch.answers[3] = best
    answered = ((0, 3), (2, 0), (3, best))
    terms = [scores[row].exp().sum().log() - scores[row, label] for row, label in answered]
    want = torch.stack(terms).mean()
    loss = model(batch, Moment(1)).losses["answer"]
    torch.testing.assert_close(loss.value, want)
    right = sum(int(scores[row].argmax()) == label for row, label in answered)
    assert right > 0
    assert loss.metrics["answer/accuracy"].item() == pytest.approx(right / 3)
    for name, parameter in model.named_parameters():
        (ours,) = torch.autograd.grad(loss.value, parameter, retain_graph=True)
        (theirs,) = torch.autograd.grad(want, parameter, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_head_has_twice_the_width_of_the_pair() -> None:
    for pooled, width in ((POOLED, POOLED), (0, WIDTH)):
        head: Any = model_of(pooled).objectives["answer"].head
        assert head.dense.weight.shape == (2 * width, width)
        assert head.decoder.weight.shape == (ANSWERS, 2 * width)


def test_pairs_without_an_answer_do_not_count() -> None:
    model, batch = model_of(), batch_of([3, IGNORE, 0, IGNORE])
    feats = batch.visual["masked"].feats.clone()
    feats[1] = 100.0
    feats[3] = -7.0
    other = replace(batch, visual={"masked": Visual(feats)})
    values = [model(each, Moment(1)).losses["answer"].value for each in (batch, other)]
    assert torch.equal(values[0], values[1])
    assert model.counts(batch)["answer"] == 2


@pytest.mark.parametrize("answers", [None, [IGNORE] * 4])
def test_no_answer_gives_zero_and_zero_gradients(answers: list[int] | None) -> None:
    model, batch = model_of(), batch_of(answers)
    loss = model(batch, Moment(1)).losses["answer"]
    assert loss.value.item() == 0.0
    assert loss.metrics["answer/accuracy"] == 0.0
    assert model.counts(batch)["answer"] == 0
    loss.value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_ranks_and_micro_batches_change_nothing(world: int, number: int) -> None:
    """One micro-batch of the first rank has no answer at all."""
    check_whole(model_of, batch_of([IGNORE, IGNORE, 1, 2, 3, IGNORE, 5, IGNORE], 8), world, number)


def test_scope_rank_has_no_count() -> None:
    assert model_of(scope="rank").counts(batch_of([1, 2, 3, 4])) == {}


def test_flops_equal_torchs_counter() -> None:
    model, batch = model_of(), batch_of([3, IGNORE, 0, 8])
    objective: Any = model.objectives["answer"]
    with FlopCounterMode(display=False) as counter:
        objective.head(torch.randn(3, POOLED))
    assert objective.head_flops(batch)[0] == counter.get_total_flops()
