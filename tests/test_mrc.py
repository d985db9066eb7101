"""Masked region classification, by class and by distribution: by hand, with padding, nothing hidden, over ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import batch_for
from tests.whole_steps import check_whole
from vlscale.families import uniter
from vlscale.model import PretrainModel
from vlscale.objectives import mrc, mrc_kl
from vlscale.types import Batch, Moment

KINDS = {"mrc": mrc, "mrc_kl": mrc_kl}


def model_of(name: str, **options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = uniter.build(replace(uniter.tiny(), dropout=0.0))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    kind: Any = KINDS[name]
    return PretrainModel(family, {name: kind.build(kind.Config(**options), family)})


def batch_of(size: int = 4, **options: Any) -> Batch:
    """Detector distributions that leave several classes out; the background is the best of some regions."""
    config = uniter.tiny()
    batch = batch_for(config.inputs, config.vocab, size, **options)
    masked = batch.visual["masked"]
    assert masked.class_probs is not None
    probs = masked.class_probs**3
    probs[..., 2] = 0.0
    probs[:, 0, 0] += 2.0
    masked = masked._replace(class_probs=probs / probs.sum(dim=2, keepdim=True))
    return replace(batch, visual={**batch.visual, "masked": masked})


def logits_of(model: Any, name: str, batch: Batch) -> Tensor:
    """[M, classes] of the hidden regions, picture by picture."""
    family, head, visual = model.family, model.objectives[name].head, batch.visual["masked"]
    fused = family.fuse(family.encode_text(batch.text["clean"]), family.encode_visual(visual))
    every = head.norm(F.gelu(head.dense(fused.visual))) @ head.decoder.weight.T + head.decoder.bias
    return every[visual.picked]  # type: ignore[no-any-return]


def test_classes_by_hand() -> None:
    model, batch = model_of("mrc"), batch_of()
    probs = batch.visual["masked"].class_probs[batch.visual["masked"].picked]  # type: ignore[index]
    logits = logits_of(model, "mrc", batch)
    terms, right = [], []
    for row, distribution in zip(logits, probs.tolist(), strict=True):
        label = max(range(1, len(distribution)), key=distribution.__getitem__)
        terms.append(row.exp().sum().log() - row[label])
        right.append(float(row.argmax() == label))
    assert any(distribution.argmax() == 0 for distribution in probs)  # the background would have won
    loss = model(batch, Moment(1)).losses["mrc"]
    torch.testing.assert_close(loss.value, torch.stack(terms).mean())
    assert loss.metrics["mrc/accuracy"].item() == pytest.approx(sum(right) / len(right))
    assert model.counts(batch)["mrc"] == len(terms)


def test_the_detectors_own_classes() -> None:
    model, batch = model_of("mrc", labels="detector"), batch_of()
    visual = batch.visual["masked"]
    labels = torch.arange(visual.feats.shape[1]).expand(visual.feats.shape[:2])
    batch = replace(batch, visual={**batch.visual, "masked": visual._replace(classes=labels, class_probs=None)})
    want = F.cross_entropy(logits_of(model, "mrc", batch), labels[visual.picked])  # type: ignore[index]
    torch.testing.assert_close(model(batch, Moment(1)).losses["mrc"].value, want)


@pytest.mark.parametrize("reduction", ["regions", "elements"])
def test_distributions_by_hand(reduction: str) -> None:
    model, batch = model_of("mrc_kl", reduction=reduction), batch_of()
    probs = batch.visual["masked"].class_probs[batch.visual["masked"].picked]  # type: ignore[index]
    logits = logits_of(model, "mrc_kl", batch)
    total = torch.zeros(())
    for row, distribution in zip(logits, probs, strict=True):
        for score, target in zip(row, distribution, strict=True):
            if target > 0:
                total = total + target * (target.log() - (score - row.exp().sum().log()))
    number = logits.numel() if reduction == "elements" else len(logits)
    loss = model(batch, Moment(1)).losses["mrc_kl"]
    torch.testing.assert_close(loss.value, total / number)
    agreed = (logits.argmax(dim=1) == probs.argmax(dim=1)).float().mean()
    torch.testing.assert_close(loss.metrics["mrc_kl/accuracy"], agreed)
    gradient, want = (torch.autograd.grad(each, logits_weight(model)) for each in (loss.value, total / number))
    torch.testing.assert_close(gradient, want)


def logits_weight(model: Any) -> Tensor:
    return model.objectives["mrc_kl"].head.decoder.weight  # type: ignore[no-any-return]


def test_a_head_that_says_what_the_detector_said_has_no_divergence() -> None:
    model, batch = model_of("mrc_kl"), batch_of()
    logits = logits_of(model, "mrc_kl", batch).detach()
    visual = batch.visual["masked"]
    probs = visual.class_probs.clone()  # type: ignore[union-attr]
    probs[visual.picked] = logits.softmax(dim=1)
    batch = replace(batch, visual={**batch.visual, "masked": visual._replace(class_probs=probs)})
    assert model(batch, Moment(1)).losses["mrc_kl"].value.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_padding_cannot_change_it(name: str) -> None:
    model, batch = model_of(name), batch_of()
    visual = batch.visual["masked"]
    assert visual.mask is not None
    assert visual.picked is not None
    assert visual.class_probs is not None
    gap = ~visual.mask
    spoilt = visual._replace(
        feats=visual.feats.masked_fill(gap[..., None], 9.0),
        class_probs=visual.class_probs.masked_fill(gap[..., None], 0.7),
        picked=visual.picked | gap,
    )
    changed = replace(batch, visual={**batch.visual, "masked": spoilt})
    losses = [model(each, Moment(1)).losses[name].value for each in (batch, changed, batch_of(padding=3))]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


@pytest.mark.parametrize("name", KINDS)
def test_nothing_hidden_gives_zero_and_zero_gradients(name: str) -> None:
    model, batch = model_of(name), batch_of()
    visual = batch.visual["masked"]
    none = visual._replace(picked=torch.zeros_like(visual.picked))  # type: ignore[arg-type]
    loss = model(replace(batch, visual={**batch.visual, "masked": none}), Moment(1)).losses[name]
    assert loss.value.item() == 0.0
    assert all(metric.item() == 0.0 for metric in loss.metrics.values())
    loss.value.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), parameter_name


def class_model() -> PretrainModel:
    return model_of("mrc")


def distribution_model() -> PretrainModel:
    return model_of("mrc_kl", reduction="elements")


@pytest.mark.parametrize("make", [class_model, distribution_model])
@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int, make: Any) -> None:
    check_whole(make, batch_of(8), world, number)
