"""VideoBERT: the sequence, the frozen table, one modality alone, its losses, and what a run makes of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.spawn import run_ranks
from tests.models import batch_for
from tests.reference.__main__ import main
from tests.reference_folders import agreed, spoilt
from tests.shard_files import reference_folder
from tests.test_recipes import shrunk
from vlscale import vocabulary
from vlscale.data.frames import Frames, MaskWords, SkipFrames
from vlscale.data.text import build_vocabulary, wordpiece
from vlscale.data.views import parse
from vlscale.data.visual_words import Codebook, write_codebook
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import videobert
from vlscale.flops import step_flops
from vlscale.model import Encodings, PretrainModel, Task
from vlscale.objectives import itm, mlm, mvw
from vlscale.types import HIDDEN, IGNORE, Batch, Inputs, Marks, Moment, Text, Visual
from vlscale.weights import init_towers

TINY = replace(videobert.tiny(), dropout=0.0, init_scale=8.0)
TASKS = {
    "text": Task(("mlm",), modality="text"),
    "video": Task(("mvw",), modality="visual"),
    "joint": Task(("itm", "mlm", "mvw")),
}


def family_of(config: videobert.Config = TINY) -> videobert.VideoBert:
    torch.manual_seed(0)
    return videobert.build(config)


def model_of(config: videobert.Config = TINY, **options: Any) -> PretrainModel:
    family = family_of(config)
    objectives = {
        "mlm": mlm.build(mlm.Config(visual="masked", soften=0.0, **options), family),
        "mvw": mvw.build(mvw.Config(text="masked", **options), family),
        "itm": itm.build(itm.Config(negatives="loader", text="masked", visual="masked"), family),
    }
    return PretrainModel(family, objectives, TASKS)


def batch_of(task: str = "joint", padding: int = 0) -> Batch:
    """What the loader gives a task: the views of its modality."""
    whole = batch_for(TINY.inputs, TINY.vocab, padding=padding)
    visual = whole.visual["masked"]
    assert visual.code_labels is not None
    assert visual.codes is not None
    visual = visual._replace(codes=visual.codes.masked_fill(visual.code_labels != IGNORE, HIDDEN))
    texts = {} if task == "video" else {"masked": whole.text["masked"]}
    return replace(whole, task=task, text=texts, visual={} if task == "text" else {"masked": visual})


def one(words: list[int], codes: list[int], padding: int = 0) -> tuple[Text, Visual]:
    """One sample, of whose texts and clips some places are empty."""
    ids, seen = (torch.tensor([each + [0] * padding]) for each in (words, codes))
    masks = [torch.arange(each.shape[1])[None] < each.shape[1] - padding for each in (ids, seen)]
    return Text(ids, masks[0]), Visual(torch.zeros(*seen.shape, 0), masks[1], codes=seen)


def test_published_size() -> None:
    with torch.device("meta"):
        family = videobert.build(videobert.Config())
    table = (30522 + 20736) * 1024
    bert_large = 335_141_888  # bert-large-uncased
    head = 1024 * 1024 + 1024 + 2 * 1024 + 30522 + 20736
    total = sum(each.numel() for each in family.parameters())
    assert total == bert_large + 20736 * 1024 + head
    assert sum(each.numel() for each in family.parameters() if each.requires_grad) == total - table


def test_words_and_visual_words_stand_without_a_gap() -> None:
    """[CLS] two words [>] three visual words, of which one is hidden, [SEP]; segments and places by hand."""
    family = family_of()
    text, visual = one([2, 10, 11], [4, HIDDEN, 6], padding=2)
    sequence = family.sequence(family.encode_text(text), family.encode_visual(visual))
    ids = [2, 10, 11, 0, 0, 63, 64 + 4, 4, 64 + 6, 0, 0, 3]
    assert torch.equal(sequence.rows[0], family.tokens.weight[ids])
    assert sequence.mask[0].tolist() == [each != 0 for each in ids]
    assert sequence.segments[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1]
    assert sequence.places[0].tolist() == [0, 1, 2, 8, 9, 3, 4, 5, 6, 10, 11, 7]
    part = family.embeddings
    rows = sequence.rows + part.position.weight[sequence.places] + part.segment.weight[sequence.segments]
    torch.testing.assert_close(family.embed(sequence), F.layer_norm(rows, (16,), eps=1e-12))


def test_one_modality_alone() -> None:
    family = family_of()
    text, visual = one([2, 10, 11], [4, 5])
    words = family.sequence(family.encode_text(text), None)
    assert torch.equal(words.rows[0], family.tokens.weight[[2, 10, 11, 3]])
    assert words.segments.sum() == 0
    video = family.sequence(None, family.encode_visual(visual))
    assert torch.equal(video.rows[0], family.tokens.weight[[2, 68, 69, 3]])
    assert video.segments.tolist() == [[1, 1, 1, 1]]
    fused = family.fuse(None, family.encode_visual(visual))
    assert fused.text is None
    hidden = family.stack(family.embed(video))
    torch.testing.assert_close(fused.visual, hidden[:, 1:3])
    torch.testing.assert_close(fused.pooled, torch.tanh(family.pooler.dense(hidden[:, 0])))


def test_padding_is_not_seen() -> None:
    family = family_of()
    states = []
    for padding in (0, 3):
        text, visual = one([2, 10, 11], [4, 5], padding)
        fused = family.fuse(family.encode_text(text), family.encode_visual(visual))
        assert fused.text is not None
        assert fused.visual is not None
        assert fused.pooled is not None
        states.append(torch.cat([fused.text[:, :3], fused.visual[:, :2], fused.pooled[:, None]], dim=1))
    torch.testing.assert_close(states[0], states[1])


def test_the_table_is_frozen_and_all_else_learns() -> None:
    model = model_of()
    for task in TASKS:
        losses = model(batch_of(task), Moment(1)).losses
        model.total(losses, {}).backward()  # type: ignore[no-untyped-call]
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert frozen == {"family.tokens.weight"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name not in frozen), name
        assert parameter.grad is None or parameter.grad.any(), name


def test_the_losses_by_hand() -> None:
    """Both share the family's head; `own` keeps a modality's part of the logits."""
    model, batch = model_of(scope="rank"), batch_of()
    family, text, visual = model.family, batch.text["masked"], batch.visual["masked"]
    assert text.labels is not None
    assert visual.code_labels is not None
    fused = Encodings(family, batch, Moment(1), {}).fused("masked", "masked")
    assert fused.text is not None
    assert fused.visual is not None
    head: Any = family.token_head

    def logits(states: Tensor) -> Tensor:
        hidden = F.layer_norm(F.gelu(head.dense(states)), (16,), head.norm.weight, head.norm.bias, 1e-12)
        return hidden @ family.word_embedding.weight.T + head.bias

    words, seen = logits(fused.text[text.labels != IGNORE]), logits(fused.visual[visual.code_labels != IGNORE])
    right, codes = text.labels[text.labels != IGNORE], visual.code_labels[visual.code_labels != IGNORE]
    losses = model(batch, Moment(1)).losses
    torch.testing.assert_close(losses["mlm"].value, F.cross_entropy(words, right))
    torch.testing.assert_close(losses["mvw"].value, F.cross_entropy(seen, codes + 64))
    own = model_of(scope="rank", vocabulary="own")(batch, Moment(1)).losses
    torch.testing.assert_close(own["mlm"].value, F.cross_entropy(words[:, :64], right))
    torch.testing.assert_close(own["mvw"].value, F.cross_entropy(seen[:, 64:], codes))
    assert torch.equal(model.counts(batch).get("mvw", torch.tensor(0)), torch.tensor(0))  # `scope: rank`
    assert int(model_of().counts(batch)["mvw"]) == len(codes)


def test_soft_labels_come_from_the_twins_head() -> None:
    family, batch = family_of(), batch_of()
    asked = mlm.build(mlm.Config(visual="masked", soften=0.5), family)
    model = PretrainModel(family, {"mlm": asked}, {"joint": Task(("mlm",))})
    made = model(batch, Moment(1)).losses["mlm"]
    torch.testing.assert_close(made.value, 0.5 * made.metrics["mlm/hard"] + 0.5 * made.metrics["mlm/soft"])
    twin: Any = model.twin
    twin.token_head.bias += 1 * torch.arange(73.0)
    assert not torch.equal(model(batch, Moment(1)).losses["mlm"].metrics["mlm/soft"], made.metrics["mlm/soft"])


def test_a_task_of_one_modality_loads_and_reads_that_alone() -> None:
    model = model_of()
    assert model.views("text") == {"text.masked"}
    assert model.views("video") == {"visual.masked"}
    assert model.views("joint") == {"text.masked", "visual.masked", "pairs.mismatch"}
    assert model.views() == model.views("joint")
    alone, joint = model(batch_of("text"), Moment(1)).losses["mlm"], model(batch_of(), Moment(1)).losses["mlm"]
    assert not torch.isclose(alone.value, joint.value)
    whole = replace(batch_of(), task="text", visual={})
    torch.testing.assert_close(model(whole, Moment(1)).losses["mlm"].value, alone.value)


def test_a_task_whose_objective_needs_both_is_refused() -> None:
    family = family_of()
    asked = {"mvw": mvw.build(mvw.Config(), family), "mlm": mlm.build(mlm.Config(soften=0.0), family)}
    with pytest.raises(ConfigError, match=r"tasks\.odd reads the modality text alone, but objectives\.mvw"):
        PretrainModel(family, asked, {"odd": Task(("mvw",), modality="text")})
    from vlscale.families import uniter

    other = uniter.build(uniter.tiny())
    words = {"mlm": mlm.build(mlm.Config(soften=0.0), other)}
    with pytest.raises(ConfigError, match=r"tasks\.odd\.modality is text, but family 'Uniter'"):
        PretrainModel(other, words, {"odd": Task(("mlm",), modality="text")})


@pytest.mark.parametrize("task", list(TASKS))
def test_flops_equal_torchs_counter(task: str) -> None:
    model, batch = model_of(), batch_of(task)
    full = torch.ones(4, TINY.text_length, dtype=torch.bool)
    if batch.text:  # as long as the family reads
        labels = torch.full((4, TINY.text_length), IGNORE)
        labels[:, 1] = 7
        batch = replace(batch, text={"masked": Text(full.long() * 5, full, labels)})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(1))
    assert counter.get_total_flops() == step_flops(model, batch).forward


@pytest.mark.parametrize("width", [16, 12, 24])
def test_a_codebook_fills_the_visual_words(tmp_path: Path, width: int) -> None:
    """Of another width by a map that keeps distances, exactly where there is room."""
    rng = np.random.default_rng(0)
    levels = (rng.normal(size=(1, 3, width)).astype(np.float32), rng.normal(size=(3, 3, width)).astype(np.float32))
    codebook = Codebook(levels, (np.ones((1, 3), np.int64), np.ones((3, 3), np.int64)))
    write_codebook(codebook, tmp_path / "words.safetensors")
    model = model_of(replace(TINY, fit_codebook="pca"))
    before = model.family.word_embedding.weight.clone()
    init_towers(model, None, None, tmp_path / "words.safetensors")
    rows, leaves = model.family.word_embedding.weight, torch.from_numpy(codebook.leaves)
    assert torch.equal(rows[:64], before[:64])
    if width == 16:
        assert torch.equal(rows[64:], leaves)
    else:
        torch.testing.assert_close(torch.cdist(rows[64:], rows[64:]), torch.cdist(leaves, leaves), rtol=1e-3, atol=1e-3)
        with pytest.raises(CheckpointError, match=r"write family\.fit_codebook=pca, or a family\.hidden"):
            init_towers(model_of(), None, None, tmp_path / "words.safetensors")
    with pytest.raises(CheckpointError, match=r"the codebook has 9 visual words; write family\.codes=9"):
        init_towers(model_of(replace(TINY, codes=10)), None, None, tmp_path / "words.safetensors")


def test_a_bert_fills_the_words_and_the_stack(tmp_path: Path) -> None:
    model = model_of()
    names = {"word_embeddings": 64, "position_embeddings": 24, "token_type_embeddings": 2}
    bert = {f"bert.embeddings.{name}.weight": torch.rand(rows, 16) for name, rows in names.items()}
    shapes = {f"attention.self.{name}": (16, 16) for name in ("query", "key", "value")}
    shapes |= {"attention.output.dense": (16, 16), "intermediate.dense": (32, 16), "output.dense": (16, 32)}
    for layer in ("bert.encoder.layer.0.", "bert.encoder.layer.1."):
        for name, shape in shapes.items():
            bert |= {f"{layer}{name}.weight": torch.rand(shape), f"{layer}{name}.bias": torch.rand(shape[0])}
        for name in ("attention.output", "output"):
            bert |= {f"{layer}{name}.LayerNorm.{part}": torch.rand(16) for part in ("weight", "bias")}
    for name in ("bert.pooler.dense", "cls.predictions.transform.dense"):
        bert |= {f"{name}.weight": torch.rand(16, 16), f"{name}.bias": torch.rand(16)}
    for name in ("bert.embeddings", "cls.predictions.transform"):
        bert |= {f"{name}.LayerNorm.gamma": torch.rand(16), f"{name}.LayerNorm.beta": torch.rand(16)}
    bert["cls.predictions.bias"] = torch.rand(64)
    save_file(bert, tmp_path / "bert.safetensors")
    family: Any = model.family
    visual = family.tokens.weight[64:].clone()
    done = init_towers(model, tmp_path / "bert.safetensors", None)["text"]
    assert {name for name in done.left if name.startswith("family.")} == set()
    assert torch.equal(family.tokens.weight, torch.cat([bert["bert.embeddings.word_embeddings.weight"], visual]))
    assert torch.equal(family.token_head.bias[:64], bert["cls.predictions.bias"])
    assert not family.token_head.bias[64:].any()
    with pytest.raises(CheckpointError, match=r"it knows 64 words; write family\.vocab=64"):
        init_towers(model_of(replace(TINY, vocab=80)), tmp_path / "bert.safetensors", None)


def test_marks_that_the_vocabulary_numbers_otherwise() -> None:
    tokens = build_vocabulary(["a red circle", "a blue square"], 40)
    tokenizer = vocabulary.make_tokenizer(wordpiece(tokens), TINY.inputs)
    vocabulary.check_marks(tokenizer, Marks(2, 3, 4, len(tokens)))
    with pytest.raises(ConfigError, match=r"family\.cls is 101, but the vocabulary has it at 2; write family\.cls=2"):
        vocabulary.check_marks(tokenizer, Marks(101, 3, 4, len(tokens)))
    with pytest.raises(ConfigError, match=rf"family\.video_start is 9, in the vocabulary .* such as {len(tokens)}"):
        vocabulary.check_marks(tokenizer, Marks(2, 3, 4, 9))


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"frames": 99}, {"video_start": 64}, {"mask": 0}])
def test_sizes_that_do_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        videobert.build(replace(videobert.tiny(), **wrong))


def test_masked_visual_words() -> None:
    """80 % hidden, 10 % at random, 10 % as they were, 15 % of all; what is not picked stays."""
    rng = np.random.default_rng(0)
    codes = rng.integers(50, size=20_000)
    made = MaskWords()(Frames(np.zeros((len(codes), 0), np.float32), codes=codes, vocabulary=50), rng)
    assert made.picked is not None
    assert made.codes is not None
    assert made.code_labels is not None
    assert made.picked.mean() == pytest.approx(0.15, abs=0.01)
    assert np.array_equal(made.code_labels, np.where(made.picked, codes, IGNORE))
    assert np.array_equal(made.codes[~made.picked], codes[~made.picked])
    fate = made.codes[made.picked]
    assert (fate == HIDDEN).mean() == pytest.approx(0.8, abs=0.02)
    assert (fate == codes[made.picked]).mean() == pytest.approx(0.1 + 0.1 / 50, abs=0.02)
    assert 0 <= fate[fate != HIDDEN].min() <= fate.max() < 50
    few = [MaskWords(prob=0.01)(Frames(np.zeros((3, 0)), codes=codes[:3], vocabulary=50), rng) for _ in range(20)]
    assert all(each.picked is not None and each.picked.any() for each in few)


def test_what_a_family_does_not_read_cannot_be_hidden() -> None:
    frames = Inputs(0, 12, False, feats=4, frames=6)
    for inputs, wrong, right in ((TINY.inputs, "mask_frames", "mask_words"), (frames, "mask_words", "mask_frames")):
        with pytest.raises(ConfigError, match=rf"visual\.masked\.{wrong} hides .* write {right}"):
            parse({"visual.masked": {wrong: {}}}, inputs)
        parse({"visual.masked": {right: {}}}, inputs)


def test_skipped_frames() -> None:
    frames = Frames(np.zeros((11, 0), np.float32), codes=np.arange(11), vocabulary=50)
    made = [SkipFrames(3)(frames, np.random.default_rng(seed)) for seed in range(20)]
    found = {tuple(each.codes.tolist()) for each in made if each.codes is not None}
    assert all(each.codes is not None and each.length == len(each.codes) for each in made)
    assert found == {tuple(range(0, 11, step)) for step in (1, 2, 3)}


@pytest.fixture
def stored() -> Path:
    return reference_folder("videobert")


def test_agrees_with_the_reference(stored: Path, tmp_path: Path) -> None:
    agreed(stored, tmp_path)


@pytest.mark.parametrize("name", ["loss/joint_mfm_visual_vocab_only", "joint/mlm_logits", "grad/mlm_bias"])
def test_a_changed_tensor_fails(stored: Path, tmp_path: Path, name: str) -> None:
    assert main([str(spoilt(stored, tmp_path, name))]) == 1


STAGES = ("zero0", "zero3")


def run_in_parts(out: str) -> None:
    """Four steps in one go, and two and two, at each stage."""
    from vlscale import train
    from vlscale.build import Request

    run = replace(shrunk("videobert_tiny"), steps=4)
    for stage, (name, steps) in product(STAGES, (("whole", (4,)), ("parts", (2, 4)))):
        for number in steps:
            part = replace(run, steps=number)
            assert train.train(Request(part, f"ds_configs/{stage}.json", Path(out) / stage / name)) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_ranks(run_in_parts, 2, str(out), timeout=280)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_frozen_table_is_saved_without_optimizer_state(stage: str, runs: Path) -> None:
    from vlscale.saving import checkpoint

    found = [
        checkpoint.weights(
            checkpoint.open_checkpoint(runs / stage / name / "checkpoints" / "step_00000004"), exact=True
        )
        for name in ("whole", "parts")
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    torch.manual_seed(shrunk("videobert_tiny").seed)
    start = videobert.build(shrunk("videobert_tiny").family)
    assert torch.equal(found[0]["family.tokens.weight"], start.tokens.weight.bfloat16())  # no master of its own
    assert found[0]["family.token_head.bias"].any()
    files = (runs / stage / "whole" / "checkpoints" / "step_00000004").glob("*.safetensors")
    kept = {name.partition("@")[0] for file in files for name in load_file(file)}
    assert {name for name in kept if name.endswith("/family.tokens.weight")} == {"master/family.tokens.weight"}
    assert "exp_avg/family.token_head.bias" in kept
