"""The contrast of words, tags and regions: by hand, its classes, and what may not change it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import batch_for
from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families import oscar
from vlscale.model import PretrainModel
from vlscale.objectives import tag_contrast
from vlscale.types import Batch, Moment

SWAPPED = torch.tensor([0, 1, 2, 2, 0, 1, 1, 0])


def model_of(classes: Literal[2, 3] = 3) -> PretrainModel:
    torch.manual_seed(0)
    family = oscar.build(replace(oscar.tiny(), dropout=0.0))
    model = PretrainModel(family, {"tag_contrast": tag_contrast.build(tag_contrast.Config(classes=classes), family)})
    with torch.no_grad():  # far from the start, where all logits are nearly 0
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(padding: int = 0, size: int = 4) -> Batch:
    config = oscar.tiny()
    return replace(batch_for(config.inputs, config.vocab, size, padding), tags_swapped=SWAPPED[:size])


def pooled(model: PretrainModel, given: Batch) -> Tensor:
    family = model.family
    made = family.fuse(family.encode_text(given.text["masked"]), family.encode_visual(given.visual["clean"])).pooled
    assert made is not None
    return made


@pytest.mark.parametrize(("classes", "labels"), [(3, [0, 1, 2, 2]), (2, [0, 1, 1, 1])])
def test_by_hand(classes: Literal[2, 3], labels: list[int]) -> None:
    model, given = model_of(classes), batch()
    head: Any = model.objectives["tag_contrast"].head
    logits = pooled(model, given) @ head.weight.T + head.bias
    chances = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    want = -torch.stack([chances[row, label].log() for row, label in enumerate(labels)]).mean()
    loss = model(given, Moment(1)).losses["tag_contrast"]
    torch.testing.assert_close(loss.value, want)
    assert loss.value.dtype == torch.float32
    right = (logits.argmax(dim=1) == torch.tensor(labels)).float().mean()
    torch.testing.assert_close(loss.metrics["tag_contrast/accuracy"], right)
    given_gradient = torch.autograd.grad(loss.value, head.weight)
    torch.testing.assert_close(given_gradient, torch.autograd.grad(want, head.weight))


def test_plain_yes_or_no_and_nothing_said() -> None:
    model, given = model_of(2), batch()
    head: Any = model.objectives["tag_contrast"].head
    logits = head(pooled(model, given))
    for swapped, labels in ((torch.tensor([True, False, True, True]), [1, 0, 1, 1]), (None, [0, 0, 0, 0])):
        loss = model(replace(given, tags_swapped=swapped), Moment(1)).losses["tag_contrast"].value
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(labels)))


def test_padding_cannot_change_the_loss() -> None:
    model = model_of()
    losses = [model(batch(padding), Moment(1)).losses["tag_contrast"].value for padding in (0, 3)]
    torch.testing.assert_close(*losses)


def test_flops_and_passes() -> None:
    objective = model_of().objectives["tag_contrast"]
    assert objective.head_flops(batch()) == (2 * 4 * 16 * 3, 0)  # type: ignore[operator]
    names = {"encode_text:masked", "encode_visual:clean", "fuse:masked:clean"}
    assert objective.passes() == dict.fromkeys(names, 1.0)  # type: ignore[operator]


def test_refused() -> None:
    with pytest.raises(ConfigError, match="write 2"):
        model_of(4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int) -> None:
    check_whole(model_of, batch(size=8), world, number)
