"""Every recipe, shrunk to its family's miniature, trains on two ranks at each ZeRO stage; published sizes build."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from vlscale import build, config
from vlscale.config import RECIPES, RunConfig
from vlscale.data.scenes.regions import FEATURES, NUM_CLASSES
from vlscale.errors import VlscaleError

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
STEPS = 2


def shrunk(name: str) -> RunConfig:
    """The recipe with a miniature family, short queues, and the embedded data set."""
    tree: dict[str, Any] = config.read_yaml(RECIPES / f"{name}.yaml")
    family = asdict(config.pick("families", tree["family"]["name"]).tiny())
    if family.get("regions"):
        family |= {"feats": FEATURES, "classes": NUM_CLASSES}  # of the embedded data set
    tree["family"] = {"name": tree["family"]["name"], **family}
    for options in tree["objectives"].values():
        if options.get("queue"):
            options["queue"] = 24
    tree["data"] = {"train": "embedded", "val": "embedded", "batch": 8, "workers": 0}
    tree |= {"steps": STEPS, "text": {}, "init": {}, "checkpoint": {"every": STEPS}}
    tree |= {"evaluation": {"every": 0, "limit": 8}, "logging": {"every": 1, "tensorboard": False}}
    return config.from_tree(name, tree)


def train_all(stage: str, names: list[str], out: str) -> dict[str, str]:
    """{recipe: what went wrong} of training each in turn, in one process per rank, which spares its start."""
    from vlscale import train
    from vlscale.build import Request

    failures: dict[str, str] = {}
    for name in names:
        try:
            code = train.train(Request(shrunk(name), f"ds_configs/{stage}.json", Path(out) / name))
        except VlscaleError as error:
            failures[name] = str(error)
        else:
            failures |= {name: f"exit code {code}"} if code else {}
    return failures


def trains(stage: str, out: Path) -> None:
    assert run_ranks(train_all, 2, stage, NAMES, str(out), timeout=500) == [{}, {}]
    for name in NAMES:
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == STEPS, name
        assert all(0 < loss < 100 for loss in losses), name


def test_all_train(tmp_path: Path) -> None:
    trains("zero2", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_all_train_at_every_stage(stage: str, tmp_path: Path) -> None:
    trains(stage, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_its_own_size_builds(name: str) -> None:
    run = config.load(name)
    with torch.device("meta"):
        family = config.pick("families", run.family_name).build(run.family)
    assert sum(parameter.numel() for parameter in family.parameters()) > 1e5
    views = set(run.views)
    model = build.build_model(shrunk(name))
    assert model.views() <= views
