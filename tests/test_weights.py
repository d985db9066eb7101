"""Reading and renaming weights: published names arrive, towers start, mistakes are sentences."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models import albef_model
from vlscale import weights
from vlscale.errors import CheckpointError
from vlscale.families import albef
from vlscale.model import PretrainModel


def published(model: PretrainModel) -> dict[str, Tensor]:
    """The model's tensors under the authors' names, made by asking the table for each."""
    state = model.state_dict()
    names = {
        "visual_encoder{m}.cls_token": "image_encoder.tokens.class_token",
        "visual_encoder{m}.pos_embed": "image_encoder.tokens.positions",
        "visual_encoder{m}.patch_embed.proj.weight": "image_encoder.patches.projection.weight",
        "text_encoder{m}.bert.encoder.layer.1.crossattention.self.value.bias": (
            "fusion_stack.blocks.1.cross_attention.value.bias"
        ),
        "vision_proj{m}.weight": "visual_proj.weight",
    }
    found = {}
    for theirs, ours in names.items():
        found[theirs.format(m="")] = torch.randn_like(state[f"family.{ours}"])
        found[theirs.format(m="_m")] = torch.randn_like(state[f"twin.{ours}"])
    return {
        **found,
        "temp": torch.tensor(0.3),
        "text_queue": torch.randn(8, 8),
        "queue_ptr": torch.tensor([4]),
        "itm_head.weight": torch.randn(2, 16),
        "text_encoder_m.cls.predictions.bias": torch.randn(64),
        "text_encoder.bert.embeddings.position_ids": torch.arange(16)[None],
    }


def test_published_names_fill_family_twin_queue_and_heads() -> None:
    model = albef_model()
    tensors = published(model)
    loaded = weights.fill(model, tensors, albef.PUBLISHED._replace(fills="none"))
    state = model.state_dict()
    for ours, theirs in {
        "family.image_encoder.tokens.positions": tensors["visual_encoder.pos_embed"],
        "twin.image_encoder.tokens.positions": tensors["visual_encoder_m.pos_embed"],
        "twin.temperature.value": tensors["temp"].reshape(1),
        "family.fusion_stack.blocks.1.cross_attention.value.bias": tensors[
            "text_encoder.bert.encoder.layer.1.crossattention.self.value.bias"
        ],
        "queues.text.keys": tensors["text_queue"].T,
        "queues.image.pointer": tensors["queue_ptr"],
        "objectives.mlm.head_twin.bias": tensors["text_encoder_m.cls.predictions.bias"],
    }.items():
        assert torch.equal(state[ours], theirs), ours
    assert loaded.unused == ("text_encoder.bert.embeddings.position_ids",)
    assert "family.text_proj.weight" in loaded.left


def test_positions_are_resized_for_another_picture_size() -> None:
    model = albef_model()
    table = torch.randn(1, 1 + 16, 16)
    weights.fill(model, {"visual_encoder.pos_embed": table}, albef.PUBLISHED._replace(fills="none"))
    assert torch.equal(model.family.image_encoder.tokens.positions[:, 0], table[:, 0])  # type: ignore


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"logit_scale": torch.ones(1)}, "logit_scale"),
        ({"text_proj.weight": torch.ones(3, 3)}, r"\(3, 3\), but family.text_proj.weight is \(8, 16\)"),
        ({"visual_encoder.blocks.9.norm1.bias": torch.ones(16)}, "no place"),
        ({"visual_encoder.pos_embed": torch.ones(1, 8, 16)}, "cannot be resized"),
        ({"temp": torch.tensor(0.1)}, "does not fill"),
    ],
)
def test_mistakes_are_sentences(tensors: dict[str, Tensor], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        weights.fill(albef_model(), tensors, albef.PUBLISHED)


def test_twins_and_heads_may_be_absent() -> None:
    model = albef_model(queue=0, soften=0.0)
    loaded = weights.fill(model, published(albef_model()), albef.PUBLISHED._replace(fills="none"))
    assert "text_queue" in loaded.unused
    assert "vision_proj_m.weight" in loaded.unused


def test_read_formats(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(2, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "checkpoint.pth")
    torch.save({"state_dict": tensors}, tmp_path / "other.pt")
    for path in (tmp_path, tmp_path / "checkpoint.pth", tmp_path / "other.pt"):
        assert torch.equal(weights.read(path)["a.weight"], tensors["a.weight"])
    shards = tmp_path / "sharded"
    shards.mkdir()
    save_file(tensors, shards / "model-00001-of-00001.safetensors")
    (shards / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}'
    )
    assert list(weights.read(shards)) == ["a.weight"]


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_no_code_runs_and_bad_files_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("evil.bin", "evil.pt", "cut.safetensors", "empty.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            weights.read(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="name the file"):
        weights.read(tmp_path)


def bert(legacy: bool, prefix: str) -> dict[str, Tensor]:
    """A two-layer BERT in the names of transformers, old or new."""
    gain, shift = ("gamma", "beta") if legacy else ("weight", "bias")
    tensors = {
        "embeddings.word_embeddings.weight": (64, 16),
        "embeddings.position_embeddings.weight": (512, 16),
        "embeddings.token_type_embeddings.weight": (2, 16),
        f"embeddings.LayerNorm.{gain}": (16,),
        f"embeddings.LayerNorm.{shift}": (16,),
        "pooler.dense.weight": (16, 16),
    }
    for layer in range(2):
        start = f"encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            tensors[f"{start}attention.self.{name}.weight"] = (16, 16)
            tensors[f"{start}attention.self.{name}.bias"] = (16,)
        for name, sizes in (
            ("attention.output", (16, 16)),
            ("intermediate", (32, 16)),
            ("output", (16, 32)),
        ):
            tensors[f"{start}{name}.dense.weight"] = sizes
            tensors[f"{start}{name}.dense.bias"] = sizes[:1]
        for name in ("attention.output", "output"):
            tensors[f"{start}{name}.LayerNorm.{gain}"] = (16,)
            tensors[f"{start}{name}.LayerNorm.{shift}"] = (16,)
    found = {prefix + name: torch.randn(sizes) for name, sizes in tensors.items()}
    return {**found, "cls.predictions.bias": torch.randn(64), "cls.seq_relationship.bias": torch.randn(2)}


@pytest.mark.parametrize(("legacy", "prefix"), [(False, "bert."), (True, "bert."), (False, "")])
def test_text_tower_starts_from_bert(legacy: bool, prefix: str, tmp_path: Path) -> None:
    model = albef_model()
    tensors = bert(legacy, prefix)
    save_file(tensors, tmp_path / "model.safetensors")
    cross = model.family.fusion_stack.blocks["1"].cross_norm.weight.clone()  # type: ignore[union-attr,index]
    weights.init_towers(model, tmp_path, None)
    state = model.state_dict()
    fused = tensors[f"{prefix}encoder.layer.1.attention.self.key.weight"]
    assert torch.equal(state["family.fusion_stack.blocks.1.attention.key.weight"], fused)
    assert torch.equal(state["twin.fusion_stack.blocks.1.attention.key.weight"], fused)
    positions = tensors[f"{prefix}embeddings.position_embeddings.weight"][:16]
    assert torch.equal(state["family.text_embeddings.position.weight"], positions)
    assert torch.equal(state["objectives.mlm.head.bias"], tensors["cls.predictions.bias"])
    assert torch.equal(state["objectives.mlm.head_twin.bias"], tensors["cls.predictions.bias"])
    assert torch.equal(state["family.fusion_stack.blocks.1.cross_norm.weight"], cross)


def test_image_tower_starts_from_transformers_and_timm_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    vit = transformers.ViTModel(sizes, add_pooling_layer=False).eval()
    vit.save_pretrained(tmp_path)
    config = replace(albef.tiny(), image_size=32)
    family = albef.build(config)
    model = PretrainModel(family, {})
    done = weights.init_towers(model, None, tmp_path)
    assert not done["vision"].unused
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(family.image_encoder(pixels), vit(pixels).last_hidden_state)
    timm = {f"blocks.{layer}.attn.qkv.weight": torch.randn(48, 16) for layer in range(2)} | {
        "head.weight": torch.randn(1000, 16)
    }
    weights.fill(model, timm, albef.INIT_VISION._replace(fills="none"))
    qkv = model.state_dict()["family.image_encoder.stack.blocks.1.attention.qkv.weight"]
    assert torch.equal(qkv, timm["blocks.1.attn.qkv.weight"])
