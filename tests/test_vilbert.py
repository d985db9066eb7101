"""ViLBERT: its published size, the order of its layers, the whole picture's slot, and the authors' names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import batch_for
from tests.reference.__main__ import main
from tests.reference_folders import agreed, copied
from tests.shard_files import reference_folder
from vlscale import weights
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import vilbert
from vlscale.flops import step_flops
from vlscale.model import PretrainModel
from vlscale.nn.coattention import CoattentionBlock
from vlscale.objectives import itm, mlm, mrc_kl
from vlscale.recompute import set_activation_checkpointing
from vlscale.types import Batch, Fused, Moment, lengthened

TINY = replace(vilbert.tiny(), dropout=0.0)
MASKED: dict[str, Any] = {"text": "masked", "visual": "masked"}


def family_of(config: vilbert.Config = TINY) -> vilbert.Vilbert:
    torch.manual_seed(0)
    return vilbert.build(config)


def model_of(config: vilbert.Config = TINY) -> PretrainModel:
    family = family_of(config)
    return PretrainModel(
        family,
        {
            "mlm": mlm.build(mlm.Config(**MASKED, soften=0.0), family),
            "itm": itm.build(itm.Config(**MASKED, negatives="loader"), family),
            "mrc_kl": mrc_kl.build(mrc_kl.Config(**MASKED), family),
        },
    )


def batch_of(size: int = 4, padding: int = 0) -> Batch:
    return batch_for(TINY.inputs, TINY.vocab, size, padding)


def fused_of(family: vilbert.Vilbert, batch: Batch, view: str = "clean") -> Fused:
    return family.fuse(family.encode_text(batch.text[view]), family.encode_visual(batch.visual[view]))


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_size() -> None:
    with torch.device("meta"):
        family = vilbert.build(vilbert.Config())
    # bert-base-uncased counts 109,482,240 with its pooler, which ViLBERT does not take over.
    text = family.text_embeddings, family.text_stack, family.text_fusion_stack
    assert sum(map(numbers, text)) == 109_482_240 - (768 * 768 + 768)
    layer = 4 * (1024 * 1024 + 1024) + 2 * (1024 * 1024 + 1024) + 4 * 1024
    assert numbers(family.visual_stack) == 0
    assert numbers(family.visual_fusion_stack) == 6 * layer
    # Queries, keys and values of either stream, the two outputs, and both feed-forward parts.
    text_half = 768 * 1024 + 1024 + 2 * (1024 * 1024 + 1024) + 1024 * 768 + 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    visual_half = 2 * (1024 * 1024 + 1024) + 2 * (768 * 1024 + 1024) + 2 * (1024 * 1024 + 1024) + 4 * 1024
    assert numbers(family.text_coattention_stack) == 6 * text_half
    assert numbers(family.visual_coattention_stack) == 6 * visual_half
    assert numbers(family.region_embeddings) == 2048 * 1024 + 1024 + 5 * 1024 + 1024 + 2 * 1024
    assert numbers(family.text_pooler) + numbers(family.visual_pooler) == (768 + 1024) * 1024 + 2 * 1024


def test_the_scale_of_the_start() -> None:
    made = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        made.append(vilbert.build(replace(vilbert.tiny(), init_scale=scale)).state_dict())
    scaled = {name for name, tensor in made[0].items() if not torch.equal(tensor, made[1][name])}
    matrices = {name for name, tensor in made[0].items() if tensor.ndim == 2 and "embeddings" not in name}
    assert scaled == matrices
    assert all(torch.equal(4 * made[0][name], made[1][name]) for name in scaled)


def test_streams() -> None:
    family, batch = family_of(), batch_of()
    text, visual = family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["clean"])
    fused = fused_of(family, batch)
    assert visual.mask is not None
    assert fused.visual is not None
    assert fused.pooled is not None
    length = batch.text["clean"].ids.shape[1]
    assert text.hidden.shape == (4, length, 16)
    assert visual.hidden.shape == (4, 1 + 6, 24)
    assert torch.equal(visual.mask[:, 1:], batch.visual["clean"].mask)
    assert visual.mask[:, 0].all()
    assert fused.visual.shape == (4, 6, 24)
    assert fused.pooled.shape == (4, family.dims.pooled) == (4, 12)


def test_the_whole_pictures_slot_by_hand() -> None:
    visual = batch_of().visual["masked"]
    assert visual.mask is not None
    garbage = visual.feats + 100.0 * ~visual.mask[..., None]
    feats, boxes, mask = vilbert.whole_picture_first(visual._replace(feats=garbage))
    for sample, row in enumerate(visual.mask):
        torch.testing.assert_close(feats[sample, 0], visual.feats[sample, row].mean(dim=0))
    assert boxes[:, 0].tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]] * 4
    assert torch.equal(feats[:, 1:], garbage)
    assert torch.equal(boxes[:, 1:], visual.boxes)
    assert mask is not None
    full, _, none = vilbert.whole_picture_first(visual._replace(mask=None))
    assert none is None
    torch.testing.assert_close(full[:, 0], visual.feats.mean(dim=1))


def test_layers_run_in_the_authors_order() -> None:
    config = replace(TINY, text_layers=5, visual_layers=4, text_coattention=(2, 3, 3), visual_coattention=(1, 1, 3))
    family, order = family_of(config), []
    for name, module in family.named_modules():
        stack, blocks, number = name.partition(".blocks.")
        if blocks and "." not in number:
            short = stack.replace("_fusion_stack", "").replace("_stack", "")
            module.register_forward_hook(lambda *_, at=f"{short} {number}": order.append(at))
    batch = batch_of()
    text = family.encode_text(batch.text["clean"])
    assert order == ["text 0", "text 1"]
    visual = family.encode_visual(batch.visual["clean"])
    assert order[2:] == ["visual 0"]
    family.fuse(text, visual)
    meet = [[f"text_coattention {number}", f"visual_coattention {number}"] for number in range(3)]
    assert order[3:] == [*meet[0], "text 2", *meet[1], "visual 1", "visual 2", *meet[2], "text 3", "text 4", "visual 3"]


def test_both_halves_read_the_states_before_the_exchange() -> None:
    config = replace(TINY, text_layers=1, visual_layers=0, text_coattention=(1,), visual_coattention=(0,))
    family, batch = family_of(config), batch_of()
    text, visual = family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["clean"])
    fused = family.fuse(text, visual)
    assert text.mask is not None
    assert visual.mask is not None
    words = family.text_coattention_stack.blocks["0"](text.hidden, visual.hidden, visual.mask[:, None, None])
    regions = family.visual_coattention_stack.blocks["0"](visual.hidden, text.hidden, text.mask[:, None, None])
    torch.testing.assert_close(fused.text, words)
    torch.testing.assert_close(fused.visual, regions[:, 1:])
    said = torch.relu(family.text_pooler.dense(words[:, 0]))
    seen = torch.relu(family.visual_pooler.dense(regions[:, 0]))
    torch.testing.assert_close(fused.pooled, said * seen)
    family.config = replace(config, fusion="sum")
    torch.testing.assert_close(family.fuse(text, visual).pooled, said + seen)


def test_half_of_a_coattention_layer_by_hand() -> None:
    torch.manual_seed(0)
    half = CoattentionBlock(width=6, context_width=4, inner=8, heads=2, mlp=5, eps=1e-12, dropout=0.0)
    hidden, context = torch.randn(3, 6), torch.randn(5, 4)
    seen = torch.tensor([True, True, False, True, False])
    a = half.attention
    query, key, value = a.query(hidden), a.key(context), a.value(context)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = query[:, part] @ key[:, part].T / 4**0.5
        weights_ = scores.masked_fill(~seen, float("-inf")).softmax(dim=1)
        heads.append(weights_ @ value[:, part])
    met = half.attention_norm(hidden + a.output(torch.cat(heads, dim=1)))
    want = half.mlp_norm(met + half.mlp.fc2(torch.nn.functional.gelu(half.mlp.fc1(met))))
    torch.testing.assert_close(half(hidden[None], context[None], seen[None, None, None])[0], want)


def test_padding_changes_nothing() -> None:
    family, plain, padded = family_of(), batch_of(), batch_of(padding=3)
    visual = padded.visual["clean"]
    wide = type(visual)(*(None if each is None else lengthened(each, 9) for each in visual))
    assert wide.mask is not None
    wide = wide._replace(feats=wide.feats + 50.0 * ~wide.mask[..., None])
    before, after = fused_of(family, plain), fused_of(family, replace(padded, visual={"clean": wide}))
    assert before.text is not None
    assert before.visual is not None
    words, regions = plain.text["clean"].mask, plain.visual["clean"].mask
    assert after.text is not None
    assert after.visual is not None
    torch.testing.assert_close(before.text[words], after.text[:, : words.shape[1]][words])
    torch.testing.assert_close(before.visual[regions], after.visual[:, :6][regions])
    torch.testing.assert_close(before.pooled, after.pooled)


def test_there_is_no_causal_reading() -> None:
    family, batch = family_of(), batch_of()
    text, visual = family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["clean"])
    with pytest.raises(ConfigError, match="no causal reading"):
        family.fuse(text, visual, causal=True)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"hidden": 15}, "family.hidden 15 is not a multiple"),
        ({"visual_width": 25}, "family.visual_width 25 is not"),
        ({"coattention_heads": 5}, "family.coattention_width 12 is not"),
        ({"text_length": 99}, "exceeds family.max_positions"),
        ({"text_coattention": (1,)}, "one of each per co-attention layer"),
        ({"text_coattention": (), "visual_coattention": ()}, "at least one"),
        ({"text_coattention": (2, 1)}, "should rise"),
        ({"visual_coattention": (0, 3)}, "family.visual_layers 2"),
        ({"fusion": "mul"}, "write product or sum"),
    ],
)
def test_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        family_of(replace(TINY, **wrong))


def test_bf16() -> None:
    model, batch = model_of().to(torch.bfloat16), batch_of()
    made = model(batch, Moment(1)).losses
    assert {loss.value.dtype for loss in made.values()} == {torch.float32}
    assert model.family.encode_visual(batch.visual["clean"]).hidden.dtype == torch.bfloat16


def test_flops_equal_torchs_counter() -> None:
    model, batch = model_of(), batch_of()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(1))
    assert step_flops(model, batch).forward == pytest.approx(counter.get_total_flops(), rel=0.01)
    deep = replace(TINY, text_layers=4, visual_layers=4, text_coattention=(2, 3), visual_coattention=(1, 2))
    family = family_of(deep)
    text, visual = batch.text["clean"], batch.visual["clean"]
    words, regions = family.encode_text(text), family.encode_visual(visual)
    found = {}
    with sdpa_kernel(SDPBackend.MATH):
        for verb, run in {
            "encode_text": lambda: family.encode_text(text),
            "encode_visual": lambda: family.encode_visual(visual),
            "fuse": lambda: family.fuse(words, regions),
        }.items():
            with FlopCounterMode(display=False) as counter:
                run()
            found[verb] = counter.get_total_flops() // len(batch)
    assert family.flops(text.ids.shape[1]) == found


@pytest.mark.parametrize("mode", ["full", "selective", "offload"])
def test_recomputation_changes_no_gradient(mode: str) -> None:
    def gradients(mode: str) -> dict[str, Tensor]:
        model = model_of(replace(TINY, dropout=0.1))
        set_activation_checkpointing(model, mode)
        torch.manual_seed(3)
        model.total(model(batch_of(), Moment(1)).losses, {}).backward()  # type: ignore[no-untyped-call]
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    torch.testing.assert_close(gradients(mode), gradients("none"))


def test_a_dropped_layer_is_the_identity() -> None:
    family, batch = family_of(), batch_of()
    stack = family.text_fusion_stack
    stack.kept = (False,) * len(stack.blocks)
    hidden = torch.randn(2, 3, 16)
    assert torch.equal(stack.section(1, 3, hidden, None), hidden)
    stack.kept = (True, False)
    torch.testing.assert_close(stack.section(1, 3, hidden, None), stack.blocks["1"](hidden, None))
    assert fused_of(family, batch).text is not None


def test_the_matching_head_arrives_turned_round() -> None:
    model = model_of()
    theirs = {"cls.bi_seq_relationship.weight": torch.randn(2, 12), "cls.bi_seq_relationship.bias": torch.randn(2)}
    weights.fill(model, theirs, vilbert.PUBLISHED._replace(fills="none"))
    state = model.state_dict()
    for part in ("weight", "bias"):
        assert torch.equal(state[f"objectives.itm.head.{part}"][1], theirs[f"cls.bi_seq_relationship.{part}"][0])


def test_unused_and_unknown_names() -> None:
    model = model_of()
    unused = {"bert.encoder.c_layer.0.biOutput.q_dense1.weight": torch.ones(24, 12)}
    assert weights.fill(model, unused, vilbert.PUBLISHED._replace(fills="none")).unused == tuple(unused)
    for name in ("bert.embeddings.task_embeddings.weight", "vil_logit.weight", "bert.pooler.dense.weight"):
        with pytest.raises(CheckpointError, match="unknown to this family"):
            weights.fill(model, {name: torch.ones(1)}, vilbert.PUBLISHED)
    with pytest.raises(CheckpointError, match="does not fill"):
        weights.fill(model, unused, vilbert.PUBLISHED)


def test_the_text_stream_starts_from_bert(tmp_path: Path) -> None:
    model = model_of()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    bert = {}
    for name, value in start.items():
        part = name.removeprefix("family.").replace("text_stack", "text").replace("text_fusion_stack", "text")
        for ours, theirs in BERT_NAMES.items():
            part = part.replace(ours, theirs)
        if part.startswith(("bert.", "cls.")):
            bert[part] = torch.randn_like(value)
    bert |= {"bert.pooler.dense.weight": torch.ones(16, 16), "cls.seq_relationship.bias": torch.ones(2)}
    save_file(bert, tmp_path / "model.safetensors")
    done = weights.init_towers(model, tmp_path, None)["text"]
    assert set(done.unused) == {"bert.pooler.dense.weight", "cls.seq_relationship.bias"}
    state = model.state_dict()
    assert torch.equal(
        state["family.text_stack.blocks.0.mlp.fc1.weight"], bert["bert.encoder.layer.0.intermediate.dense.weight"]
    )
    last = bert["bert.encoder.layer.2.attention.output.LayerNorm.gamma"]
    assert torch.equal(state["family.text_fusion_stack.blocks.2.attention_norm.weight"], last)
    for name, value in start.items():
        new = name.startswith(("family.text_embeddings", "family.text_stack", "family.text_fusion", "objectives.mlm"))
        assert torch.equal(state[name], value) != new, name


BERT_NAMES = {
    "text_embeddings.word": "bert.embeddings.word_embeddings",
    "text_embeddings.position": "bert.embeddings.position_embeddings",
    "text_embeddings.segment": "bert.embeddings.token_type_embeddings",
    "text_embeddings.norm": "bert.embeddings.LayerNorm",
    "text.blocks.": "bert.encoder.layer.",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_norm": "output.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output.weight": "attention.output.dense.weight",
    "attention.output.bias": "attention.output.dense.bias",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
    "objectives.mlm.head.dense": "cls.predictions.transform.dense",
    "objectives.mlm.head.norm.weight": "cls.predictions.transform.LayerNorm.gamma",
    "objectives.mlm.head.norm.bias": "cls.predictions.transform.LayerNorm.beta",
    "objectives.mlm.head.bias": "cls.predictions.bias",
}


@pytest.fixture
def stored() -> Path:
    return reference_folder("vilbert")


def test_agrees_with_the_authors(stored: Path, tmp_path: Path) -> None:
    assert agreed(stored, tmp_path)["not_compared"] == []


def test_another_weight_is_noticed(stored: Path, tmp_path: Path) -> None:
    folder = copied(stored, tmp_path)
    tensors = load_file(folder / "weights.safetensors")
    tensors["bert.encoder.c_layer.1.biattention.value2.bias"] += 0.01
    save_file(tensors, folder / "weights.safetensors")
    assert main([str(folder)]) == 1
