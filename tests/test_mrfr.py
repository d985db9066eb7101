"""Masked region feature regression: by hand, tied and untied, with padding, with nothing hidden, over ranks."""

from __future__ import annotations

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
from vlscale.model import PretrainModel
from vlscale.objectives import mrfr
from vlscale.types import Batch, Moment


def model_of(**options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = uniter.build(replace(uniter.tiny(), dropout=0.0))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return PretrainModel(family, {"mrfr": mrfr.build(mrfr.Config(**options), family)})


def batch_of(size: int = 4, **options: Any) -> Batch:
    config = uniter.tiny()
    return batch_for(config.inputs, config.vocab, size, **options)


def features(model: Any, batch: Batch, tied: bool) -> Tensor:
    """[B, R, F] of every region, hidden or not."""
    family, head = model.family, model.objectives["mrfr"].head
    fused = family.fuse(family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["masked"]))
    inner = head.norm(F.gelu(head.dense(fused.visual)))
    if tied:
        return inner @ family.region_embeddings.projection.weight + head.bias  # type: ignore[no-any-return]
    return inner @ head.decoder.weight.T + head.decoder.bias  # type: ignore[no-any-return]


@pytest.mark.parametrize("decoder", ["own", "tied"])
@pytest.mark.parametrize("reduction", ["elements", "regions"])
def test_by_hand(decoder: str, reduction: str) -> None:
    model, batch = model_of(decoder=decoder, reduction=reduction), batch_of()
    visual = batch.visual["masked"]
    found = features(model, batch, decoder == "tied")
    terms = []
    for sample in range(4):
        for region in range(visual.feats.shape[1]):
            if visual.picked[sample, region]:  # type: ignore[index]
                squares = (found[sample, region] - visual.targets[sample, region]) ** 2  # type: ignore[index]
                terms.append(squares.mean() if reduction == "elements" else squares.sum())
    want = torch.stack(terms).mean()
    loss = model(batch, Moment(1)).losses["mrfr"]
    torch.testing.assert_close(loss.value, want)
    assert model.counts(batch)["mrfr"] == len(terms)
    weight: Any = model.family.region_embeddings.projection.weight  # type: ignore[union-attr]
    torch.testing.assert_close(torch.autograd.grad(loss.value, weight), torch.autograd.grad(want, weight))


def test_tying_adds_no_matrix_and_needs_a_family_that_has_one() -> None:
    names = {name for name, _ in model_of(decoder="tied").objectives.named_parameters()}
    assert not any("decoder" in name for name in names)
    family = albef.build(albef.tiny())
    with pytest.raises(ConfigError, match="tied_regions"):
        PretrainModel(family, {"mrfr": mrfr.build(mrfr.Config(decoder="tied"), family)})


def test_padding_cannot_change_it() -> None:
    model, batch = model_of(), batch_of()
    visual = batch.visual["masked"]
    assert visual.mask is not None
    assert visual.picked is not None
    gap = ~visual.mask
    spoilt = visual._replace(
        feats=visual.feats.masked_fill(gap[..., None], 9.0),
        targets=torch.rand_like(visual.feats).where(gap[..., None], visual.targets),  # type: ignore[arg-type]
        picked=visual.picked | gap,
    )
    changed = replace(batch, visual={**batch.visual, "masked": spoilt})
    assert gap.any()
    losses = [model(each, Moment(1)).losses["mrfr"].value for each in (batch, changed, batch_of(padding=3))]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    assert model.counts(changed)["mrfr"] == model.counts(batch)["mrfr"]


def test_nothing_hidden_gives_zero_and_zero_gradients() -> None:
    model, batch = model_of(decoder="tied"), batch_of()
    visual = batch.visual["masked"]
    none = visual._replace(picked=torch.zeros_like(visual.picked))  # type: ignore[arg-type]
    loss = model(replace(batch, visual={**batch.visual, "masked": none}), Moment(1)).losses["mrfr"].value
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_flops_equal_torchs_counter() -> None:
    model, batch = model_of(decoder="tied"), batch_of()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(1))
    assert step_flops(model, batch).forward == pytest.approx(counter.get_total_flops(), rel=0.01)


def tied_model() -> PretrainModel:
    return model_of(decoder="tied")


@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int) -> None:
    check_whole(tied_model, batch_of(8), world, number)
