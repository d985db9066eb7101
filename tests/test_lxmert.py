"""LXMERT: its layers against torch's own, what stays at its start, its names, and the authors' tensors."""

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
from tests.reference import lxmert as reference
from tests.reference.compare import Folder, judge
from tests.shard_files import reference_folder
from tests.whole_steps import check_whole
from vlscale import weights
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import lxmert
from vlscale.model import PretrainModel
from vlscale.nn.lxmert import TwoStreams
from vlscale.objectives import answer, itm, masked_object, mlm
from vlscale.recompute import set_activation_checkpointing
from vlscale.types import Batch, Fused, Moment, Stream

State = dict[str, Tensor]


def miniature(config: lxmert.Config | None = None) -> lxmert.Lxmert:
    """In evaluation, so without dropout; gains and shifts are random too, so that every parameter matters."""
    torch.manual_seed(0)
    family = lxmert.build(config or lxmert.tiny())
    for parameter in family.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.2)
    return family.eval()


def batch(padding: int = 0, size: int = 4) -> Batch:
    config = lxmert.tiny()
    return batch_for(config.inputs, config.vocab, size, padding)


def streams(family: lxmert.Lxmert, given: Batch) -> tuple[Stream, Stream]:
    return family.encode_text(given.text["clean"]), family.encode_visual(given.visual["clean"])


def fused(family: lxmert.Lxmert, text: Stream, visual: Stream) -> tuple[Tensor, Tensor, Tensor]:
    made: Fused = family.fuse(text, visual)
    assert made.text is not None
    assert made.visual is not None
    assert made.pooled is not None
    return made.text, made.visual, made.pooled


def test_published_size() -> None:
    with torch.device("meta"):
        family = lxmert.build(lxmert.Config())
    attention = 4 * (768 * 768 + 768) + 2 * 768
    layer = attention + 2 * 768 * 3072 + 3072 + 768 + 2 * 768
    words = (30522 + 512 + 2) * 768 + 2 * 768
    regions = (2048 + 4) * 768 + 2 * 768 + 2 * 2 * 768
    want = words + regions + (9 + 5) * layer + 5 * (attention + 2 * layer) + 768 * 768 + 768
    assert sum(parameter.numel() for parameter in family.parameters()) == want


def published(family: TwoStreams) -> State:
    """The network's weights under the authors' names, written down on their own."""
    config, names = family.sizes, {}
    for ours, theirs in {
        "text_embeddings.word.weight": "embeddings.word_embeddings.weight",
        "text_embeddings.position.weight": "embeddings.position_embeddings.weight",
        "text_embeddings.segment.weight": "embeddings.token_type_embeddings.weight",
    }.items():
        names[ours] = theirs
    pairs = {
        "text_embeddings.norm": "embeddings.LayerNorm",
        "region_embeddings.feature": "encoder.visn_fc.visn_fc",
        "region_embeddings.feature_norm": "encoder.visn_fc.visn_layer_norm",
        "region_embeddings.box": "encoder.visn_fc.box_fc",
        "region_embeddings.box_norm": "encoder.visn_fc.box_layer_norm",
        "pooler.dense": "pooler.dense",
    }

    def layer(ours: str, attention: str, inner: str, output: str) -> None:
        pairs.update({f"{ours}.attention.{each}": f"{attention}.self.{each}" for each in ("query", "key", "value")})
        pairs[f"{ours}.attention.output"] = f"{attention}.output.dense"
        pairs[f"{ours}.attention_norm"] = f"{attention}.output.LayerNorm"
        pairs[f"{ours}.mlp.fc1"] = f"{inner}.dense"
        pairs[f"{ours}.mlp.fc2"] = f"{output}.dense"
        pairs[f"{ours}.mlp_norm"] = f"{output}.LayerNorm"

    for stack, theirs, number in (
        ("text_stack", "layer", config.text_layers),
        ("visual_stack", "r_layers", config.visual_layers),
    ):
        for each in range(number):
            start = f"encoder.{theirs}.{each}"
            layer(f"{stack}.blocks.{each}", f"{start}.attention", f"{start}.intermediate", f"{start}.output")
    for each in range(config.cross_layers):
        ours, start = f"cross_stack.blocks.{each}", f"encoder.x_layers.{each}"
        for name in ("query", "key", "value"):
            pairs[f"{ours}.cross_attention.{name}"] = f"{start}.visual_attention.att.{name}"
        pairs[f"{ours}.cross_attention.output"] = f"{start}.visual_attention.output.dense"
        pairs[f"{ours}.cross_norm"] = f"{start}.visual_attention.output.LayerNorm"
        for stream, short in (("text", "lang"), ("visual", "visn")):
            layer(f"{ours}.{stream}", f"{start}.{short}_self_att", f"{start}.{short}_inter", f"{start}.{short}_output")
    for mine, theirs in pairs.items():
        names |= {f"{mine}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}
    state = {name: value.detach() for name, value in family.state_dict().items()}
    return {f"bert.{names[name]}": value for name, value in state.items()}


def linear(state: State, name: str, hidden: Tensor) -> Tensor:
    return F.linear(hidden, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, name: str, hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)


def attention(state: State, qkv: str, output: str, hidden: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """norm(x + attention(x, context)) by torch's own attention; `mask` [B, Lk], True = may be seen."""
    parts = [state[f"{qkv}.{each}.weight"] for each in ("query", "key", "value")]
    shifts = [state[f"{qkv}.{each}.bias"] for each in ("query", "key", "value")]
    module = nn.MultiheadAttention(hidden.shape[-1], lxmert.tiny().heads, batch_first=True)
    module.load_state_dict(
        {
            "in_proj_weight": torch.cat(parts),
            "in_proj_bias": torch.cat(shifts),
            "out_proj.weight": state[f"{output}.dense.weight"],
            "out_proj.bias": state[f"{output}.dense.bias"],
        }
    )
    met = module(hidden, context, context, key_padding_mask=~mask, need_weights=False)[0]
    return norm(state, f"{output}.LayerNorm", hidden + met)


def own_way(state: State, attention_name: str, inner: str, output: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """Self-attention and MLP."""
    hidden = attention(state, f"{attention_name}.self", f"{attention_name}.output", hidden, hidden, mask)
    added = linear(state, f"{output}.dense", F.gelu(linear(state, f"{inner}.dense", hidden)))
    return norm(state, f"{output}.LayerNorm", hidden + added)


def naive(state: State, given: Batch) -> tuple[Tensor, ...]:
    """Both streams alone, then together: text, regions, fused text, fused regions, pooled."""
    config, text, regions = lxmert.tiny(), given.text["clean"], given.visual["clean"]
    assert regions.mask is not None
    assert regions.boxes is not None
    words = state["bert.embeddings.word_embeddings.weight"][text.ids]
    words = words + state["bert.embeddings.position_embeddings.weight"][: text.ids.shape[1]]
    words = norm(state, "bert.embeddings.LayerNorm", words + state["bert.embeddings.token_type_embeddings.weight"][0])
    visn = "bert.encoder.visn_fc."
    seen = norm(state, f"{visn}visn_layer_norm", linear(state, f"{visn}visn_fc", regions.feats))
    seen = (seen + norm(state, f"{visn}box_layer_norm", linear(state, f"{visn}box_fc", regions.boxes))) / 2
    for number in range(config.text_layers):
        start = f"bert.encoder.layer.{number}."
        words = own_way(state, f"{start}attention", f"{start}intermediate", f"{start}output", words, text.mask)
    for number in range(config.visual_layers):
        start = f"bert.encoder.r_layers.{number}."
        seen = own_way(state, f"{start}attention", f"{start}intermediate", f"{start}output", seen, regions.mask)
    alone = (words, seen)
    for number in range(config.cross_layers):
        start = f"bert.encoder.x_layers.{number}."
        both = (f"{start}visual_attention.att", f"{start}visual_attention.output")
        words, seen = (
            attention(state, *both, words, seen, regions.mask),
            attention(state, *both, seen, words, text.mask),
        )
        words = own_way(state, f"{start}lang_self_att", f"{start}lang_inter", f"{start}lang_output", words, text.mask)
        seen = own_way(state, f"{start}visn_self_att", f"{start}visn_inter", f"{start}visn_output", seen, regions.mask)
    return (*alone, words, seen, linear(state, "bert.pooler.dense", words[:, 0]).tanh())


def test_forward_is_torchs_layers() -> None:
    family, given = miniature(), batch()
    text, visual = streams(family, given)
    made = (text.hidden, visual.hidden, *fused(family, text, visual))
    for ours, want in zip(made, naive(published(family), given), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


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
    torch.testing.assert_close(short[1][regions.mask], other[1][regions.mask])


def test_regions_without_a_mask_are_all_real() -> None:
    family, given = miniature(), batch()
    regions = given.visual["clean"]
    everyone = regions._replace(mask=torch.ones_like(regions.feats[..., 0], dtype=torch.bool))
    bare = regions._replace(mask=None)
    made = [fused(family, *streams(family, replace(given, visual={"clean": each}))) for each in (everyone, bare)]
    torch.testing.assert_close(made[0], made[1])


def test_the_first_place_and_the_only_segment_keep_their_start() -> None:
    family, given = miniature(), batch()
    fused(family, *streams(family, given))[2].sum().backward()
    tables = family.text_embeddings
    position, segment, word = (table.weight.grad for table in (tables.position, tables.segment, tables.word))
    assert position is not None
    assert segment is not None
    assert word is not None
    assert not position[0].any()
    assert position[1].any()
    assert not segment.any()
    assert not word[0].any()


def test_start() -> None:
    torch.manual_seed(0)
    family = lxmert.build(replace(lxmert.tiny(), hidden=128, intermediate=256, feats=200))
    state = family.state_dict()
    for name in ("region_embeddings.feature", "cross_stack.blocks.1.cross_attention.key", "text_embeddings.position"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.1), name
    assert state["text_embeddings.position.weight"][0].any()
    assert not state["region_embeddings.box.bias"].any()
    assert not state["cross_stack.blocks.0.cross_attention.output.bias"].any()


def test_the_scale_of_the_start() -> None:
    made = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        made.append(lxmert.build(replace(lxmert.tiny(), init_scale=scale)).state_dict())
    scaled = {name for name, tensor in made[0].items() if not torch.equal(tensor, made[1][name])}
    assert scaled == {name for name, tensor in made[0].items() if tensor.ndim == 2 and "embeddings" not in name}
    assert all(torch.equal(4 * made[0][name], made[1][name]) for name in scaled)


def test_dropout_everywhere_the_authors_have_it() -> None:
    family = miniature()
    numbers = [module.p for module in family.modules() if isinstance(module, nn.Dropout)]
    blocks = len(family.text_stack.blocks) + len(family.visual_stack.blocks) + 3 * len(family.cross_stack.blocks)
    assert numbers == [0.1] * (2 + blocks)
    embeddings, block = family.region_embeddings.train(), family.cross_stack.blocks["0"].train()
    embeddings.dropout.p = block.dropout.p = 1.0  # type: ignore[union-attr,assignment]
    assert not embeddings(torch.rand(2, 3, 10), torch.rand(2, 3, 4)).any()
    met: list[Tensor] = []
    block.cross_norm.register_forward_pre_hook(lambda _module, given: met.append(given[0]))  # type: ignore[operator,union-attr]
    hidden = torch.rand(2, 5, 16)
    block(hidden, torch.ones(2, 1, 1, 2, dtype=torch.bool))
    assert torch.equal(met[0], hidden)  # nothing of the other stream came through


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
        lxmert.build(replace(lxmert.tiny(), **wrong))


def test_no_causal_reading() -> None:
    family = miniature()
    with pytest.raises(ConfigError, match="causal"):
        family.fuse(*streams(family, batch()), causal=True)


def model_of(config: lxmert.Config | None = None) -> PretrainModel:
    torch.manual_seed(1)
    family = lxmert.build(config or lxmert.tiny())
    views: dict[str, Any] = {"text": "masked", "visual": "masked"}
    return PretrainModel(
        family,
        {
            "mlm": mlm.build(mlm.Config(soften=0.0, **views), family),
            "itm": itm.build(itm.Config(negatives="loader", **views), family),
            "masked_object": masked_object.build(masked_object.Config(attribute_classes=9), family),
            "answer": answer.build(answer.Config(answers=5), family),
        },
    )


def undropped_model() -> PretrainModel:
    return model_of(replace(lxmert.tiny(), dropout=0.0))


def test_a_published_step_adds_all_losses_with_weight_one() -> None:
    model = undropped_model()
    losses = model(batch(), Moment(1)).losses
    want = torch.stack([loss.value for loss in losses.values()]).sum()
    torch.testing.assert_close(model.total(losses, {}), want)


@pytest.mark.parametrize(("world", "number"), [(2, 1), (2, 2)])
def test_ranks_and_micro_batches_change_nothing(world: int, number: int) -> None:
    check_whole(undropped_model, batch(size=8), world, number)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(mode: str) -> None:
    found = []
    for each in ("none", mode):
        model = undropped_model()
        set_activation_checkpointing(model, each)
        torch.autograd.backward(model.total(model(batch(), Moment(1)).losses, {}))
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0])


def head_weights() -> State:
    """Of the four heads, in the authors' names."""
    torch.manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"cls.predictions.bias": (64,)}
    for name, inner, out in (
        ("cls.predictions.transform.dense", 16, 16),
        ("cls.seq_relationship", 16, 2),
        ("obj_predict_head.transform.dense", 16, 16),
        ("obj_predict_head.decoder_dict.obj", 16, 7),
        ("obj_predict_head.decoder_dict.attr", 16, 9),
        ("obj_predict_head.decoder_dict.feat", 16, 10),
        ("answer_head.logit_fc.0", 16, 32),
        ("answer_head.logit_fc.3", 32, 5),
    ):
        shapes |= {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}
    for name, width in (
        ("cls.predictions.transform.LayerNorm", 16),
        ("obj_predict_head.transform.LayerNorm", 16),
        ("answer_head.logit_fc.2", 32),
    ):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("prefix", "network"), [("", "bert."), ("module.", "bert."), ("", "lxmert.")])
def test_published_weights_fill_everything(prefix: str, network: str) -> None:
    source = miniature()
    tensors = {**published(source), **head_weights()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    theirs = {
        prefix + (network + name.removeprefix("bert.") if name.startswith("bert.") else name): value
        for name, value in tensors.items()
    }
    model = model_of()
    done = weights.fill(model, theirs, lxmert.PUBLISHED)
    assert done.left == ()
    assert done.unused == (f"{prefix}cls.predictions.decoder.weight",)
    torch.testing.assert_close(model.family.state_dict(), source.state_dict())
    head: Any = model.objectives["masked_object"].head
    assert torch.equal(head.decoders["attributes"].weight, tensors["obj_predict_head.decoder_dict.attr.weight"])
    del theirs[f"{prefix}{network}encoder.x_layers.1.visn_output.dense.bias"]
    with pytest.raises(CheckpointError, match="does not fill"):
        weights.fill(model, theirs, lxmert.PUBLISHED)


def test_start_from_bert() -> None:
    """A BERT with one layer more than the language stack, in the names of 2018."""
    source = miniature()
    bert = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in {**published(source), **head_weights()}.items()
        if not any(part in name for part in ("r_layers", "x_layers", "visn_fc", "obj_predict", "answer_head"))
    }
    more = {name.replace("layer.1.", "layer.2."): value for name, value in bert.items() if "layer.1." in name}
    model = model_of()
    done = weights.fill(model, {**bert, **more}, lxmert.INIT_TEXT)
    assert set(done.unused) == {*more, "cls.seq_relationship.weight", "cls.seq_relationship.bias"}
    assert {name.split(".")[1] for name in done.left} == {
        *("region_embeddings", "visual_stack", "cross_stack"),
        *("itm", "masked_object", "answer"),
    }
    ours, theirs = model.family.state_dict(), source.state_dict()
    for name in ("text_embeddings.norm.weight", "text_stack.blocks.1.mlp_norm.bias", "pooler.dense.weight"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture
def stored() -> Folder:
    return Folder.open(reference_folder("lxmert"))


def test_agrees_with_the_authors(stored: Folder) -> None:
    report = judge(stored, "lxmert", reference.run(stored))
    assert report.ok
    names = {row.name for row in report.compared}
    assert {"total_loss", "visn_output", "optimizer:step_3/cls.predictions.bias"} <= names
    assert all(left["why"] == reference.NO_COPY.why for left in report.not_compared)


def test_what_was_stored_without_a_copy_is_found() -> None:
    value, other = torch.ones(2), torch.zeros(2)
    losses = {"step_1_loss": torch.tensor(3.0), "step_2_loss": torch.tensor(2.0)}
    assert reference.without_copy({**losses, "step_1/a": value, "step_2/a": value}) == [1]
    assert reference.without_copy({**losses, "step_1/a": other, "step_2/a": value}) == []
    still = {"step_1_loss": torch.tensor(3.0), "step_2_loss": torch.tensor(3.0)}
    assert reference.without_copy({**still, "step_1/a": value, "step_2/a": value}) == []
    assert reference.without_copy({}) == []
