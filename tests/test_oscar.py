"""OSCAR: its layers against torch's own, what each position sees, its start, its names, and the authors' tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import batch_for
from tests.reference import oscar as reference
from tests.reference.compare import Folder, judge
from tests.shard_files import reference_folder
from vlscale import weights
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import oscar
from vlscale.model import PretrainModel
from vlscale.nn.single_stream import left_to_right
from vlscale.objectives import mlm, tag_contrast
from vlscale.types import Batch, Fused, Moment, Stream


def miniature(config: oscar.Config | None = None) -> oscar.Oscar:
    """In evaluation, so without dropout; gains and shifts are random too, so that every parameter matters."""
    torch.manual_seed(0)
    family = oscar.build(config or oscar.tiny())
    for parameter in family.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.2)
    return family.eval()


def batch(padding: int = 0) -> Batch:
    """Texts whose second half are tags."""
    config = oscar.tiny()
    made = batch_for(config.inputs, config.vocab, padding=padding)
    views = {}
    for view, text in made.text.items():
        second = torch.arange(text.ids.shape[1]) >= 4
        views[view] = text._replace(segments=(second & text.mask).long())
    return replace(made, text=views, tags_swapped=torch.tensor([0, 2, 1, 0]))


def streams(family: oscar.Oscar, given: Batch) -> tuple[Stream, Stream]:
    return family.encode_text(given.text["clean"]), family.encode_visual(given.visual["clean"])


def fused(family: oscar.Oscar, text: Stream, visual: Stream, causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    made: Fused = family.fuse(text, visual, causal)
    assert made.text is not None
    assert made.visual is not None
    assert made.pooled is not None
    return made.text, made.visual, made.pooled


def test_published_size() -> None:
    with torch.device("meta"):
        family = oscar.build(oscar.Config())
        plus = oscar.build(oscar.Config(region_norm=True))
    ours = sum(parameter.numel() for parameter in family.parameters())
    assert ours == 109_482_240 + 2054 * 768 + 768  # bert-base-uncased with its pooler, and the region map
    assert sum(parameter.numel() for parameter in plus.parameters()) == ours + 2 * 768


def published(family: oscar.Oscar) -> dict[str, Tensor]:
    """The family's weights under the authors' names, written down on their own."""
    state = {name: value.detach() for name, value in family.state_dict().items()}
    tables = {"word": "word_embeddings", "position": "position_embeddings", "segment": "token_type_embeddings"}
    found = {f"bert.embeddings.{name}.weight": state[f"text_embeddings.{ours}.weight"] for ours, name in tables.items()}
    for part in ("weight", "bias"):
        names = {
            "bert.embeddings.LayerNorm": "text_embeddings.norm",
            "bert.img_embedding": "region_embeddings.projection",
            "bert.LayerNorm": "region_embeddings.norm",
            "bert.pooler.dense": "pooler.dense",
        }
        for number in range(family.config.layers):
            theirs, ours = f"bert.encoder.layer.{number}.", f"stack.blocks.{number}."
            names |= {f"{theirs}attention.self.{each}": f"{ours}attention.{each}" for each in ("query", "key", "value")}
            names[f"{theirs}attention.output.dense"] = f"{ours}attention.output"
            names[f"{theirs}attention.output.LayerNorm"] = f"{ours}attention_norm"
            names[f"{theirs}intermediate.dense"] = f"{ours}mlp.fc1"
            names[f"{theirs}output.dense"] = f"{ours}mlp.fc2"
            names[f"{theirs}output.LayerNorm"] = f"{ours}mlp_norm"
        found |= {
            f"{name}.{part}": state[f"{ours}.{part}"] for name, ours in names.items() if f"{ours}.{part}" in state
        }
    return found


def norm(state: dict[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)


def torch_layers(family: oscar.Oscar, hidden: Tensor, hides: Tensor) -> Tensor:
    """The same layers as torch's own; `hides` [B, T, T], True = must not be seen."""
    state, config = published(family), family.config
    for number in range(config.layers):
        start = f"bert.encoder.layer.{number}."
        layer = nn.TransformerEncoderLayer(
            config.hidden, config.heads, config.intermediate, 0.0, F.gelu, 1e-12, batch_first=True
        )
        qkv = [state[f"{start}attention.self.{each}.weight"] for each in ("query", "key", "value")]
        biases = [state[f"{start}attention.self.{each}.bias"] for each in ("query", "key", "value")]
        loaded = {"self_attn.in_proj_weight": torch.cat(qkv), "self_attn.in_proj_bias": torch.cat(biases)}
        names = {"self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm"}
        names |= {"linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm"}
        for ours, theirs in names.items():
            loaded |= {f"{ours}.{part}": state[f"{start}{theirs}.{part}"] for part in ("weight", "bias")}
        layer.load_state_dict(loaded)
        hidden = layer(hidden, src_mask=hides.repeat_interleave(config.heads, dim=0))
    return hidden


@pytest.mark.parametrize("plus", [False, True])
def test_forward_is_torchs_layers(plus: bool) -> None:
    family, given = miniature(replace(oscar.tiny(), region_norm=plus)), batch()
    text, regions = given.text["clean"], given.visual["clean"]
    assert text.segments is not None
    assert regions.boxes is not None
    assert regions.mask is not None
    state = published(family)
    length = text.ids.shape[1]
    words = state["bert.embeddings.word_embeddings.weight"][text.ids]
    words = words + state["bert.embeddings.position_embeddings.weight"][:length]
    words = words + state["bert.embeddings.token_type_embeddings.weight"][text.segments]
    words = norm(state, "bert.embeddings.LayerNorm", words)
    rows = torch.cat([regions.feats, regions.boxes], dim=2)
    seen = F.linear(rows, state["bert.img_embedding.weight"], state["bert.img_embedding.bias"])
    seen = norm(state, "bert.LayerNorm", seen) if plus else seen
    first, second = streams(family, given)
    torch.testing.assert_close(first.hidden, words)
    torch.testing.assert_close(second.hidden, seen)
    mask = torch.cat([text.mask, regions.mask], dim=1)
    hides = ~mask[:, None, :].expand(-1, mask.shape[1], -1)
    hidden = torch_layers(family, torch.cat([words, seen], dim=1), hides)
    text_out, visual_out, pooled = fused(family, first, second)
    torch.testing.assert_close(text_out, hidden[:, :length])
    torch.testing.assert_close(visual_out, hidden[:, length:])
    want = F.linear(hidden[:, 0], state["bert.pooler.dense.weight"], state["bert.pooler.dense.bias"]).tanh()
    torch.testing.assert_close(pooled, want)


def test_padding_changes_nothing_real() -> None:
    family, given, longer = miniature(), batch(), batch(padding=3)
    mask = given.text["clean"].mask
    short, long = fused(family, *streams(family, given)), fused(family, *streams(family, longer))
    torch.testing.assert_close(short[0][mask], long[0][:, : mask.shape[1]][mask])
    torch.testing.assert_close(short[2], long[2])
    regions = given.visual["clean"]
    assert regions.mask is not None
    assert not regions.mask.all()
    torch.testing.assert_close(short[1][regions.mask], long[1][regions.mask])
    filled = regions._replace(feats=regions.feats.masked_fill(~regions.mask[..., None], 9.0))
    other = fused(family, *streams(family, replace(given, visual={"clean": filled})))
    torch.testing.assert_close(short[0][mask], other[0][mask])


def test_segments_and_places_matter() -> None:
    family, given = miniature(), batch()
    text, regions = given.text["clean"], given.visual["clean"]
    assert text.segments is not None
    assert regions.boxes is not None
    plain = family.encode_text(text._replace(segments=None)).hidden
    torch.testing.assert_close(plain[:, :4], family.encode_text(text).hidden[:, :4])
    assert not torch.allclose(plain[:, 4:], family.encode_text(text).hidden[:, 4:])
    moved = family.encode_visual(regions._replace(boxes=regions.boxes + 0.1)).hidden
    assert not torch.allclose(moved, family.encode_visual(regions).hidden)
    turned = family.encode_visual(regions._replace(feats=regions.feats.flip(1), boxes=regions.boxes.flip(1))).hidden
    torch.testing.assert_close(turned.flip(1), family.encode_visual(regions).hidden)  # no position


def test_left_to_right_mask_by_hand() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0]]).bool()  # three words, the last padding; two regions, the last padding
    seen = left_to_right(mask, torch.tensor([1, 1, 1, 0, 0]).bool())
    assert seen.int().tolist() == [
        [[[1, 0, 0, 1, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]]
    ]


def test_causal_words_do_not_see_what_comes_later_and_regions_see_no_word() -> None:
    family = miniature()
    text, visual = streams(family, batch())
    later = text._replace(hidden=torch.cat([text.hidden[:, :3], text.hidden[:, 3:] + torch.randn(16)], dim=1))
    before, after = fused(family, text, visual, causal=True), fused(family, later, visual, causal=True)
    torch.testing.assert_close(before[0][:, :3], after[0][:, :3])
    torch.testing.assert_close(before[1], after[1])
    assert not torch.allclose(before[0][:, 3], after[0][:, 3])
    other = fused(family, text, visual._replace(hidden=visual.hidden + torch.randn(16)), causal=True)
    assert not torch.allclose(before[0][:, 0], other[0][:, 0])
    assert not torch.allclose(fused(family, text, visual)[1], before[1])


def test_start() -> None:
    torch.manual_seed(0)
    family = oscar.build(replace(oscar.tiny(), hidden=128, intermediate=256, feats=200))
    state = family.state_dict()
    names = ("region_embeddings.projection", "pooler.dense", "stack.blocks.1.attention.query", "text_embeddings.word")
    for name in names:
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.1), name
    assert not state["region_embeddings.projection.bias"].any()
    assert not state["pooler.dense.bias"].any()


def test_the_scale_of_the_start() -> None:
    made = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        made.append(oscar.build(replace(oscar.tiny(), init_scale=scale)).state_dict())
    scaled = {name for name, tensor in made[0].items() if not torch.equal(tensor, made[1][name])}
    assert scaled == {name for name, tensor in made[0].items() if tensor.ndim == 2 and "text_embeddings" not in name}
    assert all(torch.equal(4 * made[0][name], made[1][name]) for name in scaled)


def test_bf16_takes_fp32_regions() -> None:
    family = miniature().to(torch.bfloat16)
    text, visual = streams(family, batch())
    assert visual.hidden.dtype == torch.bfloat16
    assert fused(family, text, visual)[2].dtype == torch.bfloat16


def test_flops_equal_torchs_counter() -> None:
    family, given = miniature(), batch()
    text, visual = streams(family, given)
    passes: dict[str, Callable[[], Any]] = {
        "encode_text": lambda: family.encode_text(given.text["clean"]),
        "encode_visual": lambda: family.encode_visual(given.visual["clean"]),
        "fuse": lambda: family.fuse(text, visual),
    }
    expected = family.flops(given.text["clean"].ids.shape[1])
    assert set(passes) == set(expected)
    for name, run in passes.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        assert 4 * expected[name] == counter.get_total_flops(), name


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"text_length": 99}])
def test_wrong_sizes(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        oscar.build(replace(oscar.tiny(), **wrong))


def model_of(config: oscar.Config) -> PretrainModel:
    torch.manual_seed(1)
    family = oscar.build(config)
    contrast = tag_contrast.build(tag_contrast.Config(classes=3), family)
    return PretrainModel(family, {"mlm": mlm.build(mlm.Config(soften=0.0), family), "tag_contrast": contrast})


def head_weights() -> dict[str, Tensor]:
    """Of the two heads, in the authors' names."""
    torch.manual_seed(3)
    shapes = {
        "cls.predictions.transform.dense.weight": (16, 16),
        "cls.predictions.transform.dense.bias": (16,),
        "cls.predictions.transform.LayerNorm.weight": (16,),
        "cls.predictions.transform.LayerNorm.bias": (16,),
        "cls.predictions.bias": (64,),
        "cls.seq_relationship.weight": (3, 16),
        "cls.seq_relationship.bias": (3,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_published_weights_fill_everything() -> None:
    source = miniature()
    tensors = {**published(source), **head_weights()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    model = model_of(oscar.tiny())
    done = weights.fill(model, tensors, oscar.PUBLISHED)
    assert done.left == ()
    assert done.unused == ("cls.predictions.decoder.weight",)
    torch.testing.assert_close(model.family.state_dict(), source.state_dict())
    head: Any = model.objectives["tag_contrast"].head
    assert torch.equal(head.weight, tensors["cls.seq_relationship.weight"])
    with pytest.raises(CheckpointError, match="does not fill"):
        weights.fill(
            model, {name: each for name, each in tensors.items() if "img_embedding" not in name}, oscar.PUBLISHED
        )
    with pytest.raises(CheckpointError, match="has no place"):
        weights.fill(model_of(replace(oscar.tiny(), region_norm=False)), tensors, oscar.PUBLISHED)


def test_start_from_bert() -> None:
    source = miniature()
    tensors = {**published(source), **head_weights()}
    regions = [name for name in tensors if "img_embedding" in name or name.startswith("bert.LayerNorm")]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    bert = {}
    for name, value in tensors.items():
        for new, former in old.items():
            name = name.replace(new, former)
        bert[name] = value
    for name in regions:
        bert.pop(name, None), bert.pop(name.replace("weight", "gamma").replace("bias", "beta"), None)
    model = model_of(oscar.tiny())
    done = weights.fill(model, bert, oscar.INIT_TEXT)
    assert set(done.unused) == {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}
    assert {name.split(".")[1] for name in done.left} == {"region_embeddings", "tag_contrast"}
    ours, theirs = model.family.state_dict(), source.state_dict()
    for name in ("text_embeddings.norm.weight", "stack.blocks.0.mlp_norm.bias", "pooler.dense.weight"):
        assert torch.equal(ours[name], theirs[name]), name


def test_a_published_step() -> None:
    model = model_of(oscar.tiny())
    losses = model(batch(), Moment(1)).losses
    total = model.total(losses, {})
    torch.testing.assert_close(total, losses["mlm"].value + losses["tag_contrast"].value)


@pytest.mark.parametrize("system", ["oscar", "oscar_plus"])
def test_agrees_with_the_authors(system: str) -> None:
    folder = Folder.open(reference_folder(system))
    report = judge(folder, system, reference.run(folder))
    assert report.ok
    assert report.not_compared == []
