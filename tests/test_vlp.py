"""VLP: its layers against torch's own, what each position sees, its start, its names, and the authors' tensors."""

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
from tests.reference import vlp as reference
from tests.reference.compare import Folder, judge
from tests.shard_files import reference_folder
from vlscale import weights
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import vlp
from vlscale.model import PretrainModel
from vlscale.objectives import mlm, seq2seq
from vlscale.types import Batch, Stream

REGIONS, WIDTH = 5, 16  # of the miniature


def miniature() -> vlp.Vlp:
    """In evaluation, so without dropout; gains and shifts are random too, so that every parameter matters."""
    torch.manual_seed(0)
    family = vlp.build(vlp.tiny())
    for parameter in family.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.2)
    return family.eval()


def batch(padding: int = 0) -> Batch:
    return batch_for(vlp.tiny().inputs, vlp.tiny().vocab, padding=padding)


def streams(family: vlp.Vlp, given: Batch, view: str = "clean") -> tuple[Stream, Stream]:
    return family.encode_text(given.text[view]), family.encode_visual(given.visual[view])


def fused(family: vlp.Vlp, text: Stream, visual: Stream, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    made = family.fuse(text, visual, causal)
    assert made.text is not None
    assert made.visual is not None
    assert made.pooled is not None
    return made.text, made.visual, made.pooled


def test_published_size() -> None:
    with torch.device("meta"):
        family = vlp.build(vlp.Config())
    bert = 108_310_272 + 4 * 768  # bert-base-cased with its pooler, and four segments more
    regions = (2048 * 2048 + 2048) + (2048 * 768 + 768) + (1607 * 768 + 768)
    assert sum(parameter.numel() for parameter in family.parameters()) == bert + regions


def published(family: vlp.Vlp) -> dict[str, Tensor]:
    """The family's weights under the authors' names, written down on their own."""
    state = {name: value.detach() for name, value in family.state_dict().items()}
    found = {
        "bert.embeddings.word_embeddings.weight": state["words.word.weight"],
        "bert.embeddings.position_embeddings.weight": state["words.position.weight"],
        "bert.embeddings.token_type_embeddings.weight": state["joined.segment.weight"],
    }
    for part in ("weight", "bias"):
        names = {
            "bert.embeddings.LayerNorm": "joined.norm",
            "bert.pooler.dense": "pooler.dense",
            "vis_embed.0": "content.fc1",
            "vis_embed.2": "content.fc2",
            "vis_pe_embed.0": "place.linear",
        }
        for number in range(family.config.layers):
            theirs, ours = f"bert.encoder.layer.{number}.", f"stack.blocks.{number}."
            names |= {f"{theirs}attention.self.{each}": f"{ours}attention.{each}" for each in ("query", "key", "value")}
            names[f"{theirs}attention.output.dense"] = f"{ours}attention.output"
            names[f"{theirs}attention.output.LayerNorm"] = f"{ours}attention_norm"
            names[f"{theirs}intermediate.dense"] = f"{ours}mlp.fc1"
            names[f"{theirs}output.dense"] = f"{ours}mlp.fc2"
            names[f"{theirs}output.LayerNorm"] = f"{ours}mlp_norm"
        found |= {f"{name}.{part}": state[f"{ours}.{part}"] for name, ours in names.items()}
    return found


def torch_layers(family: vlp.Vlp, hidden: Tensor, hides: Tensor) -> Tensor:
    """The same layers as torch's own; `hides` [B, T, T], True = must not be seen."""
    state, config = published(family), family.config
    for number in range(config.layers):
        start = f"bert.encoder.layer.{number}."
        layer = nn.TransformerEncoderLayer(
            config.hidden, config.heads, config.intermediate, 0.0, F.gelu, 1e-5, batch_first=True
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


def even(values: Tensor) -> Tensor:
    """Mean 0, variance 1 over the last axis."""
    mean, variance = values.mean(dim=-1, keepdim=True), values.var(dim=-1, unbiased=False, keepdim=True)
    return (values - mean) / (variance + 1e-5).sqrt()


def regions_by_hand(family: vlp.Vlp, given: Batch) -> Tensor:
    state, regions = published(family), given.visual["clean"]
    assert regions.boxes is not None
    assert regions.class_probs is not None
    content = regions.feats
    for layer in ("vis_embed.0", "vis_embed.2"):
        content = F.linear(content, state[f"{layer}.weight"], state[f"{layer}.bias"]).clamp(min=0)
    place = torch.cat([even(regions.boxes), even(regions.class_probs)], dim=2)
    return content + F.linear(place, state["vis_pe_embed.0.weight"], state["vis_pe_embed.0.bias"]).clamp(min=0)


@pytest.mark.parametrize("causal", [False, True])
def test_forward_is_torchs_layers(causal: bool) -> None:
    family, given = miniature(), batch()
    state, text, mask = published(family), given.text["clean"], given.visual["clean"].mask
    assert mask is not None
    size, length = text.ids.shape
    separator = torch.full((size, 1), 2)
    slots = torch.ones(size, REGIONS, dtype=torch.int64)
    ids = torch.cat([text.ids[:, :1], slots, separator, text.ids[:, 1:]], dim=1)
    hidden = state["bert.embeddings.word_embeddings.weight"][ids]
    hidden = hidden + state["bert.embeddings.position_embeddings.weight"][: ids.shape[1]]
    hidden[:, 1 : REGIONS + 1] = regions_by_hand(family, given)
    picture, sentence = (4, 5) if causal else (0, 1)
    segments = torch.full((size, REGIONS + 2), picture)
    segments = torch.cat([segments, torch.where(text.mask[:, 1:], sentence, 0)], dim=1)
    hidden = hidden + state["bert.embeddings.token_type_embeddings.weight"][segments]
    gain, shift = (state[f"bert.embeddings.LayerNorm.{part}"] for part in ("weight", "bias"))
    hidden = F.layer_norm(hidden, (WIDTH,), gain, shift, 1e-5)
    sees = torch.cat([text.mask[:, :1], mask, separator == 2, text.mask[:, 1:]], dim=1)
    sees = sees[:, None, :].repeat(1, ids.shape[1], 1)
    if causal:
        for row in range(ids.shape[1]):
            sees[:, row, max(row + 1, REGIONS + 2) :] = False
    hidden = torch_layers(family, hidden, ~sees)
    text_out, visual_out, pooled = fused(family, *streams(family, given), causal)
    want = torch.cat([hidden[:, :1], hidden[:, REGIONS + 2 :]], dim=1)
    torch.testing.assert_close(text_out[text.mask], want[text.mask])
    torch.testing.assert_close(visual_out, hidden[:, 1 : REGIONS + 1])
    want = F.linear(hidden[:, 0], state["bert.pooler.dense.weight"], state["bert.pooler.dense.bias"]).tanh()
    torch.testing.assert_close(pooled, want)
    assert text_out.shape == (size, length, WIDTH)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_real(causal: bool) -> None:
    family, given, longer = miniature(), batch(), batch(padding=2)
    mask, regions = given.text["clean"].mask, given.visual["clean"]
    assert regions.mask is not None
    short = fused(family, *streams(family, given), causal)
    long = fused(family, *streams(family, longer), causal)
    torch.testing.assert_close(short[0][mask], long[0][:, : mask.shape[1]][mask])
    torch.testing.assert_close(short[1][regions.mask], long[1][regions.mask])
    filled = regions._replace(feats=regions.feats.masked_fill(~regions.mask[..., None], 9.0))
    other = fused(family, *streams(family, replace(given, visual={"clean": filled})), causal)
    torch.testing.assert_close(short[0][mask], other[0][mask])
    torch.testing.assert_close(short[2], other[2])


def test_causal_words_do_not_see_what_comes_later_and_the_picture_sees_no_word() -> None:
    family = miniature()
    text, visual = streams(family, batch())
    later = text._replace(hidden=torch.cat([text.hidden[:, :3], text.hidden[:, 3:] + torch.randn(WIDTH)], dim=1))
    before, after = fused(family, text, visual, True), fused(family, later, visual, True)
    torch.testing.assert_close(before[0][:, :3], after[0][:, :3])
    torch.testing.assert_close(before[1], after[1])
    torch.testing.assert_close(before[2], after[2])  # [CLS] is the picture's
    assert not torch.allclose(before[0][:, 3], after[0][:, 3])
    seen = fused(family, text, visual._replace(hidden=visual.hidden + torch.randn(WIDTH)), True)
    assert not torch.allclose(before[0][:, 1], seen[0][:, 1])
    assert not torch.allclose(fused(family, text, visual, False)[1], before[1])


def test_hidden_regions_are_nothing() -> None:
    family, given = miniature(), batch()
    hidden, picked = streams(family, given, "masked")[1].hidden, given.visual["masked"].picked
    assert picked is not None
    assert not hidden[picked].any()
    torch.testing.assert_close(hidden[~picked], streams(family, given)[1].hidden[~picked])


def test_segments_by_hand() -> None:
    mask, sentence = torch.tensor([[1, 1, 0, 1, 1, 1, 0]]).bool(), torch.arange(7) >= 4
    assert vlp.segments_of(mask, sentence, causal=True).tolist() == [[4, 4, 4, 4, 5, 5, 0]]
    assert vlp.segments_of(mask, sentence, causal=False).tolist() == [[0, 0, 0, 0, 1, 1, 0]]


def test_start() -> None:
    torch.manual_seed(0)
    family = vlp.build(replace(vlp.tiny(), hidden=128, intermediate=256, feats=300))
    state = family.state_dict()
    for name in ("words.word", "joined.segment", "pooler.dense", "stack.blocks.1.mlp.fc1"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.15), name
    assert not state["stack.blocks.0.attention.query.bias"].any()
    assert state["content.fc1.weight"].std().item() == pytest.approx((3 * 300) ** -0.5, rel=0.1)  # torch's own
    assert state["content.fc1.bias"].any()


def test_the_scale_of_the_start() -> None:
    made = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        made.append(vlp.build(replace(vlp.tiny(), init_scale=scale)).state_dict())
    scaled = {name for name, tensor in made[0].items() if not torch.equal(tensor, made[1][name])}
    assert scaled == {
        name for name, tensor in made[0].items() if name.startswith(("stack", "pooler")) and tensor.ndim == 2
    }
    assert all(torch.equal(4 * made[0][name], made[1][name]) for name in scaled)


def test_bf16_takes_fp32_regions() -> None:
    family = miniature().to(torch.bfloat16)
    text, visual = streams(family, batch())
    assert visual.hidden.dtype == torch.bfloat16
    assert fused(family, text, visual, True)[2].dtype == torch.bfloat16


def test_flops_equal_torchs_counter() -> None:
    family, given = miniature(), batch()
    text, visual = streams(family, given)
    passes: dict[str, Callable[[], Any]] = {
        "encode_text": lambda: family.encode_text(given.text["clean"]),
        "encode_visual": lambda: family.encode_visual(given.visual["clean"]),
        "fuse": lambda: family.fuse(text, visual, causal=True),
    }
    expected = family.flops(given.text["clean"].ids.shape[1])
    assert set(passes) == set(expected)
    for name, run in passes.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        assert 4 * expected[name] == counter.get_total_flops(), name


@pytest.mark.parametrize(
    "wrong", [{"heads": 3}, {"text_length": 19}, {"regions": 12}, {"segments": 2}, {"separator_id": 64}]
)
def test_wrong_sizes(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        vlp.build(replace(vlp.tiny(), **wrong))


def model_of() -> PretrainModel:
    torch.manual_seed(1)
    family = vlp.build(vlp.tiny())
    words, both = seq2seq.build(seq2seq.Config(), family), mlm.build(mlm.Config(soften=0.0), family)
    return PretrainModel(family, {"seq2seq": words, "mlm": both})


def all_published() -> dict[str, Tensor]:
    """The family's and the word head's."""
    torch.manual_seed(3)
    start = "cls.predictions."
    found = {f"{start}transform.dense.weight": torch.randn(WIDTH, WIDTH), f"{start}bias": torch.randn(64)}
    for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
        found[f"{start}transform.{name}"] = torch.randn(WIDTH)
    return {**published(miniature()), **found, f"{start}decoder.weight": torch.randn(64, WIDTH)}


def test_published_weights_fill_everything() -> None:
    tensors, model = all_published(), model_of()
    done = weights.fill(model, tensors, vlp.PUBLISHED)
    assert done.left == ()
    assert done.unused == ("cls.predictions.decoder.weight",)
    torch.testing.assert_close(model.family.state_dict(), miniature().state_dict())
    for name in ("seq2seq", "mlm"):
        head: Any = model.objectives[name].head
        assert torch.equal(head.dense.weight, tensors["cls.predictions.transform.dense.weight"])
    with pytest.raises(CheckpointError, match="does not fill"):
        weights.fill(model, {name: each for name, each in tensors.items() if "vis_pe" not in name}, vlp.PUBLISHED)


def test_start_from_bert_gives_each_segment_its_row() -> None:
    tensors, model = all_published(), model_of()
    bert = {name: each for name, each in tensors.items() if not name.startswith("vis_")}
    table = torch.randn(2, WIDTH)
    bert["bert.embeddings.token_type_embeddings.weight"] = table
    bert["cls.seq_relationship.weight"] = torch.randn(2, WIDTH)
    done = weights.fill(model, bert, vlp.INIT_TEXT)
    assert {name.split(".")[1] for name in done.left} == {"content", "place"}
    first, second = table
    rows = model.family.state_dict()["joined.segment.weight"]
    torch.testing.assert_close(rows, torch.stack([first, second, first, first, first, second]))


def test_agrees_with_the_authors() -> None:
    folder = Folder.open(reference_folder("vlp"))
    report = judge(folder, "vlp", reference.run(folder))
    assert report.ok
    assert report.not_compared == []
