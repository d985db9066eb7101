"""A step cut into micro-batches of unequal numbers of samples is the same step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.models import batch_for
from tests.runs import losses, metrics, run_whole
from tests.whole_steps import check_whole
from vlscale import build, config
from vlscale.errors import ConfigError
from vlscale.families import lxmert, oscar, uniter
from vlscale.model import PretrainModel
from vlscale.objectives import answer, itm, masked_object, mlm, mrc, mrc_kl, mrfr, tag_contrast, wra
from vlscale.types import Batch

SAMPLES = 8
PAIRS = {"itm": itm.Config(negatives="loader")}  # the batch's own
PARTS: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "uniter": (uniter, {**PAIRS, "wra": wra.Config(), "mlm": mlm.Config(), "mrfr": mrfr.Config()}),
    "regions": (uniter, {"mrc": mrc.Config(), "mrc_kl": mrc_kl.Config()}),
    "lxmert": (lxmert, {**PAIRS, "answer": answer.Config(), "masked_object": masked_object.Config()}),
    "oscar": (oscar, {"mlm": mlm.Config(), "tag_contrast": tag_contrast.Config()}),
}


def model(name: str) -> PretrainModel:
    torch.manual_seed(0)
    module, options = PARTS[name]
    family = module.build(replace(module.tiny(), dropout=0.0))
    built = {each: config.pick("objectives", each).build(option, family) for each, option in options.items()}
    return PretrainModel(family, built)


def batch(name: str) -> Batch:
    settings = PARTS[name][0].tiny()
    made = batch_for(settings.inputs, settings.vocab, SAMPLES)
    return replace(made, matched=torch.arange(SAMPLES) % 3 > 0, tags_swapped=torch.arange(SAMPLES) % 2)


@pytest.mark.parametrize("name", ["uniter", *(pytest.param(each, marks=pytest.mark.slow) for each in list(PARTS)[1:])])
def test_on_one_rank(name: str) -> None:
    check_whole(partial(model, name), batch(name), world=1, number=3, sizes=(5, 1, 2))


@pytest.mark.slow
def test_on_two_ranks() -> None:
    check_whole(partial(model, "uniter"), batch("uniter"), world=2, number=2, sizes=(1, 3, 2, 2))


def test_a_loss_that_compares_samples_refuses_unequal_numbers() -> None:
    run = config.load("clip_tiny", ["data.batching=cost"])
    with pytest.raises(ConfigError, match=r"data.batching=cost gives .* objectives.itc .* write data.batching=count$"):
        build.within_budget(run, None, build.build_model(run))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["data.tokens=100"],
            "data.tokens needs batches of unequal numbers; write data.batching=cost, or leave it out",
        ),
        (["data.batching=token_buckets"], "write data.tokens=10240"),
        (["data.batching=token_buckets", "data.tokens=99"], "write data.micro_batch=N too"),
        (["data.batching=cost", "data.tokens=9", "data.micro_batch=4"], "leave out one"),
        (["data.batching=cost", "data.pool=0"], r"data.pool should be at least 1 \(got 0\)"),
        (
            ["data.batching=token_buckets", "data.tokens=99", "data.micro_batch=4", "data.mix=step"],
            "write data.mix=sample, or data.batching=cost",
        ),
    ],
)
def test_options_that_do_not_go_together(options: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config.load("uniter_tiny", options)


SMALL = (
    *("--recipe", "uniter_tiny", "--ds_config", "ds_configs/fp32.json", "data.batch=24", "data.micro_batch=4"),
    *("family.hidden=32", "family.heads=2", "family.layers=1", "family.intermediate=64", "evaluation.limit=8"),
    *("logging.every=1", "logging.sample_keys=true", "logging.tensorboard=false", "data.pool=4", "data.shapes=2"),
)


@pytest.mark.slow
def test_a_run_sees_the_same_steps_however_they_are_cut(tmp_path: Path) -> None:
    """Fixed numbers, equal cost with each step's own samples, and equal cost on one rank and on two."""
    run_whole(1, tmp_path / "even", *SMALL, "steps=4", shrunk=False)
    run_whole(1, tmp_path / "own", *SMALL, "steps=4", "data.batching=cost", "data.pool=1", shrunk=False)
    run_whole(1, tmp_path / "one", *SMALL, "steps=4", "data.batching=cost", shrunk=False)
    run_whole(2, tmp_path / "two", *SMALL, "steps=4", "data.batching=cost", shrunk=False)
    keys = {name: [line["sample_keys"] for line in steps(tmp_path / name)] for name in ("even", "own", "one", "two")}
    assert keys["own"] == keys["even"]
    assert keys["two"] == keys["one"]
    assert sorted(chain(*keys["one"][:4])) == sorted(chain(*keys["even"][:4])), "a pool's steps share its samples"
    torch.testing.assert_close(losses(tmp_path / "own"), losses(tmp_path / "even"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3, atol=1e-4)
    padding = {name: sum(line["padding_fraction"] for line in steps(tmp_path / name)) for name in ("even", "one")}
    assert padding["one"] < 0.6 * padding["even"]


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(out) if "loss" in line]
