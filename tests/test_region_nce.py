"""Contrast of regions: by hand, with padding, over ranks, and against stored features of an independent code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.compare import Folder, compare
from tests.shard_files import reference_folder
from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.nn import contrast
from vlscale.objectives import region_nce
from vlscale.types import Batch, Dims, Fused, Inputs, Moment, Stream, Text, Visual

SAMPLES, REGIONS, WIDTH = 4, 5, 6


class Regions(Family):
    """Each region, and the mean of the text's ids, through one linear layer; `Fused.visual` is what counts."""

    offers = frozenset({"text", "visual", "fuse", "regions", "detector"})

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.dims, self.inputs = Dims(text=width, visual=width, fused=width), Inputs(0, 4, False)
        self.linear = nn.Linear(width, width)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def encode_text(self, text: Text) -> Stream:
        hidden = text.ids[..., None].float().expand(-1, -1, self.dims.text)
        return Stream(hidden, text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        return Stream(self.linear(visual.feats), visual.mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        assert text is not None
        assert visual is not None
        return Fused(text=text.hidden, visual=visual.hidden + text.hidden.mean(dim=1, keepdim=True), pooled=None)


def model_of(width: int = WIDTH, moved: bool = True, **options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = Regions(width)
    config = region_nce.Config(**{"queue": 24, **options})
    model = PretrainModel(family, {"region_nce": region_nce.build(config, family)})
    assert model.twin is not None
    if moved:
        with torch.no_grad():
            for twin in model.twin.parameters():
                twin.add_(0.3 * torch.randn_like(twin))
    return model


def batch_of(size: int = SAMPLES, mask: Tensor | None = None, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(size, REGIONS, WIDTH, generator=generator)
    picked = torch.rand(size, REGIONS, generator=generator) < 0.4
    picked[:, 0] = True
    views = {
        "clean": Visual(clean, mask),
        "masked": Visual(clean.masked_fill(picked[..., None], 0.0), mask, None, picked),
    }
    ids = torch.randint(0, 3, (size, 4), generator=generator)
    return Batch({"masked": Text(ids, torch.ones_like(ids, dtype=torch.bool))}, views, torch.arange(size) + 10)


def padded(size: int = SAMPLES) -> Tensor:
    """Pictures with 5, 3, 4, 2, 5, ... regions."""
    return torch.arange(REGIONS) < torch.tensor([5, 3, 4, 2])[torch.arange(size) % 4, None]


def states(network: Any, batch: Batch, view: str, unit: bool = True) -> Tensor:
    made = network.fuse(network.encode_text(batch.text["masked"]), network.encode_visual(batch.visual[view])).visual
    rows: Tensor = made.flatten(0, 1)
    return F.normalize(rows, dim=1) if unit else rows


@pytest.mark.parametrize("mask", [None, padded()])
@pytest.mark.parametrize("regions", ["all", "masked"])
def test_by_hand(regions: str, mask: Tensor | None) -> None:
    model, batch = model_of(regions=regions, queue_start="random", temperature=0.2), batch_of(mask=mask)
    queries, keys = states(model.family, batch, "masked"), states(model.twin, batch, "clean")
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ model.key_queues()["regions"].keys.T], 1) / 0.2
    counted = torch.ones(SAMPLES, REGIONS, dtype=torch.bool) if mask is None else mask
    picked = batch.visual["masked"].picked
    assert picked is not None
    counted = (counted & picked if regions == "masked" else counted).flatten()
    want = F.cross_entropy(logits[counted], torch.zeros(int(counted.sum()), dtype=torch.int64))
    loss = model(batch, Moment(1)).losses["region_nce"]
    torch.testing.assert_close(loss.value, want)
    torch.testing.assert_close(loss.metrics["region_nce/cosine"], (queries * keys).sum(1)[counted].mean().detach())
    assert model.counts(batch)["region_nce"] == counted.sum()
    weight: Any = model.family.linear.weight  # type: ignore[union-attr]
    given = torch.autograd.grad(loss.value, weight)
    torch.testing.assert_close(given, torch.autograd.grad(want, weight))


def test_a_head_stands_before_the_contrast_and_the_twin_has_its_own() -> None:
    model, batch = model_of(embed=3, queue_start="random", temperature=0.2), batch_of()
    head, twin = model.objectives["region_nce"].head, model.objectives["region_nce"].head_twin
    assert (head, twin) in model.objectives["region_nce"].twins()
    with torch.no_grad():
        for parameter in [*head.parameters(), *twin.parameters()]:
            parameter.normal_(std=0.5)
    (queries, keys) = (
        F.normalize(made(states(network, batch, view, unit=False)), dim=1)
        for network, made, view in ((model.family, head, "masked"), (model.twin, twin, "clean"))
    )
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ model.key_queues()["regions"].keys.T], 1) / 0.2
    made = model(batch, Moment(1))
    want = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    torch.testing.assert_close(made.losses["region_nce"].value, want)
    torch.testing.assert_close(made.keys["regions"].keys, keys.detach())
    moved = {id(twin) for _, twin in model.momentum_pairs()}
    assert all(id(parameter) in moved and not parameter.requires_grad for parameter in twin.parameters())


def test_an_empty_queue_gives_exactly_zero() -> None:
    model, batch = model_of(), batch_of()
    loss = model(batch, Moment(1)).losses["region_nce"].value
    assert loss.item() == 0.0
    loss.backward()
    family: Any = model.family
    assert not family.linear.weight.grad.any()


def test_keys_are_all_regions_in_order_and_padding_is_none() -> None:
    model = model_of()
    batch = batch_of()
    made = model(batch, Moment(1)).keys["regions"]
    torch.testing.assert_close(made.keys, states(model.twin, batch, "clean").detach())
    mask = padded()
    feats = batch.visual["clean"].feats.masked_fill(~mask[..., None], 1e6)
    views = {**batch.visual, "clean": Visual(feats, mask)}
    with_padding = model(replace(batch, visual=views), Moment(1)).keys["regions"]
    real = mask.flatten()
    torch.testing.assert_close(with_padding.keys[real], made.keys[real])
    for row in (~real).nonzero()[:, 0].tolist():
        same = (made.keys - with_padding.keys[row]).abs().amax(dim=1) < 1e-6
        (found,) = same.nonzero()[:, 0].tolist()
        assert real[found]
        assert found // REGIONS == row // REGIONS
    torch.testing.assert_close(with_padding.keys[8:10], made.keys[5:7])  # picture 1 lacks its last two: its first two


def test_padding_cannot_change_a_loss() -> None:
    mask, values = padded(), []
    for filling in (0.0, 5.0):
        batch = batch_of(mask=mask)
        views = {
            view: each._replace(feats=each.feats.masked_fill(~mask[..., None], filling))
            for view, each in batch.visual.items()
        }
        model = model_of()
        made = model(replace(batch, visual=views), Moment(1))
        model.commit([made.keys], 1, "step")
        values.append(model(replace(batch, visual=views), Moment(2)).losses["region_nce"].value)
    torch.testing.assert_close(values[0], values[1])


def test_refused() -> None:
    with pytest.raises(ConfigError, match="give a queue"):
        model_of(queue=0)


def random_model() -> PretrainModel:
    return model_of(queue_start="random", regions="masked")


def model_with_head() -> PretrainModel:
    return model_of(queue_start="random", embed=4)


def sharded_model() -> PretrainModel:
    return model_of(queue_start="random", queue_store="sharded", queue=28)


@pytest.mark.parametrize("make", [random_model, sharded_model, model_with_head])
@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int, make: Any) -> None:
    check_whole(make, batch_of(8, padded(8)), world, number)


@pytest.fixture
def stored() -> Folder:
    return Folder.open(reference_folder("cvlp"))


def given_features(queries: Tensor, keys: Tensor, picked: Tensor | None = None) -> Batch:
    """[B, R, D] each: what both networks make of the regions."""
    ids = torch.zeros(len(queries), 1, dtype=torch.int64)
    views = {"masked": Visual(queries, picked=picked), "clean": Visual(keys)}
    return Batch({"masked": Text(ids, ids == 0)}, views, torch.arange(len(queries)))


def agrees(name: str, ours: Tensor, outputs: dict[str, Tensor]) -> None:
    row = compare(name, ours.reshape(outputs[name].shape), outputs[name])
    assert row.ok, row


def test_the_queue_alone_agrees_with_stored_losses(stored: Folder) -> None:
    """Five pushes of three into seven places, from empty."""
    inputs, outputs = stored.tensors("batch.safetensors"), load_file(stored.path / "outputs.safetensors")
    queries, keys = inputs["queue_unit/q"], inputs["queue_unit/k"]
    model = model_of(width=4, moved=False, queue=7, temperature=stored.config["tau"])
    queue = model.key_queues()["regions"]
    for step in range(1, 6):
        made = model(given_features(queries[step - 1 : step], keys[step - 1 : step]), Moment(step))
        agrees(f"queue_unit/step{step}/loss", made.losses["region_nce"].value, outputs)
        model.commit([made.keys], step, "step")
        agrees(f"queue_unit/step{step}/queue", queue.keys, outputs)
        agrees(f"queue_unit/step{step}/ptr", queue.pointer, outputs)
        agrees(f"queue_unit/step{step}/valid", queue.filled, outputs)


def test_steps_agree_with_stored_features(stored: Folder) -> None:
    """Logits, both losses and the queue of an independent reference, from the features that its network made."""
    inputs, outputs = stored.tensors("batch.safetensors"), load_file(stored.path / "outputs.safetensors")
    config = stored.config
    shape = (config["B"], config["n"], config["hidden"])
    options = {"width": config["hidden"], "moved": False, "queue": config["K"], "temperature": config["tau"]}
    model, masked = model_of(**options), model_of(**options, regions="masked")
    queue = model.key_queues()["regions"]
    queue.keys.copy_(inputs["queue_before"])
    queue.pointer.fill_(inputs["queue_ptr_before"])
    queue.filled.fill_(inputs["queue_valid_before"])
    for step in range(1, config["steps"] + 1):
        name = f"step{step}/"
        queries, keys = outputs[f"{name}query_regions"], outputs[f"{name}key_regions"]
        batch = given_features(queries.view(shape), keys.view(shape), inputs[f"{name}region_mask"].bool())
        masked.key_queues()["regions"].load_state_dict(queue.state_dict())
        made = model(batch, Moment(step))
        temperature = torch.tensor([config["tau"]])
        against = contrast.logits(queries, queue.keys[queue.valid()], temperature)
        positives = (queries * keys).sum(dim=1, keepdim=True) / temperature
        agrees(f"{name}contrast_logits", torch.cat([positives, against], dim=1), outputs)
        agrees(f"{name}loss_contrast", made.losses["region_nce"].value, outputs)
        alone = masked(batch, Moment(step)).losses["region_nce"].value
        agrees(f"{name}loss_contrast_masked_regions_only", alone, outputs)
        model.commit([made.keys], step, "step")
        agrees(f"{name}queue_after", queue.keys, outputs)
        agrees(f"{name}queue_ptr_after", queue.pointer, outputs)
        agrees(f"{name}queue_valid_after", queue.filled, outputs)
