"""CLIP: its towers against torch's own transformer layers, its start, its names, and where a text is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import batch_for
from tests.reference import clip as reference
from tests.reference.compare import Folder, judge
from tests.shard_files import reference_folder
from vlscale import config, weights
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import clip
from vlscale.model import PretrainModel
from vlscale.nn.attention import attention_mask, causal_mask
from vlscale.nn.temperature import LogitScale
from vlscale.nn.transformer import Mlp, quick_gelu
from vlscale.nn.vit import normalize_pixels
from vlscale.objectives import sigmoid
from vlscale.types import Batch, Stream, Text, Visual


def miniature(config: clip.Config | None = None, seed: int = 0) -> clip.Clip:
    """Gains and shifts are random too, so that every parameter matters."""
    torch.manual_seed(seed)
    family = clip.build(config or clip.tiny())
    for name, parameter in family.named_parameters():
        if parameter.ndim == 1 and "temperature" not in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return family


def batch(padding: int = 0) -> Batch:
    return batch_for(clip.tiny().inputs, clip.tiny().vocab, padding=padding)


def test_published_size() -> None:
    with torch.device("meta"):
        family = clip.build(clip.Config())
    assert sum(parameter.numel() for parameter in family.parameters()) == 151_277_313  # open_clip's ViT-B-32


def torch_blocks(family: clip.Clip, prefix: str, layers: int, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The same blocks as torch's own layers."""
    state = published(family)
    config = family.config
    heads = config.visual_heads if prefix else config.heads
    for number in range(layers):
        start = f"{prefix}transformer.resblocks.{number}."
        activation = quick_gelu if config.gelu == "quick" else F.gelu
        width, inner = hidden.shape[2], len(state[f"{start}mlp.c_fc.bias"])
        layer = nn.TransformerEncoderLayer(width, heads, inner, 0.0, activation, batch_first=True, norm_first=True)
        names = {"self_attn.": "attn.", "linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj.", "norm1.": "ln_1."}
        names["norm2."] = "ln_2."
        found = {}
        for name in layer.state_dict():
            part = next(part for part in names if name.startswith(part))
            found[name] = state[start + names[part] + name.removeprefix(part)]
        layer.load_state_dict(found)
        hidden = layer(hidden, mask)
    return hidden


def norm(family: clip.Clip, name: str, hidden: Tensor) -> Tensor:
    state = published(family)
    return F.layer_norm(hidden, hidden.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


@pytest.mark.parametrize("quick", [False, True])
def test_towers_are_torchs_layers(quick: bool) -> None:
    config = replace(clip.tiny(), gelu="quick" if quick else "erf")
    family, given = miniature(config), batch()
    state, text = published(family), given.text["clean"]
    length = text.ids.shape[1]
    hidden = state["token_embedding.weight"][text.ids] + state["positional_embedding"][:length]
    later = torch.full((length, length), float("-inf")).triu(1)
    hidden = norm(family, "ln_final", torch_blocks(family, "", config.text_layers, hidden, later))
    last = text.mask.sum(dim=1) - 1
    embed = hidden[torch.arange(4), last] @ state["text_projection"]
    out = family.encode_text(text)
    torch.testing.assert_close(out.hidden, hidden)
    torch.testing.assert_close(out.embed, embed / embed.norm(dim=1, keepdim=True))

    pixels = normalize_pixels(given.visual["clean"].feats, torch.float32)
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=config.patch).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(4, 1, -1)
    hidden = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    hidden = torch_blocks(family, "visual.", config.visual_layers, norm(family, "visual.ln_pre", hidden), None)
    hidden = norm(family, "visual.ln_post", hidden)
    embed = hidden[:, 0] @ state["visual.proj"]
    out = family.encode_visual(given.visual["clean"])
    torch.testing.assert_close(out.hidden, hidden)
    torch.testing.assert_close(out.embed, embed / embed.norm(dim=1, keepdim=True))
    ready = family.encode_visual(Visual(pixels))
    torch.testing.assert_close(ready.hidden, out.hidden)


def test_nothing_behind_a_token_reaches_it() -> None:
    family, text = miniature(), batch().text["clean"]
    changed = text._replace(ids=text.ids.clone())
    changed.ids[:, 4:] = 7
    before, after = family.encode_text(text), family.encode_text(changed)
    torch.testing.assert_close(before.hidden[:, :4], after.hidden[:, :4])
    assert not torch.allclose(before.hidden[:, 4], after.hidden[:, 4])
    longer = family.encode_text(batch(padding=3).text["clean"])
    torch.testing.assert_close(longer.embed, before.embed)
    assert causal_mask(3, text.ids.device).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    combined = attention_mask(text.mask, causal=True)
    assert combined is not None
    assert torch.equal(combined[:, 0], causal_mask(8, text.ids.device) & text.mask[:, None, :])


def test_where_a_text_is_read() -> None:
    ids = torch.tensor([[5, 3, 63, 0], [63, 2, 63, 7], [1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    family = miniature()
    assert family.ends(Text(ids, mask)).tolist() == [2, 3, 1]
    assert miniature(replace(clip.tiny(), pool="largest")).ends(Text(ids, mask)).tolist() == [2, 0, 1]
    hidden = family.encode_text(Text(ids, mask))
    want = F.normalize(hidden.hidden[1, 3] @ family.text_proj.weight.T, dim=0)
    assert hidden.embed is not None
    torch.testing.assert_close(hidden.embed[1], want)


def test_bf16_keeps_embeddings_and_temperature_fp32() -> None:
    family = miniature().to(torch.bfloat16)
    for stream in (family.encode_text(batch().text["clean"]), family.encode_visual(batch().visual["clean"])):
        assert stream.hidden.dtype == torch.bfloat16
        assert stream.embed is not None
        assert stream.embed.dtype == torch.float32
        torch.testing.assert_close(stream.embed.norm(dim=1), torch.ones(4))
    assert family.temperature().dtype == torch.float32


def test_temperature_is_learned_as_a_logarithm_of_the_scale() -> None:
    scale = LogitScale(0.07)
    assert scale.value.tolist() == pytest.approx([2.6592600])  # ln(1 / 0.07)
    temperature = scale()
    assert temperature.shape == (1,)
    assert temperature.item() == pytest.approx(0.07)
    temperature.backward()
    assert scale.value.grad is not None
    assert scale.value.grad.item() == pytest.approx(-0.07)
    parameter, least, greatest = scale.limits()
    assert parameter is scale.value
    assert [least, greatest] == pytest.approx([0.0, 4.6051702])  # ln 100
    scale.value.data.fill_(7.0)
    assert scale().item() == pytest.approx(torch.tensor(-7.0).exp().item())  # the engine clamps, not the pass


def test_quick_gelu() -> None:
    values = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(quick_gelu(values), values / (1 + torch.exp(-1.702 * values)))
    layer = Mlp(4, 8, quick_gelu)
    hidden = torch.randn(2, 4)
    torch.testing.assert_close(layer(hidden), layer.fc2(quick_gelu(layer.fc1(hidden))))


def test_start() -> None:
    torch.manual_seed(0)
    config = replace(clip.tiny(), visual_width=256, visual_intermediate=512, hidden=128, intermediate=512, embed=64)
    family = clip.build(replace(config, image_size=64, text_length=32, text_layers=3))
    width, hidden, residual = 256, 128, (2 * 3) ** -0.5
    want = {  # standard deviations; of uniform ones, half the range over sqrt 3
        "text_tokens.word.weight": 0.02,
        "text_tokens.positions.weight": 0.01,
        "text_stack.blocks.1.attention.qkv.weight": hidden**-0.5,
        "text_stack.blocks.1.attention.output.weight": hidden**-0.5 * residual,
        "text_stack.blocks.1.mlp.fc1.weight": (2 * hidden) ** -0.5,
        "text_stack.blocks.1.mlp.fc2.weight": hidden**-0.5 * residual,
        "text_proj.weight": hidden**-0.5,
        "visual_proj.weight": width**-0.5,
        "image_encoder.tokens.class_token": width**-0.5,
        "image_encoder.tokens.positions": width**-0.5,
        "image_encoder.stack.blocks.0.attention.qkv.weight": (2 / (width + 3 * width)) ** 0.5,  # Xavier
        "image_encoder.stack.blocks.0.attention.output.weight": (3 * width) ** -0.5,
        "image_encoder.stack.blocks.0.mlp.fc2.weight": (3 * 512) ** -0.5,
    }
    state = family.state_dict()
    for name, std in want.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.15), name
    for name in ("qkv", "output"):
        assert not state[f"text_stack.blocks.0.attention.{name}.bias"].any()
        assert not state[f"image_encoder.stack.blocks.0.attention.{name}.bias"].any()
    assert (state["text_stack.blocks.0.mlp.fc1.bias"].abs() > 0).any()


@pytest.mark.parametrize("system", ["clip", "siglip"])
def test_flops_equal_torchs_counter(system: str) -> None:
    family, given = miniature(siglip() if system == "siglip" else None), batch()
    expected = family.flops(given.text["clean"].ids.shape[1])
    passes: dict[str, Callable[[], Stream]] = {
        "encode_text": lambda: family.encode_text(given.text["clean"]),
        "encode_visual": lambda: family.encode_visual(given.visual["clean"]),
    }
    assert set(passes) == set(expected)
    for name, run in passes.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        assert 4 * expected[name] == counter.get_total_flops(), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 20},
        {"heads": 3},
        {"visual_heads": 3},
        {"pool": "middle"},
        {"temperature": 0.001},
        {"temperature": 0.0},
        {"pool": "last"},
        {"gelu": "relu"},
        {"visual_pool": "map"},
    ],
)
def test_wrong_sizes(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        clip.build(replace(clip.tiny(), **wrong))


def published(family: clip.Clip) -> dict[str, Tensor]:
    """The family's weights under open_clip's names and in its shapes, written down on their own."""
    state = {name: value.detach() for name, value in family.state_dict().items()}
    found = {
        "visual.class_embedding": state["image_encoder.tokens.class_token"][0, 0],
        "visual.positional_embedding": state["image_encoder.tokens.positions"][0],
        "visual.conv1.weight": state["image_encoder.patches.projection.weight"],
        "visual.proj": state["visual_proj.weight"].T,
        "token_embedding.weight": state["text_tokens.word.weight"],
        "positional_embedding": state["text_tokens.positions.weight"],
        "text_projection": state["text_proj.weight"].T,
        "logit_scale": state["temperature.value"][0],
    }
    config = family.config
    for part in ("weight", "bias"):
        for theirs, ours in {
            "visual.ln_pre": "image_encoder.pre_norm",
            "visual.ln_post": "image_encoder.norm",
            "ln_final": "text_norm",
        }.items():
            found[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
        for prefix, stack, layers in (
            ("visual.", "image_encoder.stack", config.visual_layers),
            ("", "text_stack", config.text_layers),
        ):
            for number in range(layers):
                theirs, ours = f"{prefix}transformer.resblocks.{number}.", f"{stack}.blocks.{number}."
                found[f"{theirs}attn.in_proj_{part}"] = state[f"{ours}attention.qkv.{part}"]
                for name, module in {
                    "ln_1": "attention_norm",
                    "attn.out_proj": "attention.output",
                    "ln_2": "mlp_norm",
                    "mlp.c_fc": "mlp.fc1",
                    "mlp.c_proj": "mlp.fc2",
                }.items():
                    found[f"{theirs}{name}.{part}"] = state[f"{ours}{module}.{part}"]
    return found


# --- SigLIP ------------------------------------------------------------------------------------------------


def siglip() -> clip.Config:
    """SigLIP's options at a miniature's sizes."""
    towers = replace(clip.tiny(), gelu="tanh", norm_eps=1e-6, visual_pool="map", embed=16, text_bias=True)
    return replace(towers, causal=False, pool="last", pad=1, temperature=0.1)


def transformers_siglip(config: clip.Config) -> transformers.SiglipModel:
    """transformers' model of the same sizes, every weight drawn."""
    vision = {"image_size": config.image_size, "patch_size": config.patch, "hidden_size": config.visual_width}
    vision |= {"intermediate_size": config.visual_intermediate, "num_hidden_layers": config.visual_layers}
    text = {"vocab_size": config.vocab, "max_position_embeddings": config.text_length, "hidden_size": config.hidden}
    text |= {"intermediate_size": config.intermediate, "num_hidden_layers": config.text_layers}
    text |= {"projection_size": config.embed, "num_attention_heads": config.heads}
    vision |= {"num_attention_heads": config.visual_heads}
    sizes = transformers.SiglipConfig(text_config=text, vision_config=vision)
    torch.manual_seed(3)
    model = transformers.SiglipModel(sizes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_siglips_published_size() -> None:
    with torch.device("meta"):
        family = clip.build(config.load("siglip_vit_b16").family)
    assert sum(parameter.numel() for parameter in family.parameters()) == 203_155_969  # and logit_bias


def test_siglips_towers_are_transformers() -> None:
    """Their weights under their names fill ours, and both give the same; texts are filled up and read at the end."""
    theirs, given = transformers_siglip(siglip()), batch_for(siglip().inputs, siglip().vocab)
    family = clip.build(siglip())
    model = PretrainModel(family, {"sigmoid": sigmoid.build(sigmoid.Config(), family)})
    model.twin = copy.deepcopy(family)
    loaded = weights.fill(model, theirs.state_dict(), clip.SIGLIP)
    assert loaded.unused == ()
    assert loaded.left == ()

    text, pixels = given.text["clean"], given.visual["clean"].feats
    full = torch.full((len(given), siglip().text_length), siglip().pad)
    for row, (ids, mask) in enumerate(zip(text.ids, text.mask, strict=True)):
        full[row, : int(mask.sum())] = ids[mask]
    with torch.no_grad():
        out = theirs(input_ids=full, pixel_values=pixels.float() / 127.5 - 1)
        for network in (family, model.twin):
            words, picture = network.encode_text(text), network.encode_visual(given.visual["clean"])
            torch.testing.assert_close(words.hidden, out.text_model_output.last_hidden_state)
            torch.testing.assert_close(picture.hidden, out.vision_model_output.last_hidden_state)
            torch.testing.assert_close(words.embed, out.text_embeds)
            torch.testing.assert_close(picture.embed, out.image_embeds)
        bias = model.get_parameter("objectives.sigmoid.bias")
        assert words.embed is not None
        logits = words.embed @ picture.embed.T / family.temperature() + bias
        torch.testing.assert_close(logits, out.logits_per_text)
    assert words.mask is not None
    assert words.mask.sum(dim=1).tolist() == text.mask.sum(dim=1).tolist()


def test_siglip_for_another_picture() -> None:
    source = transformers_siglip(siglip()).state_dict()
    target = clip.build(replace(siglip(), image_size=24, text_length=8))
    weights.fill(PretrainModel(target, {}), source, clip.SIGLIP)
    assert target.image_encoder.tokens.positions.shape == (1, 9, 16)
    words = source["text_model.embeddings.position_embedding.weight"]
    assert torch.equal(target.text_tokens.positions.weight, words[:8])


def test_siglips_padding_does_not_depend_on_the_batch() -> None:
    family = miniature(siglip())
    short, long = (batch_for(siglip().inputs, 64, padding=padding).text["clean"] for padding in (0, 3))
    torch.testing.assert_close(family.encode_text(short).embed, family.encode_text(long).embed)


def test_siglips_start() -> None:
    torch.manual_seed(0)
    sizes = {"visual_width": 128, "visual_intermediate": 256, "hidden": 64, "intermediate": 256, "embed": 128}
    state = clip.build(replace(siglip(), **sizes, image_size=64, text_length=32, vocab=200)).state_dict()
    xavier = (2 / (128 + 128)) ** 0.5
    want = {  # standard deviations of Xavier's uniform draws, and of flax's 1 / sqrt(fan in)
        "image_encoder.stack.blocks.0.attention.qkv.weight": xavier,
        "image_encoder.stack.blocks.0.mlp.fc1.weight": (2 / (128 + 256)) ** 0.5,
        "image_encoder.patches.projection.weight": (3 * 8 * 8) ** -0.5,
        "image_encoder.tokens.positions": 128**-0.5,
        "visual_pool.query.weight": xavier,
        "visual_pool.key_value.weight": xavier,
        "visual_pool.output.weight": xavier,
        "text_stack.blocks.1.mlp.fc2.weight": (2 / (64 + 256)) ** 0.5,
        "text_tokens.word.weight": 64**-0.5,
        "text_tokens.positions.weight": 64**-0.5,
        "text_proj.weight": 64**-0.5,
    }
    for name, std in want.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.1), name
    for name in ("text_proj.bias", "visual_pool.query.bias", "image_encoder.patches.projection.bias"):
        assert not state[name].any()
    assert 0 < state["visual_pool.mlp.fc1.bias"].std() < 3e-6


TEXT = ("token_embedding", "positional_embedding", "transformer.", "ln_final", "text_projection")


@pytest.mark.parametrize("layout", ["plain", "data parallel", "custom text"])
def test_published_names_fill_the_family_and_its_twin(layout: str) -> None:
    source, target = miniature(seed=1), miniature(seed=2)
    tensors = published(source)
    if layout == "data parallel":
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    if layout == "custom text":
        tensors = {f"text.{name}" if name.startswith(TEXT) else name: tensor for name, tensor in tensors.items()}
    model = PretrainModel(target, {})
    model.twin = copy.deepcopy(target)
    loaded = weights.fill(model, {**tensors, "logit_bias": torch.tensor(-10.0)}, clip.PUBLISHED)
    assert loaded.unused == ("logit_bias",)
    for network in (model.family, model.twin):
        for name, tensor in source.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor), name


def test_published_weights_for_another_picture_or_shorter_texts() -> None:
    source = miniature()
    target = miniature(replace(clip.tiny(), image_size=24, text_length=8))
    weights.fill(PretrainModel(target, {}), published(source), clip.PUBLISHED)
    table = target.image_encoder.tokens.positions
    assert table.shape == (1, 1 + 9, 16)
    assert torch.equal(table[:, 0], source.image_encoder.tokens.positions[:, 0])
    assert torch.equal(target.text_tokens.positions.weight, source.text_tokens.positions.weight[:8])


def test_weights_that_do_not_fit_are_refused() -> None:
    tensors = published(miniature())
    model = PretrainModel(miniature(), {})
    for changed, sentence in (
        ({**tensors, "visual.proj": torch.ones(16, 9)}, r"visual.proj.*\(8, 16\)"),
        ({**tensors, "visual.transformer.resblocks.2.ln_1.bias": torch.ones(16)}, "no place"),
        ({name: tensor for name, tensor in tensors.items() if name != "text_projection"}, "does not fill"),
        ({**tensors, "temp": torch.ones(1)}, "'temp' is unknown"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            weights.fill(model, changed, clip.PUBLISHED)


def test_agrees_with_the_authors() -> None:
    folder = Folder.open(reference_folder("clip"))
    report = judge(folder, "clip", reference.run(folder))
    assert [row for row in report.compared if not row.ok] == []
    assert report.not_compared == []
    assert {row.name for row in report.compared} == set(load_file(folder.path / "outputs.safetensors"))


def test_two_ranks_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    """And the runner takes any sizes; what it says of the authors' inexact variants is what they are known for."""
    tiny = clip.tiny()
    vision = {"width": 16, "head_width": 8, "layers": 2, "patch_size": 8, "image_size": 16}
    text = {"width": 16, "heads": 2, "layers": 2, "vocab_size": tiny.vocab, "context_length": tiny.text_length}
    sizes = {"vision": vision, "text": text, "embed_dim": 8, "mlp_ratio": 2.0, "quick_gelu": True}
    options = {"lr": 1e-3, "weight_decay": 0.2, "betas": [0.9, 0.98], "eps": 1e-6, "siglip_bias": -10.0}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **options, "siglip_scale": 2.3}))
    family = miniature(reference.family_config(json.loads((tmp_path / "config.json").read_text())))
    tensors = {"s0/text": batch().text["clean"].ids, "s0/image": torch.randn(4, 3, 16, 16)}
    save_file(tensors, tmp_path / "batch.safetensors")
    named = {name: tensor.contiguous().clone() for name, tensor in published(family).items()}
    save_file(named, tmp_path / "weights.safetensors")

    found = reference.run(Folder.open(tmp_path))["outputs.safetensors"]
    for name in named:
        whole = found[f"grad/{name}"]
        for variant, want in {
            "clip_local1_grad1": whole,
            "clip_local0_grad1": whole,
            "clip_local0_grad0": whole * (1.0 if name == "logit_scale" else 0.5),
            "siglip_bidir": found[f"siglip/grad/{name}"],
        }.items():
            torch.testing.assert_close(found[f"w2/{variant}/r0/ddp_grad/{name}"], want, rtol=1e-4, atol=1e-5)
    parts = torch.stack([found[f"w2/clip_local1_grad1/r{rank}/loss"] for rank in (0, 1)])
    torch.testing.assert_close(parts.mean(), found["s0/loss"])
    wrong = found["w2/clip_local1_grad0/r0/ddp_grad/visual.proj"]
    assert F.cosine_similarity(wrong.flatten(), found["grad/visual.proj"].flatten(), dim=0) < 0.99
