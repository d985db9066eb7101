"""CVLP: what its twin sees and drops, its names, and the tensors of an independent implementation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tests.models import batch_for
from tests.reference import cvlp as reference
from tests.reference.compare import Folder, judge
from tests.reference_folders import copied
from tests.shard_files import reference_folder
from tests.test_lxmert import published
from tests.whole_steps import check_whole
from vlscale import weights
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import cvlp, lxmert
from vlscale.model import Encodings, PretrainModel
from vlscale.nn import momentum
from vlscale.nn.transformer import Stack
from vlscale.objectives import itm, mlm, region_nce
from vlscale.types import Batch, Moment

STACKS = ("text_stack", "visual_stack", "cross_stack")


def model_of() -> PretrainModel:
    """Both networks alike, gains and shifts random, without dropout."""
    torch.manual_seed(0)
    family = cvlp.build(replace(cvlp.tiny(), dropout=0.0))
    for parameter in family.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.2)
    views: dict[str, Any] = {"text": "masked", "visual": "masked"}
    return PretrainModel(
        family,
        {
            "mlm": mlm.build(mlm.Config(soften=0.0, **views), family),
            "itm": itm.build(itm.Config(negatives="loader", **views), family),
            "region_nce": region_nce.build(region_nce.Config(queue=40, queue_start="random"), family),
        },
    )


def batch(size: int = 4) -> Batch:
    config = cvlp.tiny()
    return batch_for(config.inputs, config.vocab, size)


def encodings(model: PretrainModel) -> Encodings:
    given = batch()
    return Encodings(model.family, given, Moment(1), {}, model.momentum_encodings(given, Moment(1)))


def stacks(network: nn.Module | None) -> dict[str, Stack]:
    assert network is not None
    return {name: stack for name in STACKS if isinstance(stack := network.get_submodule(name), Stack)}


def test_the_network_is_lxmerts() -> None:
    with torch.device("meta"):
        ours, theirs = cvlp.build(cvlp.Config()), lxmert.build(lxmert.Config())
    shapes = [{name: each.shape for name, each in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert (ours.config.text_layers, ours.config.visual_layers, ours.config.cross_layers) == (9, 5, 5)


def test_every_layer_of_the_twin_can_be_dropped_and_none_of_the_query_network() -> None:
    model = model_of()
    momentum.drop_layers(model.twin, 0.5, seed=3, step=1)  # type: ignore[arg-type]
    for name, stack in stacks(model.twin).items():
        assert stack.kept is not None, name
        assert len(stack.kept) == len(stack.blocks), name
    assert all(stack.kept is None for stack in stacks(model.family).values())
    drawn = set()
    for step in range(40):
        momentum.drop_layers(model.twin, 0.5, seed=3, step=step)  # type: ignore[arg-type]
        drawn.add(tuple(stack.kept for stack in stacks(model.twin).values()))
    assert len(drawn) > 20  # layers and kinds of layers do not hang together


def test_with_every_2_the_second_layer_alone_may_be_dropped() -> None:
    model = model_of()
    drawn = set()
    for step in range(40):
        momentum.drop_layers(model.twin, 0.5, seed=3, step=step, every=2)  # type: ignore[arg-type]
        drawn |= {stack.kept for stack in stacks(model.twin).values()}
    assert drawn == {(True, True), (True, False)}


def test_a_network_without_layers_is_its_embeddings() -> None:
    model = model_of()
    before = encodings(model).momentum.fused("masked", "clean")
    momentum.drop_layers(model.twin, 1.0, seed=0, step=1)  # type: ignore[arg-type]
    enc, given, family = encodings(model), batch(), model.family
    assert isinstance(family, cvlp.Cvlp)
    bare, regions = enc.momentum.fused("masked", "clean"), given.visual["clean"]
    assert regions.boxes is not None
    assert bare.text is not None
    assert before.visual is not None
    assert bare.visual is not None
    torch.testing.assert_close(bare.visual, family.region_embeddings(regions.feats, regions.boxes))
    torch.testing.assert_close(bare.text, family.text_embeddings(given.text["masked"].ids))
    assert not torch.allclose(before.visual, bare.visual)


def test_a_dropped_cross_layer_skips_both_streams() -> None:
    model = model_of()
    stacks(model.twin)["cross_stack"].kept = (False, True)
    enc = encodings(model)
    text, visual = enc.momentum.text("masked"), enc.momentum.visual("clean")
    found, block = enc.momentum.fused("masked", "clean"), model.twin.cross_stack.blocks["1"]  # type: ignore
    assert text.mask is not None
    assert visual.mask is not None
    assert found.text is not None
    assert found.visual is not None
    hidden = torch.cat([text.hidden, visual.hidden], dim=1)
    want = block(hidden, text.mask[:, None, None], visual.mask[:, None, None])
    torch.testing.assert_close(torch.cat([found.text, found.visual], dim=1), want)


def test_keys_come_from_the_dropped_network_and_all_regions() -> None:
    model = model_of()
    stacks(model.twin)["cross_stack"].kept = (False, False)
    made = model(batch(), Moment(1)).keys["regions"]
    mask = batch().visual["clean"].mask
    assert mask is not None
    alone = encodings(model).momentum.visual("clean").hidden  # as no cross layer runs
    want = F.normalize(alone.flatten(0, 1), dim=1)[mask.flatten()]
    torch.testing.assert_close(made.keys[mask.flatten()], want)


def test_the_twin_has_no_gradient_and_no_head() -> None:
    model = model_of()
    torch.autograd.backward(model.total(model(batch(), Moment(1)).losses, {}))
    assert model.twin is not None
    assert all(parameter.grad is None for parameter in model.twin.parameters())
    own = {id(parameter) for parameter in model.family.parameters()}
    assert {id(online) for online, _ in model.momentum_pairs()} == own


@pytest.mark.parametrize(("world", "number"), [(2, 1), (2, 2)])
def test_ranks_and_micro_batches_change_nothing(world: int, number: int) -> None:
    check_whole(model_of, batch(8), world, number)


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"text_length": 99}])
def test_wrong_sizes(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        cvlp.build(replace(cvlp.tiny(), **wrong))


def test_no_causal_reading() -> None:
    model, enc = model_of(), encodings(model_of())
    with pytest.raises(ConfigError, match="causal"):
        model.family.fuse(enc.text("clean"), enc.visual("clean"), causal=True)


@pytest.fixture
def stored() -> Folder:
    return Folder.open(reference_folder("cvlp"))


def test_both_networks_are_filled() -> None:
    source, both = model_of(), model_of()
    assert isinstance(source.family, cvlp.Cvlp)
    network = {name.removeprefix("bert."): value for name, value in published(source.family).items()}
    tensors = {f"query.bert.{name}": value for name, value in network.items()}
    tensors |= {f"key.bert.{name}": value + 1.0 for name, value in network.items()}
    for parameter in both.parameters():
        nn.init.zeros_(parameter)
    done = weights.fill(both, tensors, cvlp.PUBLISHED)
    assert done.unused == ()
    torch.testing.assert_close(both.family.state_dict(), source.family.state_dict())
    for online, twin in both.momentum_pairs():
        torch.testing.assert_close(twin, online + 1.0)
    alone = PretrainModel(both.family, {"mlm": both.objectives["mlm"]})  # type: ignore[dict-item,arg-type]
    done = weights.fill(alone, tensors, cvlp.PUBLISHED)
    assert all(name.startswith("key.") for name in done.unused)
    del tensors["key.bert.encoder.x_layers.0.lang_inter.dense.bias"]
    with pytest.raises(CheckpointError, match="does not fill"):
        weights.fill(both, tensors, cvlp.PUBLISHED)


def test_the_heads_are_filled(stored: Folder) -> None:
    tensors = stored.tensors("weights.safetensors")
    runner = reference.Runner(stored)
    assert weights.fill(runner.model, tensors, cvlp.PUBLISHED).unused == ("query.cls.predictions.decoder.weight",)
    assert torch.equal(runner.words.head.dense.weight, tensors["query.cls.predictions.transform.dense.weight"])
    assert torch.equal(runner.pairs.head.weight, tensors["query.cls.seq_relationship.weight"])


def test_agrees_with_an_independent_implementation(stored: Folder) -> None:
    report = judge(stored, "cvlp", reference.run(stored))
    assert report.ok
    assert report.not_compared == []


@pytest.mark.parametrize("flags", ["step1/keep_x", "step3/keep_l", "step4/keep_r"])
def test_other_dropped_layers_do_not_agree(stored: Folder, tmp_path: Path, flags: str) -> None:
    folder = copied(stored.path, tmp_path)
    inputs = load_file(folder / "batch.safetensors")
    inputs[flags] = 1 - inputs[flags]
    save_file(inputs, folder / "batch.safetensors")
    changed = Folder.open(folder)
    report = judge(changed, "cvlp", reference.run(changed))
    failed = {row.name for row in report.compared if not row.ok}
    assert f"{flags.partition('/')[0]}/key_regions" in failed
