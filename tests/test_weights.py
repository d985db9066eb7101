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
from tests.runs import TINY
from vlscale import build, config, weights
from vlscale.errors import CheckpointError, ConfigError
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


def in_our_names(model: PretrainModel, path: Path, without: str = "nothing at all") -> Path:
    """A file of the model's tensors."""
    named = (*model.named_parameters(), *model.named_buffers())
    save_file({name: value.detach().clone() for name, value in named if not name.startswith(without)}, path)
    return path


def test_a_run_starts_from_whole_weights(tmp_path: Path) -> None:
    first, second = albef_model(seed=0), albef_model(seed=1)
    with torch.no_grad():
        for _, twin in first.momentum_pairs():
            twin.add_(1.0)  # what the twin of the earlier run was does not count
        first.key_queues()["text"].keys.zero_()
    empty = second.key_queues()["text"].keys.clone()
    done = weights.init_whole(second, in_our_names(first, tmp_path / "whole.safetensors"))
    here, there = second.state_dict(), first.state_dict()
    for name in there:
        if name.startswith(("family.", "objectives.")) and "twin" not in name:
            assert torch.equal(here[name], there[name]), name
        if name.startswith("twin."):
            assert torch.equal(here[name], there[name.replace("twin.", "family.", 1)]), name
    assert torch.equal(here["objectives.mlm.head_twin.bias"], there["objectives.mlm.head.bias"])
    assert torch.equal(second.key_queues()["text"].keys, empty)
    assert weights.owners(done.left) == "queues.image, queues.text"
    assert weights.owners(done.unused) == "queues.image, queues.text, twin"


def test_heads_that_the_file_or_the_run_lacks(tmp_path: Path) -> None:
    model = albef_model(queue=0, soften=0.0)
    start = model.state_dict()["objectives.itm.head.weight"].clone()
    file = in_our_names(albef_model(seed=1), tmp_path / "whole.safetensors", without="objectives.itm")
    done = weights.init_whole(model, file)
    assert weights.owners(done.left) == "objectives.itm"
    assert "objectives.mlm.head_twin.bias" in done.unused
    assert torch.equal(model.state_dict()["objectives.itm.head.weight"], start)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (1, r"whole.safetensors lacks 'family.image_encoder.stack.blocks.1.\S+' \(12 tensors differ\)"),
        (3, r"no place for \S+whole.safetensors's 'family.image_encoder.stack.blocks.2."),
    ],
)
def test_whole_weights_of_another_network(layers: int, sentence: str, tmp_path: Path) -> None:
    other = PretrainModel(albef.build(replace(albef.tiny(), visual_layers=layers)), {})
    with pytest.raises(CheckpointError, match=sentence):
        weights.init_whole(albef_model(), in_our_names(other, tmp_path / "whole.safetensors"))


def test_whole_weights_of_another_size(tmp_path: Path) -> None:
    other = PretrainModel(albef.build(replace(albef.tiny(), vocab=65)), {})
    with pytest.raises(CheckpointError, match=r"word.weight' is \(65, 16\) in .*, but \(64, 16\) in this run"):
        weights.init_whole(albef_model(), in_our_names(other, tmp_path / "whole.safetensors"))


def test_a_recipe_with_whole_weights(tmp_path: Path) -> None:
    shrunk = [*TINY, "family.vocab=64"]
    first = build.build_model(config.load("quickstart", shrunk))
    file = in_our_names(first, tmp_path / "whole.safetensors", without="objectives.itm")
    said: list[str] = []
    second = build.build_model(config.load("quickstart", [*shrunk, "seed=7", f"init.weights={file}"]), said.append)
    for name, value in first.family.state_dict().items():
        assert torch.equal(second.family.state_dict()[name], value)
    assert "left at their start: objectives.itm, queues.image, queues.text; not used: queues.image" in said[0]
    with pytest.raises(ConfigError, match=r"leave out init\.text"):
        build.build_model(config.load("quickstart", [*shrunk, f"init.weights={file}", "init.vision=deit"]))


def test_parallel_prefixes_are_left_out(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "module.b": torch.ones(2)}, tmp_path / "ddp.pt")
    torch.save({"module.a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "own.pt")
    assert set(weights.read(tmp_path / "ddp.pt")) == {"a", "b"}
    assert set(weights.read(tmp_path / "own.pt")) == {"module.a", "b"}
