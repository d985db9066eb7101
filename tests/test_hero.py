"""HERO: sentences with their frames, then all frames; its queries, its weights from elsewhere, the authors' tensors."""

from __future__ import annotations

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
from vlscale import distributed
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import ConfigError
from vlscale.families import hero
from vlscale.flops import step_flops
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel, Task
from vlscale.objectives import fom, mfm, mlm, mrfr, vsm
from vlscale.optim import OptimConfig
from vlscale.recompute import set_activation_checkpointing
from vlscale.types import Batch, Fused, Moment, Text, Visual
from vlscale.weights import fill, publish

TINY = replace(hero.tiny(), dropout=0.0, init_scale=8.0)
ROWS = 3  # sentences of a sample in the miniature batch


def family_of(config: hero.Config = TINY) -> hero.Hero:
    torch.manual_seed(0)
    return hero.build(config).eval()


def batch_of(**options: Any) -> Batch:
    return batch_for(TINY.inputs, TINY.vocab, **options)


def model_of() -> PretrainModel:
    """The authors' four tasks, and MFFR."""
    family = family_of()
    objectives = {
        "mlm": mlm.build(mlm.Config(soften=0.0), family),
        "mfm": mfm.build(mfm.Config(candidates="hidden_and_predicted", scope="rank"), family),
        "mrfr": mrfr.build(mrfr.Config(error="norm"), family),
        "fom": fom.build(fom.Config(places=6), family),
        "vsm": vsm.build(vsm.Config(span_share=1.0), family),
    }
    return PretrainModel(family, objectives, {name: Task((name,)) for name in objectives})


def fused_of(family: hero.Hero, text: Text | None, visual: Visual | None) -> Fused:
    words = None if text is None else family.encode_text(text)
    return family.fuse(words, None if visual is None else family.encode_visual(visual))


def parts(fused: Fused) -> tuple[Tensor, Tensor]:
    assert fused.text is not None
    assert fused.visual is not None
    return fused.text, fused.visual


def test_published_size() -> None:
    with torch.device("meta"):
        family = hero.build(hero.Config())
    norm, layer = 2 * 768, 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 2 * 768
    words = (50272 + 514 + 2) * 768 + norm
    frames = 2 * (4352 + 2 * 4352 + 4352 * 768 + 768) + (100 + 514) * 768 + 2 * norm
    query = norm + 768 * 768 + 768 + 514 * 768 + norm + 4 * (768 * 768 + 768) + norm + 768
    pooler = 768 * 768 + 768
    assert sum(each.numel() for each in family.parameters()) == words + frames + 9 * layer + query + pooler


def test_a_sentence_by_hand() -> None:
    """One sentence of frames 1 and 2 of four: layers over [frames ; words], then the clip with what they became."""
    family = family_of()
    torch.manual_seed(1)
    feats, ids = torch.randn(1, 4, TINY.feats), torch.tensor([[5, 6, 7]])
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool), spans=torch.tensor([[1, 3]]))
    words, frames = parts(fused_of(family, text, Visual(feats, torch.ones(1, 4, dtype=torch.bool))))
    table, segment = family.text_embeddings, family.text_embeddings.segment.weight[1]
    read = F.layer_norm(table.word(ids) + table.position.weight[:3] + segment, (16,), eps=1e-5)

    def projected(part: Any) -> Tensor:
        out: Tensor = part.projection(F.layer_norm(feats, (TINY.feats,), eps=1e-5))
        return out

    seen = projected(family.frame_projection)[:, 1:3] + family.frame_places.position.weight[:2] + segment
    states = family.stack(torch.cat([F.layer_norm(seen, (16,), eps=1e-5), read], dim=1))
    torch.testing.assert_close(words, states[:, 2:])
    clip = projected(family.frame_transform).relu()
    clip[:, 1:3] += states[:, :2]
    placed = F.layer_norm(clip + family.clip_places.position.weight[:4], (16,), eps=1e-5)
    torch.testing.assert_close(frames, family.temporal_stack(placed))


def test_frames_of_two_sentences_have_the_sum_and_of_none_only_themselves() -> None:
    family = family_of()
    given: list[Tensor] = []
    family.clip_places.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    visual = Visual(torch.randn(1, 4, TINY.feats), torch.ones(1, 4, dtype=torch.bool))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    for spans in ([[0, 2], [0, 0]], [[0, 0], [1, 3]], [[0, 2], [1, 3]]):
        fused_of(family, Text(ids, mask, spans=torch.tensor(spans)), visual)
    fused_of(family, None, visual)
    first, second, both, alone = given
    torch.testing.assert_close(both, first + second - alone)
    torch.testing.assert_close(both[:, 3], alone[:, 3])
    assert not torch.allclose(both[:, 1], first[:, 1])


def test_a_sentence_sees_no_other_frame() -> None:
    family, batch = family_of(), batch_of(size=1)
    text, visual = batch.text["clean"], batch.visual["clean"]
    assert text.spans is not None
    assert text.spans.tolist() == [[0, 4], [3, 6], [6, 6]]
    words, frames = parts(fused_of(family, text, visual))
    feats = visual.feats.clone()
    feats[0, 0] = feats[0, 0].flip(0)  # only the first sentence's
    other_words, other_frames = parts(fused_of(family, text, visual._replace(feats=feats)))
    assert not torch.allclose(words[0], other_words[0])
    torch.testing.assert_close(words[1:], other_words[1:])
    assert not torch.allclose(frames[0, 5], other_frames[0, 5])  # frames meet


def test_empty_places_and_missing_sentences_change_nothing() -> None:
    family, batch, longer = family_of(), batch_of(), batch_of(padding=3)
    visual, text = batch.visual["clean"], longer.text["clean"]
    assert visual.mask is not None
    assert text.spans is not None
    wide = visual._replace(
        feats=F.pad(visual.feats.masked_fill(~visual.mask[..., None], 9.0), (0, 0, 0, 2), value=9.0),
        mask=F.pad(visual.mask, (0, 2)),
    )
    rows = {name: getattr(text, name).unflatten(0, (-1, ROWS)) for name in ("ids", "mask", "spans")}
    more = {name: torch.cat([each, torch.zeros_like(each[:, :1])], dim=1).flatten(0, 1) for name, each in rows.items()}
    words, frames = parts(fused_of(family, batch.text["clean"], visual))
    other_words, other_frames = parts(fused_of(family, Text(**more), wide))
    length = words.shape[1]
    other_words = other_words.view(-1, ROWS + 1, *other_words.shape[1:])[:, :ROWS].flatten(0, 1)[:, :length]
    real = batch.text["clean"].mask
    torch.testing.assert_close(other_words[real], words[real])
    torch.testing.assert_close(other_frames[:, :6][visual.mask], frames[visual.mask])


def test_hidden_frames_have_a_vector_in_both_places() -> None:
    family, batch = family_of(), batch_of()
    masked = batch.visual["masked"]
    assert masked.picked is not None
    stream = family.encode_visual(masked)
    assert stream.skip is not None
    for part, made in ((family.frame_projection, stream.hidden), (family.frame_transform, stream.skip)):
        vector = part.projection(F.layer_norm(part.mask.weight, (TINY.feats,), eps=1e-5))[0]
        vector = vector.relu() if made is stream.skip else vector
        torch.testing.assert_close(made[masked.picked], vector.expand(int(masked.picked.sum()), -1))


def test_frames_change_places_after_their_sentences() -> None:
    family, batch = family_of(), batch_of()
    given: list[Tensor] = []
    family.clip_places.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    text, shuffled = batch.text["clean"], batch.visual["shuffled"]
    words, _ = parts(fused_of(family, text, batch.visual["clean"]))
    moved, _ = parts(fused_of(family, text, shuffled))
    torch.testing.assert_close(moved, words)
    torch.testing.assert_close(given[1][:, [1, 0, *range(2, 6)]], given[0])
    wrong = shuffled._replace(order=torch.zeros_like(torch.as_tensor(shuffled.order)), mask=torch.zeros(4, 6) > 0)
    fused_of(family, text, wrong)  # padding goes nowhere
    assert not torch.allclose(given[2][:, 1], torch.zeros(16))


def test_a_query_is_a_mean_of_its_words() -> None:
    family, batch = family_of(), batch_of()
    text = batch.text["query"]
    found = fused_of(family, text._replace(spans=None), None)
    assert found.text is not None
    assert found.pooled is not None
    part, number = family.query_encoder, int(text.mask[0].sum())
    hidden = part.places(part.projection(part.norm(found.text[:1, :number])).relu())
    hidden = part.attention_norm(hidden + part.attention(hidden, hidden))
    shares = part.score(hidden).softmax(dim=1)
    torch.testing.assert_close(found.pooled[:1], (shares * hidden).sum(dim=1))
    longer = batch_of(padding=3).text["query"]
    torch.testing.assert_close(fused_of(family, longer, None).pooled, found.pooled)
    nothing = Text(text.ids, torch.zeros_like(text.mask))
    pooled = fused_of(family, nothing, None).pooled
    assert pooled is not None
    assert not pooled.any()


def test_flops_equal_torchs_counter() -> None:
    """As many sentences and frames as it may have, each frame in one sentence."""
    family = family_of()
    ids = torch.ones(2 * TINY.sentences, 8, dtype=torch.int64)
    each = TINY.frames // TINY.sentences
    first = torch.arange(TINY.sentences).repeat(2) * each
    text = family.encode_text(Text(ids, ids > 0, spans=torch.stack([first, first + each], dim=1)))
    clips = Visual(torch.rand(2, TINY.frames, TINY.feats), torch.ones(2, TINY.frames, dtype=torch.bool))
    count = family.flops(8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        visual = family.encode_visual(clips)
    assert counter.get_total_flops() == 2 * count["encode_visual"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.fuse(text, visual)
    assert counter.get_total_flops() == 2 * count["fuse"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.fuse(text, None)
    assert counter.get_total_flops() == len(ids) * count["fuse_text"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.fuse(None, visual)
    assert counter.get_total_flops() == 2 * count["fuse_visual"]


def test_a_steps_flops_are_those_of_its_sentences() -> None:
    model, batch = model_of(), replace(batch_of(), task="vsm")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(1))
    assert step_flops(model, batch).forward == pytest.approx(counter.get_total_flops(), rel=0.15)  # empty rows count


def test_bf16_takes_fp32_features() -> None:
    words, frames = parts(
        fused_of(family_of().to(torch.bfloat16), batch_of().text["clean"], batch_of().visual["masked"])
    )
    assert {words.dtype, frames.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temporal_heads": 3}, "temporal_heads"),
        ({"query_positions": 4}, "max_positions 4"),
        ({"segments": 1}, "segments"),
        ({"frames": 99}, "temporal_positions"),
    ],
)
def test_sizes_that_do_not_fit(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        hero.build(replace(TINY, **wrong))


def test_the_norm_of_an_error() -> None:
    """MFFR's loss is the mean over hidden frames of the error's length, not of its square."""
    model, batch = model_of(), replace(batch_of(), task="mrfr")
    loss = model(batch, Moment(1)).losses["mrfr"].value
    states, visual = parts(fused_of(model.family, batch.text["clean"], batch.visual["masked"])), batch.visual["masked"]  # type: ignore[arg-type]
    picked, targets = torch.as_tensor(visual.picked), torch.as_tensor(visual.targets)
    head: Any = model.objectives["mrfr"].head
    assert head.norm.eps == 1e-5
    errors = head(states[1][picked]) - targets[picked]
    torch.testing.assert_close(loss, errors.square().sum(dim=1).sqrt().mean())


def test_weights_go_out_and_come_back() -> None:
    model = model_of()
    published = publish(model.state_dict(), hero.PUBLISHED)
    assert {name.split(".")[1] for name in published.nameless} == {"mrfr"}  # its head is mfm's in the authors' code
    names = set(published.tensors)
    assert {"v_encoder.f_encoder.img_embeddings.mask_embedding.weight", "video_st_predictor.weight"} <= names
    assert published.tensors["v_encoder.mask_embedding.weight"].shape == (2, TINY.feats)
    torch.manual_seed(5)
    other = PretrainModel(hero.build(TINY), {"vsm": vsm.build(vsm.Config(), hero.build(TINY))})
    fill(other, published.tensors, hero.PUBLISHED)
    ours = model.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, ours[name]), name


def roberta(layers: int = 4, vocab: int = 61) -> dict[str, Tensor]:
    """A miniature under the names of roberta-base."""
    generator = torch.Generator().manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (n, 16) for name, n in (("word", vocab), ("position", 20))
    }
    shapes |= {"embeddings.token_type_embeddings.weight": (1, 16), "pooler.dense.weight": (16, 16)}
    shapes |= {"embeddings.LayerNorm.weight": (16,), "embeddings.LayerNorm.bias": (16,), "pooler.dense.bias": (16,)}
    for number in range(layers):
        layer = f"encoder.layer.{number}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{layer}{name}.weight": (16, 16), f"{layer}{name}.bias": (16,)}
        shapes |= {f"{layer}intermediate.dense.weight": (32, 16), f"{layer}intermediate.dense.bias": (32,)}
        shapes |= {f"{layer}output.dense.weight": (16, 32), f"{layer}output.dense.bias": (16,)}
        for name in ("attention.output", "output"):
            shapes |= {f"{layer}{name}.LayerNorm.{part}": (16,) for part in ("weight", "bias")}
    found = {f"roberta.{name}": torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    head: dict[str, tuple[int, ...]] = {
        "bias": (vocab,),
        "dense.weight": (16, 16),
        "dense.bias": (16,),
        "decoder.weight": (vocab, 16),
    }
    head |= {"layer_norm.weight": (16,), "layer_norm.bias": (16,)}
    return found | {f"lm_head.{name}": torch.rand(shape, generator=generator) for name, shape in head.items()}


def test_every_second_layer_of_roberta_is_the_start() -> None:
    model, source = model_of(), roberta()
    done = fill(model, source, hero.INIT_TEXT)
    assert not [name for name in done.left if name.startswith(("family.text_embeddings", "family.stack"))]
    assert not [name for name in done.left if name.startswith("objectives.mlm")]
    ours = model.state_dict()
    for number in range(2):
        theirs = source[f"roberta.encoder.layer.{2 * number + 1}.attention.self.key.weight"]
        assert torch.equal(ours[f"family.stack.blocks.{number}.attention.key.weight"], theirs)
    words = ours["family.text_embeddings.word.weight"]
    assert torch.equal(words[:61], source["roberta.embeddings.word_embeddings.weight"])
    assert not words[61:].any()
    assert torch.equal(ours["objectives.mlm.head.bias"][:61], source["lm_head.bias"])
    segments = ours["family.text_embeddings.segment.weight"]
    assert torch.equal(segments[0], segments[1])
    position = source["roberta.embeddings.position_embeddings.weight"]
    assert torch.equal(ours["family.text_embeddings.position.weight"], position[:16])


TASKS = ("vsm", "mlm", "fom", "mfm", "mrfr", "vsm")


def task_series(zero3: bool) -> dict[str, Any]:
    """Losses of some steps of one task each, and the weights after them."""
    optim = OptimConfig(weight_decay=0.1, clip=5.0)
    if zero3:
        engine: Any = DeepSpeedEngine(model_of(), configuration("zero3", 4, 4, optim.clip), optim, distributed.init())
    else:
        engine = LocalEngine(model_of(), optim, torch.device("cpu"))
    found = []
    for step, task in enumerate(TASKS, start=1):
        batch = replace(batch_of(seed=step), task=task).to(engine.device)
        loss = engine.model.total(engine.forward(batch, Moment(step)).losses, {})
        engine.backward(loss, last=True)
        found.append(float(loss.detach()))
        engine.step(1e-2)
    norms = {name: float(each.float().norm()) for name, each in whole_weights(engine).items()}
    return {"losses": found, "weights": {name: norm for name, norm in norms.items() if "key.bias" not in name}}


@pytest.mark.slow
def test_one_task_per_step_under_zero_3_equals_plain_pytorch() -> None:
    expected = task_series(zero3=False)
    (found,) = run_ranks(task_series, 1, True)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    for name, norm in expected["weights"].items():
        assert found["weights"][name] == pytest.approx(norm, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("task", ["mlm", "fom"])
def test_a_step_in_parts_equals_one_batch(task: str) -> None:
    check_whole(model_of, replace(batch_of(size=8), task=task), 1, 3, (1, 5, 2))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(mode: str) -> None:
    found = []
    for each in ("none", mode):
        model = model_of()
        set_activation_checkpointing(model, each)
        losses = [model(replace(batch_of(), task=task), Moment(1)).losses for task in ("mlm", "mfm", "fom", "vsm")]
        torch.autograd.backward(model.total({name: loss for part in losses for name, loss in part.items()}, {}))
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0])


@pytest.fixture
def stored() -> Path:
    return reference_folder("hero")


def test_agrees_with_the_authors(stored: Path, tmp_path: Path) -> None:
    found = agreed(stored, tmp_path)
    assert [row["name"].partition("[")[0] for row in found["not_compared"]] == ["vsm/frame_output_f_encoder"]


@pytest.mark.parametrize(
    "name",
    [
        "mfm-nce/grad/v_encoder.f_encoder.img_embeddings.mask_embedding.weight",
        "vsm_hard/loss_neg_q_weighted",
        "vsm/frame_output_f_encoder",
    ],
)
def test_a_changed_tensor_fails(stored: Path, tmp_path: Path, name: str) -> None:
    assert main([str(spoilt(stored, tmp_path, name))]) == 1
