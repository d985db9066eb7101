"""A step cut into micro-batches of unequal numbers of samples is the same step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.models import batch_for
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
        (["data.batching=cost", "data.tokens=9", "data.micro_batch=4"], "leave out one"),
        (["data.batching=cost", "data.pool=0"], r"data.pool should be at least 1 \(got 0\)"),
        (
            ["data.batching=token_buckets", "data.tokens=99", "data.mix=step"],
            "write data.mix=sample, or data.batching=cost",
        ),
    ],
)
def test_options_that_do_not_go_together(options: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config.load("uniter_tiny", options)
