"""CBT: frames alone, a frozen BERT, and both together; its losses in parts, on ranks and under ZeRO 3."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.spawn import run_ranks
from tests.engines import configuration
from tests.models import batch_for
from tests.reference.__main__ import main
from tests.reference_folders import agreed, spoilt
from tests.shard_files import reference_folder
from tests.states import whole_weights
from tests.whole_steps import check_whole
from vlscale import config as recipes
from vlscale import distributed, towers, train, weights
from vlscale.build import Request
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import cbt
from vlscale.flops import step_flops
from vlscale.local_engine import LocalEngine
from vlscale.model import Encodings, PretrainModel
from vlscale.nn.video import FrameTower
from vlscale.objectives import mfm, pair_nce
from vlscale.optim import OptimConfig
from vlscale.types import Batch, Moment
from vlscale.weights import fill

TINY = replace(cbt.tiny(), dropout=0.0, init_scale=8.0)
TOWER = replace(TINY, tower="s3d", tower_divided=16, window=4, frames=8, image_size=16)


def family_of(config: cbt.Config = TINY) -> cbt.Cbt:
    torch.manual_seed(0)
    return cbt.build(config)


def batch_of(config: cbt.Config = TINY, **options: Any) -> Batch:
    return batch_for(config.inputs, config.vocab, **options)


def model_of(config: cbt.Config = TINY, scope: Any = "rank") -> PretrainModel:
    """Both losses as the paper has them."""
    family = family_of(config)
    frames = mfm.Config(states="visual", head="none", scope=scope)
    pairs = pair_nce.Config(direction="video_to_text", hidden=8, scope=scope, block=6)
    return PretrainModel(family, {"mfm": mfm.build(frames, family), "pair_nce": pair_nce.build(pairs, family)})


def test_published_size() -> None:
    with torch.device("meta"):
        family = cbt.build(cbt.Config())
    bert = 108_891_648  # bert-base-uncased without its pooler
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 2 * 768
    visual = 1024 * 768 + 768 + 512 * 768 + 2 * 768 + 2 * layer
    cross = 768 + 2 * 768 + 2 * 768 + layer
    assert sum(each.numel() for each in family.parameters()) == bert + visual + cross
    assert sum(each.numel() for each in family.parameters() if each.requires_grad) == visual + cross


def test_a_hidden_frame_is_a_zero_vector_and_its_key_what_it_was() -> None:
    family, batch = family_of(), batch_of()
    masked, part = batch.visual["masked"], family.visual_embeddings
    assert masked.picked is not None
    assert masked.targets is not None
    stream = family.encode_visual(masked)
    projected = masked.targets @ family.visual_projection.weight.T + family.visual_projection.bias
    torch.testing.assert_close(stream.keys, projected)
    torch.testing.assert_close(family.frame_keys(batch.visual["clean"]), projected)
    places = part.position.weight[: masked.feats.shape[1]]
    seen = F.layer_norm(projected.masked_fill(masked.picked[..., None], 0.0) + places, (16,), eps=1e-12)
    assert masked.mask is not None
    torch.testing.assert_close(stream.hidden, family.visual_stack(seen, masked.mask[:, None, None]))
    # what was hidden is not in any state
    other = torch.where(masked.picked[..., None], 5.0, masked.targets)
    again = family.encode_visual(masked._replace(targets=other))
    torch.testing.assert_close(again.hidden, stream.hidden)
    assert not torch.allclose(again.keys, stream.keys)  # type: ignore[arg-type]


def test_the_pair_is_a_token_then_frames_then_words() -> None:
    family, batch = family_of(), batch_of()
    text, visual = family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["clean"])
    part = family.pair_embeddings
    assert text.mask is not None
    assert visual.mask is not None
    rows = [part.token.expand(4, 1, 16), visual.hidden + part.segment.weight[0], text.hidden + part.segment.weight[1]]
    mask = torch.cat([torch.ones(4, 1, dtype=torch.bool), visual.mask, text.mask], dim=1)
    joined = F.layer_norm(torch.cat(rows, dim=1), (16,), eps=1e-12)
    want = family.cross_stack(joined, mask[:, None, None])
    fused = family.fuse(text, visual)
    assert fused.text is not None
    assert fused.visual is not None
    assert fused.pooled is not None
    got = torch.cat([fused.pooled[:, None], fused.visual, fused.text], dim=1)
    torch.testing.assert_close(got, want)


def test_padding_is_not_seen() -> None:
    family, batch = family_of(), batch_of()
    visual = batch.visual["clean"]
    assert visual.mask is not None
    wide = visual._replace(
        feats=F.pad(visual.feats.masked_fill(~visual.mask[..., None], 9.0), (0, 0, 0, 2), value=9.0),
        mask=F.pad(visual.mask, (0, 2)),
    )
    longer = batch_of(padding=3).text["clean"]
    found = family.fuse(family.encode_text(longer), family.encode_visual(wide)).pooled
    want = family.fuse(family.encode_text(batch.text["clean"]), family.encode_visual(visual)).pooled
    torch.testing.assert_close(found, want)


def test_the_text_encoder_is_frozen() -> None:
    family, batch = family_of(replace(TINY, dropout=0.5)).train(), batch_of()
    first, second = (family.encode_text(batch.text["clean"]).hidden for _ in range(2))
    assert torch.equal(first, second)  # nothing is dropped
    assert not first.requires_grad
    thawed = family_of(replace(TINY, freeze_text=False))
    assert thawed.encode_text(batch.text["clean"]).hidden.requires_grad
    assert {name for name, each in family.named_parameters() if not each.requires_grad} == {
        name for name, _ in family.named_parameters() if name.startswith(("text_embeddings.", "text_stack."))
    }


def test_flops_equal_torchs_counter() -> None:
    family, batch = family_of(), batch_of()
    count = family.flops(batch.text["clean"].ids.shape[1])
    encoded: dict[str, Any] = {}
    for verb, run in {
        "encode_text": lambda: family.encode_text(batch.text["clean"]),
        "encode_visual": lambda: family.encode_visual(batch.visual["clean"]),
        "fuse": lambda: family.fuse(encoded["encode_text"], encoded["encode_visual"]),
    }.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoded[verb] = run()
        assert counter.get_total_flops() == 4 * count[verb], verb


def test_a_frozen_text_encoder_costs_no_backward() -> None:
    batch = batch_of()
    frozen, thawed = (step_flops(model_of(config), batch).model for config in (TINY, replace(TINY, freeze_text=False)))
    text = 4 * family_of().flops(batch.text["clean"].ids.shape[1])["encode_text"]
    assert thawed - frozen == 2 * text


def test_a_tower_learns_as_key_and_as_query() -> None:
    """Pixels: every window of frames is one place, and the tower runs once for queries and keys."""
    model, batch = model_of(TOWER), batch_of(TOWER)
    family, masked = model.family, batch.visual["masked"]
    assert masked.feats.shape == (4, 8, 3, 16, 16)
    runs: list[Any] = []
    family.tower.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr, operator]
    loss = model.objectives["mfm"](Encodings(model.family, batch, Moment(1), {}), batch)  # type: ignore[arg-type]
    assert len(runs) == 1
    loss.value.backward()
    assert model.objectives["mfm"].picked(batch).shape == (4, 2)  # type: ignore[operator]
    for name, parameter in family.tower.named_parameters():  # type: ignore[union-attr]
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    stream = family.encode_visual(masked)  # type: ignore[operator]
    assert stream.keys.grad_fn is not None


def test_a_frozen_tower_starts_from_published_weights_and_stays(tmp_path: Path) -> None:
    """No gradient and no optimizer state; its weights are in the model's like all others."""
    config = replace(TOWER, freeze_tower=True)
    torch.manual_seed(1)
    published = FrameTower("s3d", divided=16).encoder.state_dict()
    table = recipes.pick("families", "milnce").PUBLISHED
    named = weights.publish({f"family.video.{name}": each for name, each in published.items()}, table).tensors
    torch.save(named, tmp_path / "s3d.pt")
    family = family_of(config)
    assert towers.start(family, str(tmp_path / "s3d.pt"))
    for name, each in family.tower.encoder.state_dict().items():
        torch.testing.assert_close(each, published[name], msg=name)
    model, batch = model_of(config), batch_of(config)
    engine = LocalEngine(model, OptimConfig(), torch.device("cpu"))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    engine.backward(model.total(engine.forward(batch, Moment(1)).losses, {}), last=True)
    engine.step(1e-2)
    for name, each in model.state_dict().items():
        if name.startswith("family.tower."):
            assert torch.equal(each, before[name]), name
    saved = {piece.name.partition("/")[0] for piece in engine.pieces() if "family.tower." in piece.name}
    assert saved == {"master", "buffer"}
    thawed = step_flops(model_of(TOWER), batch).model - step_flops(model, batch).model
    views, rows, backward = 2, 4, 2
    assert thawed == views * rows * backward * family.flops(8)["tower"]


def test_weights_of_another_stem_are_told(tmp_path: Path) -> None:
    torch.save({towers.STEM: torch.zeros(4, towers.DEEP_STEM, 2, 4, 4)}, tmp_path / "s3d.pt")
    with pytest.raises(CheckpointError, match=r"another stem; write family\.tower=s3d_space_to_depth"):
        towers.start(family_of(TOWER), str(tmp_path / "s3d.pt"))
    with pytest.raises(ConfigError, match="freeze_tower freezes a tower"):
        family_of(replace(TINY, freeze_tower=True))


def test_bf16_takes_fp32_features() -> None:
    family, batch = family_of().to(torch.bfloat16), batch_of()
    fused = family.fuse(family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["masked"]))
    assert fused.pooled is not None
    assert fused.pooled.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"visual_heads": 3}, {"text_length": 99}, {"frames": 9}])
def test_sizes_that_do_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        cbt.build(replace(cbt.tiny(), **wrong))


def test_a_bert_fills_the_text_encoder() -> None:
    model, c = model_of(), TINY
    names = {"word_embeddings": c.vocab, "position_embeddings": 512, "token_type_embeddings": 2}
    bert = {f"bert.embeddings.{name}.weight": torch.rand(rows, 16) for name, rows in names.items()}
    bert |= {f"bert.embeddings.LayerNorm.{name}": torch.rand(16) for name in ("gamma", "beta")}
    layer = "bert.encoder.layer.0."
    shapes = {f"attention.self.{name}": (16, 16) for name in ("query", "key", "value")}
    shapes |= {"attention.output.dense": (16, 16), "intermediate.dense": (32, 16), "output.dense": (16, 32)}
    for name, shape in shapes.items():
        bert |= {f"{layer}{name}.weight": torch.rand(shape), f"{layer}{name}.bias": torch.rand(shape[0])}
    for name in ("attention.output", "output"):
        bert |= {f"{layer}{name}.LayerNorm.{part}": torch.rand(16) for part in ("weight", "bias")}
    bert["cls.predictions.bias"] = bert["bert.pooler.dense.bias"] = torch.ones(16)
    done = fill(model, bert, cbt.INIT_TEXT)
    assert not [name for name in done.left if ".text_" in name]
    table: Tensor = model.family.text_embeddings.segment.weight  # type: ignore[union-attr, assignment]
    torch.testing.assert_close(table, bert["bert.embeddings.token_type_embeddings.weight"])


def whole_model() -> PretrainModel:
    return model_of(scope="global")


def test_a_step_in_parts_on_two_ranks_equals_one_batch() -> None:
    check_whole(whole_model, batch_of(size=8), 2, 2)


def losses(zero3: bool) -> dict[str, Any]:
    """Losses of some steps and the weights after them."""
    optim = OptimConfig(weight_decay=0.1, clip=5.0)
    if zero3:
        engine: Any = DeepSpeedEngine(model_of(), configuration("zero3", 4, 4, optim.clip), optim, distributed.init())
    else:
        engine = LocalEngine(model_of(), optim, torch.device("cpu"))
    found = []
    for step in range(1, 5):
        loss = engine.model.total(engine.forward(batch_of(seed=step).to(engine.device), Moment(step)).losses, {})
        engine.backward(loss, last=True)
        found.append(float(loss.detach()))
        engine.step(1e-2)
    weights = {name: each.float() for name, each in whole_weights(engine).items() if "key.bias" not in name}
    return {"losses": found, "weights": weights}


def test_zero_3_makes_pairs_again_as_plain_pytorch_does_and_leaves_bert_alone() -> None:
    expected = losses(zero3=False)
    (found,) = run_ranks(losses, 1, True)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    start = dict(model_of().named_parameters())
    for name, weight in expected["weights"].items():
        if "score.bias" not in name:
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)
        frozen = ".text_" in name
        assert torch.equal(found["weights"][name], start[name]) == frozen, name


def run_of_the_miniature(out: str) -> None:
    run = recipes.load("cbt_tiny", ["steps=100", "optim.warmup=20", "data.workers=0", "logging.tensorboard=false"])
    assert train.train(Request(run, "ds_configs/zero2.json", Path(out))) == 0


@pytest.mark.slow
def test_the_miniature_learns(tmp_path: Path) -> None:
    """In a sixth of its steps."""
    run_ranks(run_of_the_miniature, 1, str(tmp_path / "run"), timeout=500)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in reversed(lines) if "eval/pretext/mfm/accuracy" in line)
    for name, times in (("mfm", 8), ("pair_nce", 4)):
        accuracy, chance = (found[f"eval/pretext/{name}/{figure}"] for figure in ("accuracy", "chance"))
        assert accuracy > times * chance, name


@pytest.fixture
def stored() -> Path:
    return reference_folder("cbt")


def test_agrees_with_the_reference(stored: Path, tmp_path: Path) -> None:
    agreed(stored, tmp_path)


@pytest.mark.parametrize("name", ["loss/visual_same_video_negatives_only", "cross_scores", "grad/cross_cls"])
def test_a_changed_tensor_fails(stored: Path, tmp_path: Path, name: str) -> None:
    assert main([str(spoilt(stored, tmp_path, name))]) == 1
