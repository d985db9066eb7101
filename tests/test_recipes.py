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

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
STEPS = 2


def shrunk(name: str) -> RunConfig:
    """The recipe with a miniature family, short queues, and the embedded data set."""
    tree: dict[str, Any] = config.read_yaml(RECIPES / f"{name}.yaml")
    family = config.pick("families", tree["family"]["name"]).tiny()
    tree["family"] = {"name": tree["family"]["name"], **asdict(family)}
    for options in tree["objectives"].values():
        if options.get("queue"):
            options["queue"] = 24
    tree["data"] = {"train": "embedded", "val": "embedded", "batch": 8, "workers": 0}
    tree |= {"steps": STEPS, "text": {}, "init": {}, "checkpoint": {"every": STEPS}}
    tree |= {"evaluation": {"every": 0, "limit": 8}, "logging": {"every": 1, "tensorboard": False}}
    return config.from_tree(name, tree)


def train_here(ds_path: str, name: str, out: str) -> int:
    from vlscale import train
    from vlscale.build import Request

    return train.train(Request(shrunk(name), ds_path, Path(out)))


def trains(name: str, stage: str, out: Path) -> None:
    codes = run_ranks(train_here, 2, f"ds_configs/{stage}.json", name, str(out), timeout=200)
    assert codes == [0, 0]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert all(0 < loss < 100 for loss in losses)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str, tmp_path: Path) -> None:
    trains(name, "zero2", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero3"])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_at_every_stage(name: str, stage: str, tmp_path: Path) -> None:
    trains(name, stage, tmp_path / "run")


@pytest.mark.parametrize("name", NAMES)
def test_its_own_size_builds(name: str) -> None:
    run = config.load(name)
    with torch.device("meta"):
        family = config.pick("families", run.family_name).build(run.family)
    assert sum(parameter.numel() for parameter in family.parameters()) > 1e6
    views = set(run.views)
    model = build.build_model(shrunk(name))
    assert model.views() <= views
