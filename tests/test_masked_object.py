"""Masked object prediction by hand: classes and attributes weighed by confidence, features where hidden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.objectives import masked_object
from vlscale.types import Batch, Dims, Fused, Inputs, Moment, Stream, Text, Visual

SAMPLES, REGIONS, WIDTH, FEATS, CLASSES, ATTRIBUTES = 4, 5, 6, 7, 8, 3


class Regions(Family):
    """Each region through one linear layer."""

    offers = frozenset({"text", "visual", "fuse", "regions", "detector"})

    def __init__(self) -> None:
        super().__init__()
        self.dims = Dims(WIDTH, WIDTH, WIDTH, feats=FEATS, classes=CLASSES)
        self.inputs = Inputs(0, 4, False)
        self.linear = nn.Linear(FEATS, WIDTH)

    def encode_text(self, text: Text) -> Stream:
        return Stream(text.ids[..., None].float(), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        return Stream(self.linear(visual.feats), visual.mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        assert visual is not None
        return Fused(text=None, visual=visual.hidden, pooled=None)


def model_of(**options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = Regions()
    config = masked_object.Config(**{"attribute_classes": ATTRIBUTES, **options})
    model = PretrainModel(family, {"masked_object": masked_object.build(config, family)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def padded(size: int = SAMPLES) -> Tensor:
    """Pictures with 5, 3, 4, 2, 5, ... regions."""
    return torch.arange(REGIONS) < torch.tensor([5, 3, 4, 2])[torch.arange(size) % 4, None]


def batch_of(size: int = SAMPLES, mask: Tensor | None = None, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    feats = 2 * torch.randn(size, REGIONS, FEATS, generator=generator)
    picked = torch.rand(size, REGIONS, generator=generator) < 0.4
    picked[:, 0] = True
    masked = Visual(
        feats.masked_fill(picked[..., None], 0.0),
        mask,
        picked=picked,
        targets=feats,
        classes=torch.randint(0, CLASSES, (size, REGIONS), generator=generator),
        class_confidence=torch.rand(size, REGIONS, generator=generator),
        attributes=torch.randint(0, ATTRIBUTES, (size, REGIONS), generator=generator),
        attribute_confidence=torch.rand(size, REGIONS, generator=generator),
    )
    ids = torch.zeros(size, 1, dtype=torch.int64)
    return Batch({"masked": Text(ids, ids == 0)}, {"masked": masked}, torch.arange(size))


def changed(batch: Batch, **fields: Any) -> Batch:
    return replace(batch, visual={"masked": batch.visual["masked"]._replace(**fields)})


def naive(model: Any, batch: Batch, hidden_only: bool = False) -> dict[str, Tensor]:
    """Region by region, as the authors' formulas read."""
    visual, head = batch.visual["masked"], model.objectives["masked_object"].head
    mask = torch.ones(visual.feats.shape[:2], dtype=torch.bool) if visual.mask is None else visual.mask
    sums = {"objects": torch.zeros(()), "attributes": torch.zeros(()), "features": torch.zeros(())}
    for sample, region in mask.nonzero().tolist():
        state = model.family.linear(visual.feats[sample, region])
        state = F.gelu(head.dense(state))
        centred = state - state.mean()
        state = centred / (centred.pow(2).mean() + 1e-12).sqrt() * head.norm.weight + head.norm.bias
        counts = visual.picked[sample, region] or not hidden_only
        for part, labels, confidence in (
            ("objects", visual.classes, visual.class_confidence),
            ("attributes", visual.attributes, visual.attribute_confidence),
        ):
            logits = head.decoders[part](state)
            term = logits.exp().sum().log() - logits[labels[sample, region]]
            sums[part] = sums[part] + term * confidence[sample, region] * counts
        off = (head.decoders["features"](state) - visual.targets[sample, region]).abs()
        smooth = torch.where(off < 1, off * off / 2, off - 0.5).mean()
        sums["features"] = sums["features"] + smooth * visual.picked[sample, region]
    return {part: total / mask.sum() / 0.15 for part, total in sums.items()}


@pytest.mark.parametrize("mask", [None, padded()])
@pytest.mark.parametrize("labelled", ["all", "hidden"])
def test_by_hand(labelled: str, mask: Tensor | None) -> None:
    model, batch = model_of(labelled=labelled), batch_of(mask=mask)
    loss = model(batch, Moment(1)).losses["masked_object"]
    want = naive(model, batch, hidden_only=labelled == "hidden")
    for part, value in want.items():
        torch.testing.assert_close(loss.metrics[f"masked_object/{part}"], value.detach())
    total = torch.stack(list(want.values())).sum()
    torch.testing.assert_close(loss.value, total)
    for name, parameter in model.named_parameters():
        (ours,) = torch.autograd.grad(loss.value, parameter, retain_graph=True)
        (theirs,) = torch.autograd.grad(total, parameter, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_parts_alone_add_up() -> None:
    whole, batch = model_of(), batch_of()
    state, total = whole.state_dict(), torch.zeros(())
    for part in masked_object.PARTS:
        model = model_of(parts=(part,))
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        loss = model(batch, Moment(1)).losses["masked_object"]
        shares = {f"masked_object/{part}_accuracy"} - {"masked_object/features_accuracy"}
        assert set(loss.metrics) == {f"masked_object/{part}"} | shares
        total = total + loss.value
    torch.testing.assert_close(whole(batch, Moment(1)).losses["masked_object"].value, total)


def test_padding_cannot_change_it() -> None:
    mask, values = padded(), []
    for filling in (0.0, 5.0):
        batch = batch_of(mask=mask)
        visual = batch.visual["masked"]
        assert visual.targets is not None
        assert visual.picked is not None
        assert visual.class_confidence is not None
        assert visual.classes is not None
        padding = ~mask
        other = changed(
            batch,
            feats=visual.feats.masked_fill(padding[..., None], filling),
            targets=visual.targets.masked_fill(padding[..., None], filling),
            picked=visual.picked | (padding & (filling > 0)),
            class_confidence=visual.class_confidence.masked_fill(padding, filling),
            classes=visual.classes.masked_fill(padding, int(filling)),
        )
        model = model_of()
        values.append(model(other, Moment(1)).losses["masked_object"].value)
        assert model.counts(other)["masked_object"] == mask.sum()
    assert torch.equal(values[0], values[1])


def test_nothing_hidden_leaves_classes_alone() -> None:
    model, batch = model_of(), batch_of()
    none = changed(batch, picked=torch.zeros(SAMPLES, REGIONS, dtype=torch.bool))
    loss = model(none, Moment(1)).losses["masked_object"]
    assert loss.metrics["masked_object/features"] == 0.0
    assert loss.metrics["masked_object/objects"] > 0.0
    loss.value.backward()
    head: Any = model.objectives["masked_object"].head
    assert not head.decoders["features"].weight.grad.any()
    assert head.decoders["objects"].weight.grad.any()


def test_no_region_at_all_gives_zero_and_zero_gradients() -> None:
    model = model_of()
    batch = batch_of(mask=torch.zeros(SAMPLES, REGIONS, dtype=torch.bool))
    loss = model(batch, Moment(1)).losses["masked_object"].value
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_ranks_and_micro_batches_change_nothing(world: int, number: int) -> None:
    check_whole(model_of, batch_of(8, padded(8)), world, number)


def test_scope_rank_has_no_count() -> None:
    assert model_of(scope="rank").counts(batch_of()) == {}


def test_flops_equal_torchs_counter() -> None:
    model, batch = model_of(), batch_of(mask=padded())
    objective: Any = model.objectives["masked_object"]
    mask = batch.visual["masked"].mask
    picked = batch.visual["masked"].picked
    assert mask is not None
    assert picked is not None
    states = torch.randn(int(mask.sum()), WIDTH)
    with FlopCounterMode(display=False) as counter:
        objective.head(states, picked[mask])
    assert objective.head_flops(batch)[0] == counter.get_total_flops()


@pytest.mark.parametrize("parts", [("objects", "colours"), ()])
def test_unknown_parts_are_refused(parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="objects, attributes, features"):
        model_of(parts=parts)
