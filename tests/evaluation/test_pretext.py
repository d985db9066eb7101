"""Held-out samples, and the objectives' own figures on them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.models import albef_model
from tests.shard_files import make_tokenizer, write_samples
from vlscale import config
from vlscale.config import RunConfig
from vlscale.data import views
from vlscale.data.held_out import FIRST_ID, HeldOutBatches
from vlscale.data.micro_batches import Preprocessing
from vlscale.data.order import TaskOrder
from vlscale.data.scenes.regions import FEATURES, NUM_CLASSES
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError, DataError
from vlscale.evaluation import pretext, retrieval
from vlscale.evaluation.base import HeldOut, usual_task
from vlscale.families import albef
from vlscale.nn.transformer import Stack
from vlscale.saving import checkpoint
from vlscale.types import IGNORE, Batch

COUNT = 11
CPU = torch.device("cpu")
VIEWS = views.parse({"visual.clean": {}, "text.clean": {}, "text.masked": {"mask_tokens": {"prob": 0.4}}})


def held_out(folder: Path, batch: int, limit: int = 0, special: Any = None) -> HeldOut:
    """A miniature ALBEF and a few shards."""
    family = replace(albef.tiny(), dropout=0.5, text_length=12)
    shards = Shards(write_samples(folder / "shards", COUNT, 4, special or {}), folder / "cache")
    preprocessing = Preprocessing({"all": VIEWS}, TaskOrder({"all": 1.0}, 7), seed=7)
    return HeldOut(
        albef_model(dropout=0.5), CPU, shards, make_tokenizer(folder, family.inputs), preprocessing, batch, limit
    )


def batches(held: HeldOut, rank: int = 0, world: int = 1) -> list[Batch]:
    inputs = held.model.family.inputs
    make = HeldOutBatches(held.shards, held.tokenizer, inputs, held.preprocessing, batch=held.batch, limit=held.limit)
    return list(make("all", rank, world))


# --- the samples -------------------------------------------------------------------------------------------


def test_ranks_share_each_round_and_change_nothing(tmp_path: Path) -> None:
    alone = batches(held_out(tmp_path, 4))
    assert [len(batch) for batch in alone] == [4, 4, 3]
    first, second = (batches(held_out(tmp_path, 2), rank, 2) for rank in range(2))
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [2, 2]  # the fifth would be alone
    for whole, one, other in zip(alone, first, second, strict=False):
        assert whole.keys == one.keys + other.keys
        for part, rows in ((one, slice(0, 2)), (other, slice(2, 4))):
            width = part.text["masked"].ids.shape[1]
            assert torch.equal(part.text["masked"].ids, whole.text["masked"].ids[rows, :width])
    assert [key for batch in alone for key in batch.keys] == [f"s{number:03d}" for number in range(COUNT)]
    assert min(int(batch.pair_id.min()) for batch in alone) == FIRST_ID  # no training sample's


def test_the_limit_and_what_cannot_be_used(tmp_path: Path) -> None:
    broken = {2: [("s002.png", b"no picture"), ("s002.json", b'{"caption": "a red thing"}')]}
    assert [batch.keys for batch in batches(held_out(tmp_path, 4, limit=4, special=broken))] == [
        ("s000", "s001", "s003", "s003")  # the next sample takes the place
    ]
    with pytest.raises(DataError, match=r"1 validation samples are too few .* evaluation\.limit"):
        batches(held_out(tmp_path, 4, limit=1))


def test_an_evaluation_tells_how_many_samples_it_had_to_skip(tmp_path: Path) -> None:
    broken = {n: [(f"s{n:03d}.png", b"no picture"), (f"s{n:03d}.json", b'{"caption": "a thing"}')] for n in (2, 3, 9)}
    held = held_out(tmp_path, 4, limit=8, special=broken)
    metrics = retrieval.measure(held).metrics
    assert (metrics["eval/retrieval/candidates"], metrics["eval/retrieval/skipped"]) == (6, 2)
    assert pretext.measure(held).metrics["eval/pretext/skipped"] == 2


# --- the figures -------------------------------------------------------------------------------------------


def test_means_range_over_tokens_and_stand_beside_the_commonest_label(tmp_path: Path) -> None:
    held = held_out(tmp_path, 4)
    figures = {name.removeprefix("eval/pretext/"): value for name, value in pretext.measure(held).metrics.items()}
    labels = [label for batch in batches(held) for label in batch.text["masked"].labels.flatten().tolist()]  # type: ignore
    labels = [label for label in labels if label != IGNORE]
    assert figures["mlm/majority"] == max(Counter(labels).values()) / len(labels)
    assert figures["itm/majority"] == pytest.approx(2 / 3)  # hard negatives: two for each pair
    in_one = pretext.measure(held_out(tmp_path, COUNT)).metrics
    for name in ("loss/mlm", "mlm/hard", "mlm/accuracy", "mlm/majority"):
        assert figures[name] == pytest.approx(in_one[f"eval/pretext/{name}"], rel=1e-5), name
    assert 0 < figures["itc/accuracy"] <= 1
    assert set(figures) == {
        *("loss/itc", "loss/itm", "loss/mlm", "itc/i2t", "itc/t2i", "itc/accuracy", "itm/accuracy", "itm/majority"),
        *("mlm/hard", "mlm/soft", "mlm/accuracy", "mlm/majority", "skipped"),
    }


def test_an_evaluation_can_be_repeated_and_leaves_no_trace(tmp_path: Path) -> None:
    held = held_out(tmp_path, 4)
    model = held.model
    model.family.eval()
    assert model.twin is not None
    stack = next(module for module in model.twin.modules() if isinstance(module, Stack))
    stack.kept = (False,) * len(stack.blocks)  # as `momentum.drop_layers` may leave it
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    first = pretext.measure(held)
    assert torch.equal(random, torch.get_rng_state())
    torch.manual_seed(5)
    assert pretext.measure(held) == first
    assert stack.kept == (False,) * len(stack.blocks)
    stack.kept = None
    assert pretext.measure(held) == first  # the twin's layers were all there
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_the_samples_hold_no_case_of_is_left_out(tmp_path: Path) -> None:
    held = held_out(tmp_path, 4)
    silent = views.TextView(mask_tokens=views.MaskTokens(prob=1e-9, at_least_one=False))
    nothing = replace(VIEWS, text={"clean": views.TextView(), "masked": silent})
    found = pretext.measure(replace(held, preprocessing=replace(held.preprocessing, views={"all": nothing}))).metrics
    assert "eval/pretext/itm/accuracy" in found
    assert not [name for name in found if "mlm" in name]


def test_every_family_has_a_task(tmp_path: Path) -> None:
    model = held_out(tmp_path, 4).model
    assert usual_task(model.family) == "retrieval"
    model.family.offers = model.family.offers - {"embed"}
    assert usual_task(model.family) == "pretext"
    with pytest.raises(ConfigError, match="pretext measures any family"):
        retrieval.evaluate(model.family, iter([]), CPU)


# --- whole runs --------------------------------------------------------------------------------------------


def miniature(every: int, **more: Any) -> RunConfig:
    """CVLP, which has no retrieval: a twin that drops layers, a queue, two tasks."""
    family = asdict(config.pick("families", "cvlp").tiny())
    family |= {"feats": FEATURES, "classes": NUM_CLASSES, "dropout": 0.1}
    tree: dict[str, Any] = {
        "family": {"name": "cvlp", **family},
        "objectives": {
            "mlm": {"soften": 0.0, "visual": "masked"},
            "region_nce": {"queue": 64},
            "itm": {"negatives": "loader"},
        },
        "tasks": {"words": {"objectives": ["mlm", "region_nce"]}, "pairs": {"objectives": ["itm"]}},
        "views": {
            "text.clean": {},
            "text.masked": {"mask_tokens": {}},
            "visual.clean": {},
            "visual.masked": {"mask_regions": {}},
            "pairs.mismatch": {},
        },
        "momentum": {"drop_layers": 0.5},
        "data": {"train": "embedded", "val": "embedded", "batch": 8, "workers": 0},
        "evaluation": {"every": every, "limit": 24},
        "logging": {"every": 1, "tensorboard": False},
        "steps": 3,
        **more,
    }
    return config.from_tree("miniature", tree)


def test_too_few_samples_are_told_before_the_first_step(tmp_path: Path) -> None:
    from vlscale import build

    run = miniature(0, evaluation={"limit": 1})
    setting = build.setup(build.Request(run, "ds_configs/zero2.json", tmp_path / "run"))
    with pytest.raises(DataError, match=r"1 validation samples are too few for 1 rank\(s\)"):
        build.build_loader(run, setting, build.build_model(run))


def in_one_process(folder: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs with and without evaluations along the way, one of them measured again from its checkpoint; `untrained`."""
    from vlscale import evaluate, train
    from vlscale.build import Request

    for name, every in (("often", 1), ("seldom", 0)):
        assert train.train(Request(miniature(every), "ds_configs/zero2.json", Path(folder) / name)) == 0
    measured = evaluate.evaluate(str(Path(folder) / "often"), None, None, batch=8)
    return measured, untrained("ds_configs/fp32.json", 8, folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, float]]:
    folder = tmp_path_factory.mktemp("runs")
    [(measured, alone)] = run_ranks(in_one_process, 1, str(folder))
    return folder, measured, alone


def test_a_run_of_a_family_without_embeddings(done: tuple[Path, dict[str, Any], dict[str, float]]) -> None:
    folder, measured, _ = done
    lines = {name: (folder / name / "metrics.jsonl").read_text().splitlines() for name in ("often", "seldom")}
    often, seldom = ([json.loads(line) for line in lines[name]] for name in ("often", "seldom"))
    evaluations = [line for line in often if "eval/pretext/loss/mlm" in line]
    assert [line["step"] for line in evaluations] == [1, 2, 3]
    assert {"mlm/majority", "itm/majority", "itm/accuracy", "region_nce/cosine", "loss/region_nce"} <= {
        name.removeprefix("eval/pretext/") for name in evaluations[-1]
    }
    assert measured == evaluations[-1]  # the queue is the checkpoint's
    assert [line for line in seldom if "eval/pretext/loss/mlm" in line] == evaluations[-1:]
    assert [line["loss"] for line in often if "loss" in line] == [line["loss"] for line in seldom if "loss" in line]
    weights = [checkpoint.weights(checkpoint.find(str(folder / name))) for name in lines]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def untrained(ds_config: str, micro_batch: int, folder: str) -> dict[str, float]:
    """The figures of a model before its first step, as `ds_config` spreads it over the ranks."""
    from vlscale import build
    from vlscale.build import Request

    run = miniature(0, data={"train": "embedded", "val": "embedded", "batch": 8, "workers": 0})
    setting = build.setup(Request(run, ds_config, Path(folder) / "run"))
    model = build.build_model(run)
    machine = build.build_engine(run, setting, model)
    preprocessing = build.preprocessing(run, setting.answers, model)
    held = HeldOut(model, machine.device, setting.val, setting.tokenizer, preprocessing, batch=micro_batch, limit=24)
    return pretext.measure(held).metrics


def test_ranks_and_zero_3_change_nothing(done: tuple[Path, dict[str, Any], dict[str, float]], tmp_path: Path) -> None:
    alone = done[2]
    sharded = json.loads(Path("ds_configs/zero3.json").read_text())
    del sharded["bf16"]
    sharded["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small parameters are parted too
    (tmp_path / "zero3_fp32.json").write_text(json.dumps(sharded))
    first, second = run_ranks(untrained, 2, str(tmp_path / "zero3_fp32.json"), 4, str(tmp_path))
    assert first == second
    assert set(first) == set(alone)
    assert {name: value for name, value in first.items() if abs(value - alone[name]) > 1e-5} == {}
