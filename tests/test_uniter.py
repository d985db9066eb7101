"""The family: its published size and names, regions by hand, who sees whom, and the authors' tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.spawn import run_ranks
from tests.engines import configuration
from tests.models import batch_for
from tests.reference.__main__ import main
from tests.reference_folders import spoilt
from tests.shard_files import reference_folder
from tests.states import whole_weights
from vlscale import distributed
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import uniter
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel, Task
from vlscale.objectives import itm, mlm, mrc, mrc_kl, mrfr, wra
from vlscale.optim import OptimConfig
from vlscale.types import Batch, Fused, Moment
from vlscale.weights import fill


def family_of(seed: int = 0, **changes: Any) -> uniter.Uniter:
    torch.manual_seed(seed)
    family = uniter.build(replace(uniter.tiny(), dropout=0.0, **changes))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return family


def batch_of(**options: Any) -> Batch:
    config = uniter.tiny()
    return batch_for(config.inputs, config.vocab, **options)


def fused_of(family: uniter.Uniter, batch: Batch, view: str = "clean", causal: bool = False) -> Fused:
    return family.fuse(family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual[view]), causal)


def states(fused: Fused) -> tuple[Tensor, Tensor]:
    assert fused.text is not None
    assert fused.visual is not None
    return fused.text, fused.visual


def test_published_size() -> None:
    with torch.device("meta"):
        family = uniter.build(uniter.Config())
    number = sum(parameter.numel() for parameter in family.parameters())
    bert = 108_310_272  # bert-base-cased with its pooler
    regions = (2048 * 768 + 768) + (7 * 768 + 768) + 3 * 2 * 768 + 2048  # two maps, three norms, the mask's vector
    assert number == bert + regions
    assert family.inputs.text_length == 62
    assert family.inputs.regions == 100


def test_regions_by_hand() -> None:
    family, batch = family_of(), batch_of()
    part, visual = family.region_embeddings, batch.visual["masked"]
    assert visual.picked is not None
    assert visual.boxes is not None
    got = family.encode_visual(visual).hidden
    segment = family.text_embeddings.segment.weight[1]
    for sample, region in ((0, 0), (1, 1), (2, 3)):
        feats = visual.feats[sample, region]
        if visual.picked[sample, region]:
            assert not feats.any()
            feats = part.mask.weight[0]
        seen = F.layer_norm(
            part.projection(feats), (16,), part.projection_norm.weight, part.projection_norm.bias, 1e-12
        )
        place = part.place(visual.boxes[sample, region])
        placed = F.layer_norm(place, (16,), part.place_norm.weight, part.place_norm.bias, 1e-12)
        want = F.layer_norm(seen + placed + segment, (16,), part.norm.weight, part.norm.bias, 1e-12)
        torch.testing.assert_close(got[sample, region], want)
    assert visual.picked[0, 0]


def test_words_and_regions_see_each_other_and_padding_is_not_seen() -> None:
    family, batch = family_of(), batch_of()
    text, visual = batch.text["clean"], batch.visual["clean"]
    assert visual.mask is not None
    words, regions = states(fused_of(family, batch))
    spoilt = visual._replace(feats=visual.feats.masked_fill(~visual.mask[..., None], 9.0))
    other = replace(batch, visual={"clean": spoilt}, text={"clean": text._replace(ids=text.ids.where(text.mask, 5))})
    same_words, same_regions = states(fused_of(family, other))
    torch.testing.assert_close(same_words[text.mask], words[text.mask])
    torch.testing.assert_close(same_regions[visual.mask], regions[visual.mask])
    longer, _ = states(fused_of(family, batch_of(padding=3)))
    torch.testing.assert_close(longer[:, : words.shape[1]][text.mask], words[text.mask])

    feats = visual.feats.clone()
    feats[:, 0] += 1.0
    moved, _ = states(fused_of(family, replace(batch, visual={"clean": visual._replace(feats=feats)})))
    assert ((moved - words).abs().amax(dim=2)[text.mask] > 1e-4).all()
    ids = text.ids.clone()
    ids[:, 1] = 4 + (ids[:, 1] + 1) % 50
    _, moved = states(fused_of(family, replace(batch, text={"clean": text._replace(ids=ids)})))
    assert ((moved - regions).abs().amax(dim=2)[visual.mask] > 1e-5).all()


def test_regions_have_no_order() -> None:
    family, batch = family_of(), batch_of()
    visual, order = batch.visual["clean"], torch.tensor([3, 1, 0, 5, 4, 2])
    assert visual.boxes is not None
    assert visual.mask is not None
    turned = visual._replace(feats=visual.feats[:, order], boxes=visual.boxes[:, order], mask=visual.mask[:, order])
    words, regions = states(fused_of(family, batch))
    same, moved = states(fused_of(family, replace(batch, visual={"clean": turned})))
    torch.testing.assert_close(same, words)
    torch.testing.assert_close(moved, regions[:, order])


def test_left_to_right_hides_later_words_from_words_and_all_from_regions() -> None:
    family, batch = family_of(), batch_of()
    text = batch.text["clean"]
    ids = text.ids.clone()
    ids[:, 3:] = 4 + (ids[:, 3:] + 1) % 50
    words, regions = states(fused_of(family, batch, causal=True))
    later = replace(batch, text={"clean": text._replace(ids=ids)})
    changed, same = states(fused_of(family, later, causal=True))
    torch.testing.assert_close(changed[:, :3], words[:, :3])
    torch.testing.assert_close(same, regions)
    assert (changed[:, 3] - words[:, 3]).abs().max() > 1e-3


def test_pooled_is_tanh_of_the_first_word() -> None:
    family, batch = family_of(), batch_of()
    fused = fused_of(family, batch)
    words, _ = states(fused)
    assert fused.pooled is not None
    torch.testing.assert_close(fused.pooled, family.pooler.dense(words[:, 0]).tanh())


def test_flops_equal_torchs_counter() -> None:
    family, batch = family_of(), batch_of()
    count = family.flops(batch.text["clean"].ids.shape[1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        visual = family.encode_visual(batch.visual["clean"])
    assert count["encode_visual"] * 4 == counter.get_total_flops()
    text = family.encode_text(batch.text["clean"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.fuse(text, visual)
    assert count["fuse"] * 4 == counter.get_total_flops()


def test_the_scale_of_the_start() -> None:
    made = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        made.append(uniter.build(replace(uniter.tiny(), init_scale=scale)).state_dict())
    scaled = {name for name, tensor in made[0].items() if not torch.equal(tensor, made[1][name])}
    assert scaled == {name for name, tensor in made[0].items() if tensor.ndim == 2 and "embeddings" not in name}
    assert all(torch.equal(4 * made[0][name], made[1][name]) for name in scaled)


def test_bf16_takes_fp32_features() -> None:
    family, batch = family_of().to(torch.bfloat16), batch_of()
    words, regions = states(fused_of(family, batch, "masked"))
    assert {words.dtype, regions.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"text_length": 99}, {"segments": 1}])
def test_sizes_that_do_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        uniter.build(replace(uniter.tiny(), **wrong))


def model_of(decoder: Any = "tied") -> PretrainModel:
    family = family_of()
    return PretrainModel(
        family,
        {
            "mlm": mlm.build(mlm.Config(soften=0.0), family),
            "mrfr": mrfr.build(mrfr.Config(decoder=decoder), family),
            "mrc_kl": mrc_kl.build(mrc_kl.Config(), family),
            "itm": itm.build(itm.Config(negatives="loader"), family),
        },
    )


def published(old_names: bool = False) -> dict[str, Tensor]:
    """A checkpoint of the miniature under the authors' names, each tensor other numbers."""
    c = uniter.tiny()
    norm = ("gamma", "beta") if old_names else ("weight", "bias")
    shapes: dict[str, tuple[int, ...]] = {
        "uniter.embeddings.word_embeddings.weight": (c.vocab, c.hidden),
        "uniter.embeddings.position_embeddings.weight": (c.max_positions, c.hidden),
        "uniter.embeddings.token_type_embeddings.weight": (2, c.hidden),
        "uniter.img_embeddings.mask_embedding.weight": (2, c.feats),
        "uniter.img_embeddings.img_linear.weight": (c.hidden, c.feats),
        "uniter.img_embeddings.pos_linear.weight": (c.hidden, 7),
        "cls.predictions.bias": (c.vocab,),
        "cls.predictions.decoder.weight": (c.vocab, c.hidden),
        "feat_regress.weight": (c.hidden, c.feats),
        "feat_regress.bias": (c.feats,),
        "region_classifier.net.3.weight": (c.classes, c.hidden),
        "region_classifier.net.3.bias": (c.classes,),
        "itm_output.weight": (2, c.hidden),
        "itm_output.bias": (2,),
    }
    squares = [
        "uniter.pooler.dense",
        "cls.predictions.transform.dense",
        "feat_regress.net.0",
        "region_classifier.net.0",
    ]
    norms = ["uniter.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    norms += [f"uniter.img_embeddings.{name}" for name in ("img_layer_norm", "pos_layer_norm", "LayerNorm")]
    shapes |= {f"uniter.img_embeddings.{name}.bias": (c.hidden,) for name in ("img_linear", "pos_linear")}
    for number in range(c.layers):
        layer = f"uniter.encoder.layer.{number}"
        squares += [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
        squares.append(f"{layer}.attention.output.dense")
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        shapes[f"{layer}.intermediate.dense.weight"] = (c.intermediate, c.hidden)
        shapes[f"{layer}.intermediate.dense.bias"] = (c.intermediate,)
        shapes[f"{layer}.output.dense.weight"] = (c.hidden, c.intermediate)
        shapes[f"{layer}.output.dense.bias"] = (c.hidden,)
    for name in squares:
        shapes |= {f"{name}.weight": (c.hidden, c.hidden), f"{name}.bias": (c.hidden,)}
    for name in norms:
        shapes |= {f"{name}.{part}": (c.hidden,) for part in norm}
    for name in ("feat_regress.net.2", "region_classifier.net.2"):
        shapes |= {f"{name}.weight": (c.hidden,), f"{name}.bias": (c.hidden,)}
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("old_names", [False, True])
def test_a_published_checkpoint_fills_everything(old_names: bool) -> None:
    model, tensors = model_of(), published(old_names)
    done = fill(model, tensors, uniter.PUBLISHED)
    assert not done.left
    assert set(done.unused) == {"cls.predictions.decoder.weight", "feat_regress.weight"}
    family: Any = model.family
    torch.testing.assert_close(
        family.region_embeddings.mask.weight[0], tensors["uniter.img_embeddings.mask_embedding.weight"][1]
    )
    untied = model_of("own")
    assert not fill(untied, tensors, uniter.PUBLISHED).left
    head: Any = untied.objectives["mrfr"].head
    torch.testing.assert_close(head.decoder.weight, tensors["feat_regress.weight"].T)


def test_a_foreign_or_incomplete_checkpoint_is_refused() -> None:
    tensors = published()
    with pytest.raises(CheckpointError, match="unknown"):
        fill(model_of(), {**tensors, "uniter.encoder.extra": torch.ones(1)}, uniter.PUBLISHED)
    del tensors["uniter.pooler.dense.bias"]
    with pytest.raises(CheckpointError, match="pooler"):
        fill(model_of(), tensors, uniter.PUBLISHED)


def test_a_bert_starts_all_but_the_regions() -> None:
    kept = ("uniter.embeddings", "uniter.encoder", "uniter.pooler", "cls.")
    bert = {name.replace("uniter.", "bert."): tensor for name, tensor in published().items() if name.startswith(kept)}
    bert["cls.seq_relationship.weight"] = torch.ones(2, 16)
    done = fill(model_of(), bert, uniter.INIT_TEXT)
    assert {name.split(".")[1] for name in done.left} == {"region_embeddings", "mrfr", "mrc_kl", "itm"}


STEPS = ("mrfr", "mlm", "itm", "mrckl", "mrc", "mrfr")  # one task per step, as the authors train


def task_model() -> PretrainModel:
    family = family_of()
    objectives = {
        "mlm": mlm.build(mlm.Config(soften=0.0), family),
        "mrfr": mrfr.build(mrfr.Config(decoder="tied"), family),
        "mrc": mrc.build(mrc.Config(), family),
        "mrc_kl": mrc_kl.build(mrc_kl.Config(reduction="elements"), family),
        "itm": itm.build(itm.Config(negatives="loader"), family),
        "wra": wra.build(wra.Config(weight=0.1), family),
    }
    tasks = {name: Task((name,)) for name in ("mlm", "mrfr", "mrc")}
    return PretrainModel(family, objectives, {**tasks, "mrckl": Task(("mrc_kl",)), "itm": Task(("itm", "wra"))})


def task_series(zero3: bool) -> dict[str, list[float]]:
    """Losses and gradient norms of some steps, then the norms of the family's weights, by their names' order."""
    optim = OptimConfig(weight_decay=0.1, clip=5.0)
    if zero3:
        engine: Any = DeepSpeedEngine(task_model(), configuration("zero3", 4, 4, optim.clip), optim, distributed.init())
    else:
        engine = LocalEngine(task_model(), optim, torch.device("cpu"))
    losses, norms = [], []
    for step, task in enumerate(STEPS, start=1):
        batch = replace(batch_of(seed=step), task=task).to(engine.device)
        loss = engine.model.total(engine.forward(batch, Moment(step)).losses, {})
        engine.backward(loss, last=True)
        losses.append(float(loss.detach()))
        norms.append(engine.step(1e-2).grad_norm)
    weights = sorted((name, float(weight.float().norm())) for name, weight in whole_weights(engine).items())
    return {"losses": losses, "norms": norms, "weights": [norm for name, norm in weights if "key.bias" not in name]}


def test_one_task_per_step_under_zero_3_equals_plain_pytorch() -> None:
    """The feature head reads a matrix that lies in the family; most parameters rest in most steps."""
    expected = task_series(zero3=False)
    (found,) = run_ranks(task_series, 1, True)
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-4, abs=1e-5), key


@pytest.fixture
def stored() -> Path:
    return reference_folder("uniter")


def test_agrees_with_the_authors(stored: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main([str(stored), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    names = {row["name"] for row in found["compared"]}
    assert set(load_file(stored / "outputs.safetensors")) <= names
    assert {f"optimizer:{name}" for name in load_file(stored / "optimizer.safetensors")} <= names
    assert all(row["name"].startswith("downstream:") for row in found["not_compared"])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("outputs", "itm/ot_transport"),
        ("outputs", "grad/mrfr/uniter.img_embeddings.img_linear.weight"),
        ("optimizer", "step_3/uniter.img_embeddings.mask_embedding.weight"),
    ],
)
def test_a_changed_tensor_fails(stored: Path, tmp_path: Path, file: str, name: str) -> None:
    assert main([str(spoilt(stored, tmp_path, name, file))]) == 1
