"""Contrast within one modality: formulas by hand, MoCo's and TCL's, and a step in parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import albef_batch
from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families import albef
from vlscale.flops import step_flops
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import imc, itc
from vlscale.types import Batch, Moment

TEMPERATURE = 0.07
TWO_VIEWS: dict[str, Any] = {"momentum_visual": "augmented"}


def model_of(with_itc: bool = False, **options: Any) -> PretrainModel:
    """ALBEF's miniature, its twin elsewhere."""
    torch.manual_seed(0)
    family = albef.build(replace(albef.tiny(), dropout=0.0))
    config = imc.Config(**{"queue": 8, **options})
    objectives: dict[str, Any] = {"imc": imc.build(config, family)}
    if with_itc:
        shared = {"queue": config.queue, "scope": config.scope, "queue_dtype": config.queue_dtype}
        objectives["itc"] = itc.build(itc.Config(momentum_visual=config.momentum_visual, **shared), family)  # type: ignore[arg-type]
    model = PretrainModel(family, objectives)
    with torch.no_grad():
        for _, twin in model.momentum_pairs():
            twin.add_(0.1 * torch.randn_like(twin))
    return model


def two_views(size: int = 4) -> Batch:
    batch = albef_batch(size)
    return replace(batch, visual={**batch.visual, "augmented": albef_batch(size, seed=1).visual["clean"]})


def encodings(model: PretrainModel, batch: Batch) -> Encodings:
    at = Moment(1)
    return Encodings(model.family, batch, at, model.key_queues(), model.momentum_encodings(batch, at))


def features(enc: Encodings, twin_view: str = "clean") -> dict[str, tuple[Tensor, Tensor]]:
    """{side: (queries, keys)}."""
    found = {
        "image": (enc.visual("clean").embed, enc.momentum.visual(twin_view).embed),
        "text": (enc.text("clean").embed, enc.momentum.text("clean").embed),
    }
    return found  # type: ignore[return-value]


def test_tcl_by_hand() -> None:
    model, batch = model_of(**TWO_VIEWS), two_views()
    enc = encodings(model, batch)
    terms, right = {}, []
    for side, (queries, keys) in features(enc, "augmented").items():
        logits = queries @ torch.cat([keys, model.key_queues()[side].keys]).T / TEMPERATURE
        terms[side] = F.cross_entropy(logits, torch.arange(4))
        right.append(logits[:, :4].argmax(dim=1) == torch.arange(4))
    loss = model.objectives["imc"](enc, batch)
    torch.testing.assert_close(loss.value, (terms["image"] + terms["text"]) / 2)
    torch.testing.assert_close(loss.metrics["imc/i2i"], terms["image"].detach())
    torch.testing.assert_close(loss.metrics["imc/t2t"], terms["text"].detach())
    assert loss.metrics["imc/accuracy"] == torch.cat(right).float().mean()


def test_moco_by_hand() -> None:
    """Facebook's MoCo: the own key is column 0, the queue the others, and no other key of the batch is there."""
    model, batch = model_of(sides="visual", batch_keys="own", **TWO_VIEWS), two_views()
    enc = encodings(model, batch)
    queries, keys = features(enc, "augmented")["image"]
    temperature = torch.tensor([TEMPERATURE], requires_grad=True)
    products = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ model.key_queues()["image"].keys.T], dim=1)
    want = F.cross_entropy(products / temperature, torch.zeros(4, dtype=torch.int64))
    loss = model.objectives["imc"](enc, batch)
    torch.testing.assert_close(loss.value, want)
    given = torch.autograd.grad(loss.value, [queries, model.family.temperature.value], retain_graph=True)
    torch.testing.assert_close(given, torch.autograd.grad(want, [queries, temperature]))
    right = (queries @ keys.T).argmax(dim=1) == torch.arange(4)
    assert loss.metrics["imc/accuracy"] == right.float().mean()
    assert set(loss.metrics) == {"imc/i2i", "imc/accuracy"}


@pytest.mark.parametrize("batch_keys", ["all", "own"])
@pytest.mark.parametrize("same_picture", ["positive", "excluded"])
def test_other_keys_of_the_same_picture(same_picture: str, batch_keys: str) -> None:
    model = model_of(same_picture=same_picture, batch_keys=batch_keys, queue=4, queue_start="empty")
    for name, queue in model.key_queues().items():
        torch.manual_seed(len(name))
        queue.push(F.normalize(torch.randn(3, 8), dim=1), torch.tensor([7, 3, 5]), 1)
    batch = replace(two_views(), pair_id=torch.tensor([7, 7, 5, 2]))
    enc = encodings(model, batch)
    total = torch.zeros(())
    for side, (queries, keys) in features(enc).items():
        logits = queries @ torch.cat([keys, model.key_queues()[side].keys[:3]]).T / TEMPERATURE
        same = batch.pair_id[:, None] == torch.tensor([7, 7, 5, 2, 7, 3, 5])
        own = torch.eye(4, 7, dtype=torch.bool)
        out = same & ~own if same_picture == "excluded" else torch.zeros_like(same)
        if batch_keys == "own":
            out |= ~own & (torch.arange(7) < 4)
        true = ((same & ~out) if same_picture == "positive" else own).float()
        logs = logits.masked_fill(out, -torch.inf).log_softmax(1).masked_fill(out, 0.0)
        total = total - (true / true.sum(1, keepdim=True) * logs).sum(1).mean() / 2
    torch.testing.assert_close(model.objectives["imc"](enc, batch).value, total)


@pytest.mark.parametrize(("sides", "kind", "other"), [("visual", "visual", "text"), ("text", "text", "visual")])
def test_one_side_asks_nothing_of_the_other(sides: str, kind: str, other: str) -> None:
    model = model_of(sides=sides, **TWO_VIEWS)
    objective: Any = model.objectives["imc"]
    assert objective.needs == {"embed", "temperature", kind}
    assert all(view.startswith(kind) for view in model.views())
    assert all(kind in name for name in objective.passes())
    batch = two_views()
    nothing: dict[str, Any] = {other: {}}
    made = model(replace(batch, **nothing), Moment(1))
    assert set(made.keys) == {{"visual": "image", "text": "text"}[kind]} == set(model.key_queues())


def test_gradient_reaches_the_online_network_alone() -> None:
    model = model_of(**TWO_VIEWS)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    made = model(two_views(), Moment(1))
    made.losses["imc"].value.backward()
    assert model.twin is not None
    assert all(parameter.grad is None for parameter in model.twin.parameters())
    family: Any = model.family
    assert bool(family.visual_proj.weight.grad.any())
    assert bool(family.temperature.value.grad.any())
    torch.testing.assert_close(dict(model.named_buffers()), before)


def test_queues_are_itcs_and_take_each_key_once() -> None:
    model, batch = model_of(with_itc=True, **TWO_VIEWS), two_views()
    assert set(model.key_queues()) == {"image", "text"}
    made = model(batch, Moment(1))
    model.commit([made.keys], 1, "step")
    enc = encodings(model, batch)
    for side, (_, keys) in features(enc, "augmented").items():
        queue = model.key_queues()[side]
        assert queue.pointer.item() == 4
        torch.testing.assert_close(queue.keys[:4], keys)


def test_ids_enter_the_queue_where_they_matter() -> None:
    for same_picture, ids in (("negative", [-1] * 4), ("positive", [0, 1, 2, 3])):
        model = model_of(same_picture=same_picture)
        model.commit([model(two_views(), Moment(1)).keys], 1, "step")
        assert all(queue.ids[:4].tolist() == ids for queue in model.key_queues().values())


def test_what_itc_shares_too_travels_once() -> None:
    model, batch = model_of(with_itc=True, scope="global", **TWO_VIEWS), two_views()
    enc = encodings(model, batch)
    shares = [model.objectives[name].share(enc, batch) for name in ("imc", "itc")]  # type: ignore[operator]
    assert [id(tensor) for tensor in shares[0]] == [id(tensor) for tensor in shares[1]]


@pytest.mark.parametrize("options", [{}, {"sides": "visual", "batch_keys": "own"}])
def test_flops_equal_torchs_counter(options: dict[str, Any]) -> None:
    model, batch = model_of(queue=64, **TWO_VIEWS, **options), two_views()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(2))
    assert step_flops(model, batch).forward == counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_keys": "own", "scope": "global"}, "write scope=rank"),
        ({"batch_keys": "own", "queue": 0}, "give a queue"),
        ({"scope": "global", "queue_push": "micro_batch"}, "write queue_push=step"),
    ],
)
def test_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        model_of(**options)


def whole_model() -> PretrainModel:
    return model_of(with_itc=True, scope="global", **TWO_VIEWS)


def narrow_model() -> PretrainModel:
    return model_of(scope="global", queue_dtype="bf16", sides="visual", same_picture="positive")


@pytest.mark.parametrize("make", [whole_model, narrow_model])
@pytest.mark.parametrize(("world", "number"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int, make: Any) -> None:
    check_whole(make, replace(two_views(8), pair_id=torch.tensor([3, 1, 3, 4, 5, 1, 6, 3])), world, number)
