"""UniVL: what the four modules see, its stages, its names, and the authors' tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests import whole_steps
from tests.distributed.spawn import run_ranks
from tests.models import batch_for
from tests.reference import univl as reference
from tests.reference.compare import Folder
from tests.reference_folders import agreed, copied
from tests.shard_files import reference_folder
from tests.test_recipes import shrunk
from tests.whole_steps import part
from vlscale.build import Request, build_model
from vlscale.data.scenes import embedded, moving
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import univl
from vlscale.model import PretrainModel
from vlscale.objectives import caption, mfm, mil_nce, mlm, pair_nce
from vlscale.options import InitConfig
from vlscale.train import train
from vlscale.types import Batch, Fused, Moment, Stream, Text, Visual
from vlscale.weights import fill, init_whole, read

TINY = replace(univl.tiny(), dropout=0.0)
JOINT = mil_nce.Config(anchors="middle", positives="once")


def miniature(**changes: Any) -> univl.Univl:
    """Gains and shifts are random too, so that every parameter matters."""
    torch.manual_seed(0)
    family = univl.build(replace(TINY, **changes))
    for parameter in family.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.3)
    return family


def model_of(family: univl.Univl) -> PretrainModel:
    """With all five objectives."""
    masked: dict[str, Any] = {"text": "masked", "visual": "masked"}
    return PretrainModel(
        family,
        {
            "mil_nce": mil_nce.build(JOINT, family),
            "mlm": mlm.build(mlm.Config(**masked, soften=0.0), family),
            "mfm": mfm.build(mfm.Config(**masked, head="tied"), family),
            "pair_nce": pair_nce.build(pair_nce.Config(**masked), family),
            "caption": caption.build(caption.Config(), family),
        },
    )


def batch_of(padding: int = 0) -> Batch:
    return batch_for(TINY.inputs, TINY.vocab, padding=padding)


def streams(family: univl.Univl, batch: Batch) -> tuple[Stream, Stream]:
    return family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["clean"])


def both(fused: Fused) -> tuple[Tensor, Tensor]:
    assert fused.text is not None
    assert fused.visual is not None
    return fused.text, fused.visual


def test_published_size() -> None:
    with torch.device("meta"):
        family = univl.build(univl.Config())
    layer = 12 * 768**2 + 13 * 768  # of BERT
    crossing = 4 * 768**2 + 6 * 768  # an attention and its LayerNorm
    text = (30522 + 512 + 2) * 768 + 2 * 768 + 12 * layer
    video = 2 * 1024 + 1024 * 768 + 768 + 512 * 768 + 2 * 768 + 6 * layer
    cross = (1024 + 2) * 768 + 2 * 768 + 2 * layer + 768**2 + 768
    decoder = 2 * 768 + 3 * (layer + crossing)  # its tables are the text encoder's
    assert sum(parameter.numel() for parameter in family.parameters()) == text + video + cross + decoder


def test_embeds_are_means_without_cls_and_padding() -> None:
    family, batch = miniature(), batch_of()
    text, visual = streams(family, batch)
    lengths, frames = batch.text["clean"].mask.sum(dim=1), batch.visual["clean"].mask
    assert frames is not None
    assert text.embed is not None
    assert visual.embed is not None
    for row in range(4):
        torch.testing.assert_close(text.embed[row], text.hidden[row, 1 : lengths[row]].mean(dim=0))
        torch.testing.assert_close(visual.embed[row], visual.hidden[row, : frames[row].sum()].mean(dim=0))
    assert (text.embed.norm(dim=1) - 1).abs().min() > 1e-2  # compared as they are


def test_a_row_that_a_sample_lacks_is_nothing() -> None:
    family, batch = miniature(), batch_of()
    clean = batch.text["clean"]
    embed = family.encode_text(clean._replace(mask=torch.zeros_like(clean.mask))).embed
    assert embed is not None
    assert (embed == 0).all()


def test_frames_enter_normalised_and_keys_are_those() -> None:
    family, batch = miniature(), batch_of()
    feats = batch.visual["clean"].feats
    keys = family.frame_keys(batch.visual["clean"])
    even = (feats - feats.mean(dim=2, keepdim=True)) / feats.var(dim=2, unbiased=False, keepdim=True).add(1e-12).sqrt()
    real = batch.visual["clean"].mask
    assert real is not None
    wanted = even * family.frame_norm.weight + family.frame_norm.bias
    torch.testing.assert_close(keys[real], wanted[real])
    torch.testing.assert_close(keys[~real], family.frame_norm.bias.expand_as(keys)[~real])  # zeros, as hidden frames


def test_padding_moves_no_frame() -> None:
    """Frames stand behind the longest text that the family reads, however long the batch's texts are."""
    family, short, long = miniature(), batch_of(), batch_of(padding=3)
    frames = short.visual["clean"].mask
    assert frames is not None
    plain, padded = (family.fuse(*streams(family, batch)) for batch in (short, long))
    (words, video), (more_words, more_video) = both(plain), both(padded)
    mask = short.text["clean"].mask
    torch.testing.assert_close(words[mask], more_words[:, : mask.shape[1]][mask])
    torch.testing.assert_close(video[frames], more_video[frames])
    assert plain.pooled is not None
    torch.testing.assert_close(
        plain.pooled, (words[:, 0] @ family.pooler.dense.weight.T + family.pooler.dense.bias).tanh()
    )


def test_words_and_frames_see_each_other() -> None:
    family, batch = miniature(), batch_of()
    text, visual = streams(family, batch)
    words, video = both(family.fuse(text, visual))
    other = family.fuse(text, visual._replace(hidden=visual.hidden.flip(0)))
    assert (both(other)[0] - words).abs().amax() > 1e-3
    other = family.fuse(text._replace(hidden=text.hidden.flip(0)), visual)
    assert (both(other)[1] - video).abs().amax() > 1e-3
    with pytest.raises(ConfigError, match="caption"):
        family.fuse(text, visual, causal=True)


def test_flops_equal_torchs_counter() -> None:
    family, batch = miniature(), batch_of()
    clean = batch.text["clean"]
    count, found = family.flops(clean.ids.shape[1]), {}

    def counted(verb: str, make: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            made = make()
        found[verb] = counter.get_total_flops() // 4
        return made

    text = counted("encode_text", lambda: family.encode_text(clean))
    visual = counted("encode_visual", lambda: family.encode_visual(batch.visual["clean"]))
    fused = counted("fuse", lambda: family.fuse(text, visual))
    mask = torch.cat([text.mask, visual.mask], dim=1)
    counted("decode", lambda: family.decode(clean, fused, mask))
    assert found == count


def trimmed(batch: Batch, rows: slice) -> Batch:
    """Some samples, padded to the longest of them alone, as the loader pads micro-batches."""
    own = part(batch, rows)
    words, frames = own.text["clean"].mask.any(dim=0).sum(), own.visual["clean"].mask.any(dim=0).sum()  # type: ignore
    texts, clips = {}, {}
    for view, text in own.text.items():
        texts[view] = Text(*(None if each is None else each[:, :words] for each in text))
    for view, clip in own.visual.items():
        clips[view] = Visual(*(None if each is None else each[:, :frames] for each in clip))
    return replace(own, text=texts, visual=clips)


def test_micro_batches_of_other_lengths_are_one_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All objectives but those of pairs, whose negatives are of a micro-batch."""

    def make() -> PretrainModel:
        model = model_of(miniature())
        names = [name for name in model.objectives if name != "pair_nce"]
        return PretrainModel(model.family, {name: model.objectives[name] for name in names})  # type: ignore[misc]

    monkeypatch.setattr(whole_steps, "part", trimmed)
    assert trimmed(batch_of(), slice(2, 4)).visual["clean"].feats.shape[1] < TINY.frames
    whole_steps.check_whole(make, batch_of(), world=1, number=2)


def test_stage_one_trains_the_encoders_alone() -> None:
    family = univl.build(replace(TINY, stage="one"))
    assert family.offers == {"text", "visual", "embed", "frames"}
    with pytest.raises(ConfigError, match="objective 'mlm' needs"):
        model_of(family)
    model = PretrainModel(family, {"mil_nce": mil_nce.build(JOINT, family)})
    loss = model(batch_of(), Moment(1)).losses["mil_nce"].value
    loss.backward()
    for name, parameter in family.named_parameters():
        waits = name.startswith(("cross_", "fusion_", "pooler", "decoder_"))
        assert parameter.requires_grad is not waits, name
        assert (parameter.grad is None) is waits, name


def test_stage_two_starts_from_stage_one(tmp_path: Path) -> None:
    """Every tensor of the family, those that waited too; the heads are new."""
    first = miniature(stage="one")
    kept = {f"family.{name}": value.clone() for name, value in first.state_dict().items()}
    save_file(kept, tmp_path / "model.safetensors")
    torch.manual_seed(9)
    model = model_of(univl.build(TINY))
    done = init_whole(model, tmp_path)
    assert set(done.filled) == set(kept)
    assert {name.split(".")[1] for name in done.left} == {"mlm", "mfm", "pair_nce", "caption"}
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def published() -> dict[str, Tensor]:
    """A checkpoint of the miniature under the authors' names, from the reference tensors' list of names."""
    names = load_file(reference_folder("univl") / "weights.safetensors")
    c, generator = TINY, torch.Generator().manual_seed(5)
    depths = {"bert.encoder": 2, "visual.encoder": 1, "cross.encoder": 1, "decoder.decoder": 2}
    theirs = json.loads((reference_folder("univl") / "config.json").read_text())
    widths = {  # no two sizes of the folder's network may be alike but for these
        theirs["hidden_size"]: c.hidden,
        theirs["intermediate_size"]: c.intermediate,
        theirs["vocab_size"]: c.vocab,
        theirs["video_dim"]: c.feats,
        theirs["type_vocab_size"]: c.segments,
        1: 1,
    }
    positions = {
        "bert.embeddings": c.max_positions,
        "decoder.embeddings": c.max_positions,
        "visual.embeddings": c.visual_positions,
        "cross.embeddings": c.cross_positions,
    }
    found = {}
    for name, tensor in names.items():
        layer = name.partition(".layer.")
        if layer[1] and int(layer[2].split(".")[0]) >= depths[layer[0]]:
            continue
        if "position_embeddings" in name:
            shape: tuple[int, ...] = (positions[name.partition(".position")[0]], c.hidden)
        else:
            shape = tuple(widths[size] for size in tensor.shape)
        if name.startswith("visual.embeddings.word_embeddings.weight") or name == "cls_visual.predictions.weight":
            shape = (c.hidden, c.feats)
        found[name] = torch.rand(shape, generator=generator)
    return found


def test_a_published_checkpoint_fills_everything() -> None:
    model, tensors = model_of(univl.build(TINY)), published()
    done = fill(model, tensors, univl.PUBLISHED)
    assert not done.left
    assert set(done.unused) == {
        *(f"{tower}.pooler.dense.{part}" for tower in ("bert", "visual") for part in ("weight", "bias")),
        *(f"decoder.embeddings.{table}_embeddings.weight" for table in ("word", "position")),
        "decoder.classifier.cls.predictions.decoder.weight",
        "cls.predictions.decoder.weight",
        "cls_visual.predictions.weight",
    }
    state = model.state_dict()
    for ours, theirs in {
        "family.decoder_stack.blocks.1.cross_attention.key.bias": "decoder.decoder.layer.1.enc_attn.att.key.bias",
        "family.decoder_stack.blocks.0.cross_norm.bias": "decoder.decoder.layer.0.enc_attn.output.LayerNorm.bias",
        "family.cross_embeddings.modality.weight": "cross.embeddings.token_type_embeddings.weight",
        "objectives.pair_nce.score.weight": "similarity_dense.weight",
        "objectives.caption.head.norm.bias": "decoder.classifier.cls.predictions.transform.LayerNorm.bias",
        "objectives.mfm.head.bias": "cls_visual.predictions.bias",
    }.items():
        assert torch.equal(state[ours], tensors[theirs]), ours


def test_a_checkpoint_of_the_authors_stage_one_will_do() -> None:
    tensors = {name: value for name, value in published().items() if name.startswith(("bert", "visual", "normalize"))}
    model = model_of(univl.build(TINY))
    done = fill(model, tensors, univl.PUBLISHED)
    assert {name.split(".")[1].split("_")[0] for name in done.left if name.startswith("family.")} == {
        *("cross", "fusion", "pooler", "decoder"),
    }
    tensors.pop("visual.encoder.layer.0.output.dense.bias")
    with pytest.raises(CheckpointError, match="does not fill 1"):
        fill(model, tensors, univl.PUBLISHED)


def test_a_bert_starts_the_text_encoder() -> None:
    """And the head of masked words."""
    given = {name: value for name, value in published().items() if name.startswith(("bert.", "cls.predictions"))}
    model = model_of(univl.build(TINY))
    done = fill(model, given, univl.INIT_TEXT)
    text = {name for name in model.state_dict() if name.startswith(("family.text_", "objectives.mlm"))}
    assert set(done.filled) == text


@pytest.mark.parametrize(
    "wrong", [{"heads": 3}, {"text_length": 17}, {"frames": 9}, {"text_length": 16, "frames": 8, "cross_positions": 23}]
)
def test_sizes_that_do_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        univl.build(replace(TINY, **wrong))


def test_bf16_takes_fp32_features() -> None:
    family, batch = miniature().to(torch.bfloat16), batch_of()
    text, visual = streams(family, batch)
    assert {part.dtype for part in both(family.fuse(text, visual))} == {torch.bfloat16}
    assert text.embed is not None
    assert text.embed.dtype == torch.float32


def test_agrees_with_the_authors(tmp_path: Path) -> None:
    assert not agreed(reference_folder("univl"), tmp_path)["not_compared"]


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    folder = copied(reference_folder("univl"), tmp_path)
    weights = load_file(folder / "weights.safetensors")
    weights["decoder.decoder.layer.0.enc_attn.output.LayerNorm.bias"] += 0.01
    save_file(weights, folder / "weights.safetensors")
    stored = load_file(folder / "outputs.safetensors")
    changed = reference.run(Folder.open(folder))["outputs.safetensors"]
    names = [name for name, value in stored.items() if not torch.allclose(changed[name], value, rtol=1e-4, atol=1e-5)]
    assert "stage2/decoder_logits" in names
    assert "stage2/cross_output" not in names


def two_stages(out: str) -> dict[str, Any]:
    """Runs of both stages, the first at ZeRO 3; what stage one left and what stage two began with and said."""
    first, second = shrunk("univl_tiny"), shrunk("univl_tiny_stage2")
    first = replace(first, family=replace(first.family, stage="one"))
    one, two = Path(out) / "one", Path(out) / "two"
    assert train(Request(first, "ds_configs/zero3.json", one)) == 0
    left = one / "checkpoints" / "step_00000002"
    second = replace(second, init=InitConfig(weights=str(left)))
    start = {name: value.clone() for name, value in build_model(second).state_dict().items()}
    assert train(Request(second, "ds_configs/zero2.json", two)) == 0
    fresh = build_model(replace(first, init=InitConfig())).state_dict()
    return {"left": read(left), "start": start, "fresh": fresh, "log": (two / "log.txt").read_text()}


@pytest.mark.slow
def test_a_run_of_stage_two_goes_on_from_one_of_stage_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited frozen is in the checkpoint, as it began; what was trained moved."""
    for name, number in (("NUM_TRAIN", 64), ("NUM_VAL", 16)):
        monkeypatch.setattr(moving, name, number)
    embedded.ensure(tmp_path / "cache", clips=True)
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))
    found = run_ranks(two_stages, 2, str(tmp_path), timeout=200)[0]
    network = {name for name in found["left"] if name.startswith("family.")}
    assert network == {name for name in found["start"] if name.startswith("family.")}
    for name in network:
        left = found["left"][name]  # in bf16 what is frozen, which has no fp32 master
        torch.testing.assert_close(found["start"][name], left.float())
        waits = name.startswith(("family.cross_", "family.fusion_", "family.pooler", "family.decoder_"))
        if name not in ("family.text_embeddings.segment.weight",) and not name.endswith("key.bias"):
            assert torch.equal(left, found["fresh"][name].to(left.dtype)) is waits, name
    assert (
        "left at their start: objectives.caption, objectives.mfm, objectives.mlm, objectives.pair_nce" in found["log"]
    )
