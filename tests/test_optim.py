"""Schedules by hand, and which parameter decays at which rate."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import albef_model
from vlscale import config, optim
from vlscale.errors import ConfigError
from vlscale.families import uniter
from vlscale.optim import OptimConfig, SgdConfig


def rates(config: OptimConfig, steps: int) -> list[float]:
    return [optim.lr_at(step, config, steps) for step in range(1, steps + 1)]


def test_a_plain_warmup_and_cosine() -> None:
    found = rates(OptimConfig(lr=1.0, warmup=4, final_lr=0.2), 12)
    assert found[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert found[8] == pytest.approx(0.6)  # half of the 8 steps after the warm-up
    assert found[11] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 7 / 8)))
    assert all(later < earlier for earlier, later in pairwise(found[4:]))


def test_linear_and_constant() -> None:
    assert rates(OptimConfig(lr=1.0, schedule="linear"), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(OptimConfig(lr=1.0, schedule="constant", warmup=2, warmup_lr=0.5), 4) == pytest.approx(
        [0.5, 0.75, 1, 1]
    )


def test_a_decay_from_the_first_step_on() -> None:
    found = rates(OptimConfig(lr=1.0, schedule="linear", warmup=2, decay_after_warmup=False), 4)
    assert found == pytest.approx([0.0, 0.5, 0.5, 0.25])


def test_it_ends_within_its_bounds_however_long_the_warmup() -> None:
    assert rates(OptimConfig(lr=1.0, warmup=8), 4) == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8])
    assert optim.lr_at(9, OptimConfig(lr=1.0, final_lr=0.1), 4) == pytest.approx(0.1)


def test_steps_after_milestones() -> None:
    found = rates(OptimConfig(lr=1.0, schedule="step", milestones=(3, 5), warmup=1, warmup_start_factor=0.5), 7)
    assert found == pytest.approx([0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(OptimConfig(lr=1.0, schedule="step", milestones=(1,), decay_factor=0.5), 2) == pytest.approx([1, 0.5])


def test_the_schedule_of_soho() -> None:
    """soho_res18_pre.py: linear from a third over 1000 of its micro-batches, two per step; x0.1 at epochs 25 and 35."""
    epoch = 700
    config = OptimConfig(
        lr=1e-4, schedule="step", milestones=(25 * epoch, 35 * epoch), warmup=500, warmup_start_factor=1 / 3
    )

    def published(iteration: int) -> float:  # from 0, of micro-batches
        rate = 1e-4 * 0.1 ** sum(iteration // (2 * epoch) >= number for number in (25, 35))
        return rate * (1 - (1 - iteration / 1000) * (1 - 1 / 3)) if iteration < 1000 else rate

    for step in (*range(1, 600, 7), 500, 501, 25 * epoch, 25 * epoch + 1, 35 * epoch, 35 * epoch + 1, 40 * epoch):
        assert optim.lr_at(step, config, 40 * epoch) == pytest.approx(published(2 * (step - 1))), step


@pytest.mark.parametrize(("steps", "share"), [(20, 0.1), (100, 0.05), (8, 0.25)])
def test_the_triangle_of_bert_and_lxmert(steps: int, share: float) -> None:
    """optimization.py, warmup_linear: the counter starts at 0, so the first step moves nothing."""

    def published(done: float) -> float:
        return done / share if done < share else max((done - 1) / (share - 1), 0.0)

    found = rates(OptimConfig(lr=1.0, schedule="linear", warmup=round(share * steps)), steps)
    assert found == pytest.approx([published(number / steps) for number in range(steps)])
    assert found[0] == 0.0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"schedule": "step"}, r"milestones is \[\]; `step` needs milestones"),
        ({"milestones": (10, 20)}, r"schedule is cosine and optim.milestones is \[10, 20\]"),
        ({"warmup_lr": 0.1, "warmup_start_factor": 0.1}, "write one of them"),
        ({"warmup_start_factor": -1.0}, "optim.warmup_start_factor should be at least 0"),
        ({"schedule": "constant", "stair": 10}, "optim.stair is 10, but optim.schedule=constant knows no such thing"),
        ({"schedule": "step", "milestones": (5,), "decay_after_warmup": False}, "decay_after_warmup is False, but"),
        ({"decay_factor": -1.0}, "optim.decay_factor should be at least 0"),
        ({"betas": (0.9, 1.0)}, r"optim.betas should each be from 0 and below 1 \(got \[0.9, 1.0\]\)"),
    ],
)
def test_options_that_contradict(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        OptimConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"parts": ()}, "optim.sgd.parts is empty"),
        ({"parts": ("a",), "momentum": 1.0}, "optim.sgd.momentum should be from 0 and below 1"),
        ({"parts": ("a",), "lr_scale": -1.0}, "optim.sgd.lr_scale should be at least 0"),
    ],
)
def test_options_of_sgd(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        SgdConfig(**wrong)


def test_the_stairs_of_albef() -> None:
    """Pretrain.py and scheduler/cosine_lr.py: 20 stairs of 100 iterations, then one move per epoch."""
    run = config.load("albef_4m")
    epoch = run.steps // 30
    assert run.steps == 30 * epoch

    def published(iteration: int) -> float:  # from 0
        number, within = divmod(iteration, epoch)
        if number == 0:
            return 1e-5 + (1e-4 - 1e-5) * min(within // 100, 20) / 20
        return 1e-5 + 0.5 * (1e-4 - 1e-5) * (1 + math.cos(math.pi * number / 30))

    iterations = {*range(0, 2100), epoch - 1, *(e * epoch + d for e in range(1, 30) for d in (-1, 0, 1, epoch - 1))}
    for iteration in sorted(iterations):
        assert optim.lr_at(iteration + 1, run.optim, run.steps) == pytest.approx(published(iteration)), iteration


def labels(**options: object) -> dict[str, str]:
    """Parameter name -> group name, for a tiny ALBEF."""
    model = albef_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = optim.groups(model.named_parameters(), replace(OptimConfig(weight_decay=0.1), **options))
    found = {names[id(parameter)]: group["name"] for group in made for parameter in group["params"]}
    assert sorted(found) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert sum(len(group["params"]) for group in made) == len(found)
    for group in made:
        assert group["weight_decay"] == (0.1 if group["name"].startswith("decay") else 0.0)
    return found


def test_vectors_and_biases_are_spared_and_tables_are_not() -> None:
    found = labels()
    sizes = {name: parameter.ndim for name, parameter in albef_model().named_parameters()}
    for name, label in found.items():
        spared = sizes[name] == 1 or name.endswith("bias")
        assert label == ("no_decay" if spared else "decay"), name
    assert {name for name in found if "temperature" in name} == {"family.temperature.value"}
    assert not any(name.startswith("twin.") for name in found)  # it never receives a gradient


def test_temperature_decays_where_asked() -> None:
    assert labels()["family.temperature.value"] == "no_decay"
    assert labels(decay_always=("temperature",))["family.temperature.value"] == "decay"
    changed = {name for name, label in labels(decay_always=("temperature",)).items() if labels()[name] != label}
    assert changed == {"family.temperature.value"}


def test_what_decays_can_be_named() -> None:
    found = labels(no_decay=("word",))
    assert {name for name, label in found.items() if label == "no_decay"} == {name for name in found if "word" in name}
    assert set(labels(no_decay=()).values()) == {"decay"}


def test_rates_by_part() -> None:
    model = albef_model()
    scale = {"image_encoder": 0.1, "objectives.mlm": 5.0}
    made = optim.groups(model.named_parameters(), OptimConfig(lr=2.0, scale=scale))
    by_name = {group["name"]: group for group in made}
    assert set(by_name) == {
        *("decay", "no_decay", "decay/image_encoder", "no_decay/image_encoder"),
        *("decay/objectives.mlm", "no_decay/objectives.mlm"),
    }
    assert by_name["decay/image_encoder"]["lr"] == pytest.approx(0.2)
    assert by_name["no_decay/objectives.mlm"]["scale"] == 5.0
    assert by_name["decay"]["lr"] == 2.0


def test_parts_for_sgd() -> None:
    sgd = SgdConfig(("image_encoder",), lr_scale=100.0, weight_decay=1e-4)
    scale = {"objectives": 0.5, "image_encoder.stack": 0.1}
    model = albef_model()
    made = optim.groups(model.named_parameters(), OptimConfig(lr=1e-4, weight_decay=0.01, scale=scale, sgd=sgd))
    by_name = {group["name"]: (group["rule"], group["weight_decay"], group["scale"]) for group in made}
    assert by_name == {
        "sgd": ("sgd", 1e-4, 100.0),
        "sgd/image_encoder.stack": ("sgd", 1e-4, pytest.approx(10.0)),
        "decay": ("adamw", 0.01, 1.0),
        "no_decay": ("adamw", 0.0, 1.0),
        "decay/objectives": ("adamw", 0.01, 0.5),
        "no_decay/objectives": ("adamw", 0.0, 0.5),
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in made:
        assert all(("image_encoder" in names[id(each)]) == (group["rule"] == "sgd") for each in group["params"])


def test_decay_of_biases_and_norms_alone() -> None:
    """What ViLBERT's first release did from pretrained weights (train_concap.py: the two decays are swapped)."""
    found = labels(no_decay=(".",), decay_always=("one_dimensional", "bias"))
    assert {name: label == "decay" for name, label in found.items()} == {
        name: label == "no_decay" for name, label in labels().items()
    }


def test_norms_that_decay_though_others_are_spared() -> None:
    """UNITER's list spares `LayerNorm.weight`, and so not `img_layer_norm` and `pos_layer_norm` (optim/misc.py)."""
    parameters = list(uniter.build(uniter.tiny()).named_parameters())
    names = {id(parameter): name for name, parameter in parameters}

    def decaying(config: OptimConfig) -> set[str]:
        made = optim.groups(parameters, config)
        return {names[id(each)] for group in made if group["name"] == "decay" for each in group["params"]}

    quirk = OptimConfig(decay_always=("projection_norm.weight", "place_norm.weight"))
    assert decaying(quirk) - decaying(OptimConfig()) == {
        "region_embeddings.projection_norm.weight",
        "region_embeddings.place_norm.weight",
    }


def test_a_part_for_sgd_that_is_nowhere() -> None:
    with pytest.raises(ConfigError, match=r"optim.sgd.parts: .* 'trnk'"):
        labels(sgd=SgdConfig(("trnk",)))


@pytest.mark.parametrize("option", ["scale", "decay_always", "no_decay"])
def test_a_part_that_is_nowhere(option: str) -> None:
    value: object = {"temprature": 0.1} if option == "scale" else ("bias", "temprature")
    with pytest.raises(ConfigError, match=f"optim.{option}: .* 'temprature'; did you mean 'temperature'"):
        labels(**{option: value})


def test_groups_keep_their_order() -> None:
    layers = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    names = {id(parameter): name for name, parameter in layers.named_parameters()}
    made = optim.groups(layers.named_parameters(), OptimConfig())
    ordered = [[names[id(parameter)] for parameter in group["params"]] for group in made]
    assert ordered == [["b.weight", "a.weight"], ["b.bias", "a.bias"]]
    assert isinstance(made[0]["params"][0], torch.Tensor)
