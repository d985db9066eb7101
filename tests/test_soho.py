"""SOHO: sizes, cells and their places, what is hidden, names of published weights, and steps at every ZeRO stage."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.spawn import run_ranks
from tests.engines import configuration
from tests.models import batch_for
from tests.reference.__main__ import main
from tests.shard_files import reference_folder
from tests.states import whole_weights
from tests.whole_steps import check_whole
from vlscale import distributed
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import soho
from vlscale.flops import step_flops
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.objectives import itm, mlm, mvm
from vlscale.optim import OptimConfig
from vlscale.types import Batch, Moment, Visual
from vlscale.weights import fill

OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, clip=1.0)


def model_of(**changes: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = soho.build(replace(soho.tiny(), dropout=0.0, **changes))
    loader = itm.Config(text="masked", visual="masked", negatives="loader", bias=False)
    return PretrainModel(
        family,
        {
            "mlm": mlm.build(mlm.Config(visual="masked", soften=0.0, head="tied"), family),
            "mvm": mvm.build(mvm.Config(), family),
            "itm": itm.build(loader, family),
        },
    )


def batch_of(size: int = 4, padding: int = 0, seed: int = 0) -> Batch:
    config = soho.tiny()
    batch = batch_for(config.inputs, config.vocab, size, padding, seed)
    return replace(batch, matched=torch.arange(size) % 2 == 0)


def pictures(size: int = 3, height: int = 128, width: int = 192) -> Visual:
    return Visual(torch.randn(size, 3, height, width, generator=torch.Generator().manual_seed(2)))


def test_published_sizes() -> None:
    with torch.device("meta"):
        family = soho.build(soho.Config())
    found = {name: sum(each.numel() for each in part.parameters()) for name, part in family.named_children()}
    assert found["trunk"] == 42_500_160  # torchvision's ResNet-101 without its classifier
    assert found["text_embeddings"] + found["stack"] == 109_482_240 - 768 * 769  # bert-base-uncased, no pooler
    assert found["cell_convolution"] == 2048 * 768
    assert found["gate"] == 2 * 1536 + 2 * 2
    assert found["dictionary"] == 0
    assert family.code_table.shape == (2048, 768)


def test_the_start_of_its_matrices() -> None:
    plain, wide = model_of().family, model_of(init_scale=4.0).family
    first, second = (each.stack.blocks["0"] for each in (plain, wide))
    torch.testing.assert_close(second.mlp.fc1.weight, 4 * first.mlp.fc1.weight)
    assert torch.equal(plain.word_embedding.weight, wide.word_embedding.weight)


@pytest.mark.parametrize(("height", "width"), [(128, 192), (100, 64), (70, 130)])
def test_streams(height: int, width: int) -> None:
    family, visual = model_of().family, pictures(3, height, width)
    rows, columns = ((length + 31) // 32 // 2 for length in (height, width))
    stream = family.encode_visual(visual)
    assert stream.hidden.shape == (3, rows * columns, 16)
    assert stream.codes is not None
    assert stream.codes.shape == (3, rows * columns)
    assert stream.picked is None
    text = family.encode_text(batch_of(3).text["clean"])
    fused = family.fuse(text, stream)
    assert fused.text is not None
    assert fused.visual is not None
    assert fused.visual.shape == stream.hidden.shape
    assert torch.equal(fused.pooled, fused.text[:, 0])


def test_a_600_by_1000_picture_has_144_cells() -> None:
    family = model_of().family
    visual = Visual(torch.zeros(1, 3, 608, 1024))  # 600 x 1000, padded
    assert family.pick(visual, torch.zeros(1), torch.zeros(1)).shape == (1, 144)


def test_positions_by_hand() -> None:
    mask = torch.tensor([[[1, 1, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]]]).bool()
    codes = soho.sine_positions(mask, 8).view(2, 2, 3, 8)
    for picture, row, column in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 0)):
        wanted = []
        real = 2 if picture == 0 else 3
        for place in (2 * math.pi * (row + 1) / 2, 2 * math.pi * (column + 1) / real):
            for channel in range(0, 4, 2):
                angle = place / 10000 ** (channel / 4)
                wanted += [math.sin(angle), math.cos(angle)]
        torch.testing.assert_close(codes[picture, row, column], torch.tensor(wanted), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", [True, False])
def test_cells_by_hand(gate: bool) -> None:
    family = model_of(gate=gate).family.eval()
    visual = pictures()
    maps = torch.nn.functional.max_pool2d(family.trunk(visual.feats), 2)
    maps = family.cell_norm(family.cell_convolution(maps))
    cells = maps.flatten(2).transpose(1, 2)
    codes = torch.cdist(cells.flatten(0, 1), family.code_table).argmin(dim=1).view(3, 6)
    values = family.value_map(family.code_table[codes])
    mixed = values + cells
    if gate:
        both = torch.cat([values, cells], dim=2)
        scores = both @ family.gate.convolution.weight.view(2, -1).T / math.sqrt(1 + 1e-5)  # the norm at its start
        first, second = scores.softmax(dim=2).split(1, dim=2)
        mixed = first * values + second * cells
    places = soho.sine_positions(torch.ones(3, 2, 3, dtype=torch.bool), 16)
    stream = family.encode_visual(visual)
    assert torch.equal(stream.codes, codes)
    torch.testing.assert_close(stream.hidden, family.visual_norm(mixed + places))


def test_hidden_cells_show_the_mask_token_alone() -> None:
    family, visual = model_of().family, pictures()
    picked = torch.zeros(3, 6, dtype=torch.bool)
    picked[0, 1] = picked[2, 4] = True
    plain, stream = family.encode_visual(visual), family.encode_visual(visual._replace(picked=picked))
    hidden = stream.picked
    assert bool((hidden >= picked).all())
    assert not bool(hidden[1].any())
    for row, cell in ((0, 1), (2, 4)):
        assert torch.equal(hidden[row], plain.codes[row] == plain.codes[row, cell])
    torch.testing.assert_close(stream.hidden[~hidden], plain.hidden[~hidden])
    places = soho.sine_positions(torch.ones(3, 2, 3, dtype=torch.bool), 16)
    torch.testing.assert_close(stream.hidden[hidden], family.visual_norm(family.mask_token.vector + places[hidden]))


def test_several_captions_of_one_picture() -> None:
    family, visual = model_of().family, pictures(2)
    picked = torch.zeros(6, 6, dtype=torch.bool)
    picked[1, 1] = picked[5, 2] = True
    repeated = visual._replace(feats=visual.feats.repeat_interleave(3, dim=0), picked=picked)
    short, long = (family.encode_visual(each) for each in (visual._replace(picked=picked), repeated))
    torch.testing.assert_close(short.hidden, long.hidden)
    assert torch.equal(short.picked, long.picked)


def test_the_draw_is_uniform_over_cells() -> None:
    family, draws = model_of(mask_prob=0.25).family, torch.Generator().manual_seed(0)
    number = 6000
    cell, kept = torch.rand(2, number, generator=draws, dtype=torch.float64)
    picked = family.pick(Visual(torch.zeros(number, 1, 128, 192)), cell, kept)
    assert int(picked.sum(dim=1).max()) == 1
    share = picked.float().mean(dim=0) * 6
    torch.testing.assert_close(share, torch.full((6,), 0.25), atol=0.03, rtol=0)


def test_the_view_masked_is_drawn_and_clean_is_not() -> None:
    model, batch = model_of(mask_prob=1.0), batch_of()
    seen: list[Visual] = []
    plain = model.family.encode_visual

    def watched(visual: Visual) -> Any:
        seen.append(visual)
        return plain(visual)

    model.family.encode_visual = watched  # type: ignore[method-assign]
    model(batch, Moment(1))
    assert len(seen) == 1  # one pass for all three objectives
    assert seen[0].picked is not None
    assert bool(seen[0].picked.any(dim=1).all())
    assert batch.visual["masked"].picked is None


def test_padding_changes_no_loss() -> None:
    model = model_of()
    short, long = (model(batch_of(padding=padding), Moment(1)).losses for padding in (0, 3))
    for name in short:
        torch.testing.assert_close(short[name].value, long[name].value)


def test_cells_of_padding_are_not_seen() -> None:
    family, text = model_of().family, batch_of(3).text["clean"]
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4:] = False
    stream = family.encode_visual(pictures()._replace(mask=mask))
    noisy = stream._replace(hidden=torch.where(mask[..., None], stream.hidden, 9.0))
    first, second = (family.fuse(family.encode_text(text), each) for each in (stream, noisy))
    torch.testing.assert_close(first.pooled, second.pooled)


def test_causal_text_sees_cells_and_no_later_word() -> None:
    family, text = model_of().family, batch_of(3).text["clean"]
    visual, words = family.encode_visual(pictures()), family.encode_text(text)
    later = words._replace(hidden=words.hidden.clone())
    later.hidden[:, 3:] += 1.0
    before, after = (family.fuse(each, visual, causal=True) for each in (words, later))
    torch.testing.assert_close(before.text[:, :3], after.text[:, :3])
    torch.testing.assert_close(before.visual, after.visual)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 220)])
def test_forward_flops_equal_torchs_counter(height: int, width: int) -> None:
    model, batch = model_of(), batch_of()
    feats = torch.zeros(len(batch), 3, height, width, dtype=torch.uint8)
    batch = replace(batch, visual={view: Visual(feats) for view in batch.visual})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(2))
    assert step_flops(model, batch).forward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_bf16() -> None:
    model, batch = model_of(live_statistics=True).to(torch.bfloat16), batch_of()
    made = model(batch, Moment(1))
    assert {loss.value.dtype for loss in made.losses.values()} == {torch.float32}
    model.total(made.losses, {}).backward()  # type: ignore[no-untyped-call]
    model.commit([made.keys], 1, "step")
    assert model.family.code_table.dtype == torch.float32
    assert float(model.family.dictionary.used.sum()) == 4 * 4


@pytest.mark.parametrize(("world", "number"), [(1, 2), (2, 1), (2, 2)])
def test_ranks_and_micro_batches_change_nothing(world: int, number: int) -> None:
    check_whole(model_global, batch_of(), world, number)


def model_global() -> PretrainModel:
    family = model_of().family
    return PretrainModel(
        family,
        {
            "mlm": mlm.build(mlm.Config(visual="masked", soften=0.0, head="tied"), family),
            "mvm": mvm.build(mvm.Config(scope="global"), family),
        },
    )


@pytest.mark.parametrize(
    "wrong",
    [{"heads": 3}, {"hidden": 18}, {"depth": 20}, {"frozen_stages": 5}, {"image_size": 32}, {"text_length": 99}],
)
def test_wrong_sizes(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        soho.build(replace(soho.tiny(), **wrong))


def their_trunk(family: Any, prefix: str) -> dict[str, Tensor]:
    """Random tensors in torchvision's names, with our trunk's shapes."""
    out = {}
    for name, place in [*family.trunk.named_parameters(), *family.trunk.named_buffers()]:
        name = name.replace("stem.convolution", "conv1").replace("stem.norm", "bn1").replace("stages.", "layer")
        for number in range(3):
            name = name.replace(f"convolutions.{number}", f"conv{number + 1}").replace(
                f"norms.{number}", f"bn{number + 1}"
            )
        out[prefix + name.replace("shortcut", "downsample")] = torch.randn(place.shape)
    return {**out, f"{prefix}bn1.num_batches_tracked": torch.tensor(1)}


def test_a_start_from_imagenet() -> None:
    model = model_of()
    given = their_trunk(model.family, "")
    done = fill(model, {**given, "fc.weight": torch.zeros(9, 24), "fc.bias": torch.zeros(9)}, soho.INIT_VISION)
    assert len(done.filled) == len(given) - 1
    torch.testing.assert_close(model.family.trunk.stages["2"][0].convolutions[1].weight, given["layer2.0.conv2.weight"])
    torch.testing.assert_close(
        model.family.trunk.stages["3"][1].norms[0].running_var, given["layer3.1.bn1.running_var"]
    )
    with pytest.raises(CheckpointError, match="no place"):
        fill(model, {**given, "layer2.7.conv1.weight": torch.zeros(1)}, soho.INIT_VISION)
    del given["layer4.1.bn2.weight"]
    with pytest.raises(CheckpointError, match="does not fill 1"):
        fill(model, given, soho.INIT_VISION)


def their_bert(layers: int, width: int = 16) -> dict[str, Tensor]:
    names = {f"embeddings.{name}_embeddings.weight": rows for name, rows in (("word", 64), ("token_type", 2))}
    out = {f"bert.{name}": torch.randn(rows, width) for name, rows in names.items()}
    out["bert.embeddings.position_embeddings.weight"] = torch.randn(32, width)
    for letter in ("gamma", "beta"):
        out[f"bert.embeddings.LayerNorm.{letter}"] = torch.randn(width)
    for layer in range(layers):
        parts = [*(f"attention.self.{part}" for part in ("query", "key", "value")), "attention.output.dense"]
        for part, rows, columns in [*((part, width, width) for part in parts), ("intermediate.dense", 32, width)]:
            out[f"bert.encoder.layer.{layer}.{part}.weight"] = torch.randn(rows, columns)
            out[f"bert.encoder.layer.{layer}.{part}.bias"] = torch.randn(rows)
        out[f"bert.encoder.layer.{layer}.output.dense.weight"] = torch.randn(width, 32)
        out[f"bert.encoder.layer.{layer}.output.dense.bias"] = torch.randn(width)
        for part in ("attention.output", "output"):
            for letter in ("gamma", "beta"):
                out[f"bert.encoder.layer.{layer}.{part}.LayerNorm.{letter}"] = torch.randn(width)
    return {**out, "bert.pooler.dense.weight": torch.randn(width, width), "cls.predictions.bias": torch.randn(64)}


def test_a_start_from_a_longer_bert_takes_its_first_layers() -> None:
    model, given = model_of(), their_bert(layers=5)
    done = fill(model, given, soho.INIT_TEXT)
    blocks = model.family.stack.blocks
    for layer in range(2):
        own = given[f"bert.encoder.layer.{layer}.output.LayerNorm.gamma"]
        torch.testing.assert_close(blocks[str(layer)].mlp_norm.weight.detach(), own)
    assert sum("layer.4." in name for name in done.unused) == 16
    with pytest.raises(CheckpointError, match="does not fill"):
        fill(model, their_bert(layers=1), soho.INIT_TEXT)


def series(engine: Any, ranks: list[int]) -> dict[str, Any]:
    """Losses of three steps, and what is left; `ranks` are the micro-batches that this process takes."""
    losses = []
    for step in range(1, 4):
        made = []
        for number, rank in enumerate(ranks):
            batch = batch_of(seed=10 * step + rank).to(engine.device)
            made.append(engine.forward(batch, Moment(step, 0, number, len(ranks))))
            engine.backward(engine.model.total(made[-1].losses, {}), last=number == len(ranks) - 1)
        engine.step(1e-3)
        engine.model.commit([each.keys for each in made], step, "step")
        total = torch.stack([engine.model.total(each.losses, {}).detach() for each in made]).mean()
        losses.append(float(distributed.sum_over_ranks({"loss": total})["loss"]) / distributed.world_size())
    weights = whole_weights(engine)
    kept = ("dictionary.table", "cell_norm.running_var", "trunk.stages.4.1.norms.1.running_mean", "mask_token.vector")
    return {"losses": losses, **{name: weights[f"family.{name}"] for name in kept}}


def deepspeed_series(name: str) -> dict[str, Any]:
    engine = DeepSpeedEngine(model_of(), configuration(name, 8, 4, OPTIM.clip), OPTIM, distributed.init())
    return series(engine, [distributed.rank()])


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_every_stage_makes_the_series_of_plain_pytorch(name: str) -> None:
    expected = series(LocalEngine(model_of(), OPTIM, torch.device("cpu"), accumulation=2), [0, 1])
    first, second = run_ranks(deepspeed_series, 2, name)
    assert first["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    for key in [key for key in expected if key != "losses"]:
        torch.testing.assert_close(first[key], expected[key], atol=1e-4, rtol=1e-3)
        assert torch.equal(first[key], second[key]), key


def live_series() -> dict[str, Any]:
    """Steps with the statistics of the micro-batches."""
    engine = LocalEngine(model_of(live_statistics=True), OPTIM, torch.device("cpu"))
    return series(engine, [distributed.rank()])


def test_running_figures_are_alike_on_all_ranks_with_live_statistics() -> None:
    first, second = run_ranks(live_series, 2)
    for key in ("dictionary.table", "cell_norm.running_var", "trunk.stages.4.1.norms.1.running_mean"):
        assert torch.equal(first[key], second[key]), key
    assert not torch.equal(first["cell_norm.running_var"], torch.ones(16))


def test_agrees_with_the_authors() -> None:
    assert main([str(reference_folder("soho"))]) == 0
