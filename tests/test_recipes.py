"""Every recipe, shrunk to its family's miniature, trains on two ranks at each ZeRO stage; published sizes build."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.states import unlike
from vlscale import build, config
from vlscale.config import RECIPES, RunConfig
from vlscale.data.scenes import drawing, embedded, frames, moving
from vlscale.data.scenes.regions import FEATURES, NUM_CLASSES
from vlscale.errors import VlscaleError
from vlscale.saving.targets import step_name

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
FOR_A_LAPTOP = [name for name in NAMES if "_tiny" in name or name == "quickstart"]
STEPS = 2


def shrunk(name: str) -> RunConfig:
    """The recipe with a miniature family, short queues, and the embedded data set."""
    tree: dict[str, Any] = config.read_yaml(RECIPES / f"{name}.yaml")
    family = asdict(config.pick("families", tree["family"]["name"]).tiny())
    if family.get("regions"):
        family |= {"feats": FEATURES, "classes": NUM_CLASSES}  # of the embedded data set
    if family.get("frames"):
        clips = {"feats": frames.FEATURES, "streams": (frames.FEATURES,), "codes": frames.BRANCHES**frames.LEVELS}
        family |= {name: size for name, size in clips.items() if family.get(name)}
    tree["family"] = {"name": tree["family"]["name"], **family}
    for options in tree["objectives"].values():
        if options.get("queue"):
            options["queue"] = 24
    tree["data"] = {"train": "embedded", "val": "embedded", "batch": 8, "workers": 0}
    tree |= {"steps": STEPS, "text": {}, "init": {}, "checkpoint": {"every": 1}}
    tree |= {"evaluation": {"every": 0, "limit": 8}, "logging": {"every": 1, "tensorboard": False}}
    return config.from_tree(name, tree)


def train_all(stage: str, names: list[str], out: str, again: str = "") -> dict[str, str]:
    """{recipe: what went wrong} of training each in turn, in one process per rank, which spares its start.

    In `again` each goes on from its first step's checkpoint.
    """
    from vlscale import train
    from vlscale.build import Request

    failures: dict[str, str] = {}
    for name in names:
        try:
            run, ds, whole = shrunk(name), f"ds_configs/{stage}.json", Path(out) / name
            code = train.train(Request(run, ds, whole))
            if again and not code:
                code = train.train(Request(run, ds, Path(again) / name, str(whole / "checkpoints" / step_name(1))))
        except VlscaleError as error:
            failures[name] = str(error)
        else:
            failures |= {name: f"exit code {code}"} if code else {}
    return failures


def trains(stage: str, names: list[str], out: Path, again: str = "") -> None:
    assert run_ranks(train_all, 2, stage, names, str(out), again, timeout=900) == [{}, {}]
    for name in names:
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == STEPS, name
        assert all(0 < loss < 100 for loss in losses), name


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Embedded data sets of few samples, which are drawn and looked through in no time."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for drawn in (drawing, moving):
            patch.setattr(drawn, "NUM_TRAIN", 64)
            patch.setattr(drawn, "NUM_VAL", 16)
        for kind in ({}, {"regions": True}, {"clips": True}):
            embedded.ensure(cache, **kind)
        patch.setenv("VLSCALE_CACHE", str(cache))
        yield


def test_those_for_a_laptop_train(tmp_path: Path) -> None:
    trains("zero2", FOR_A_LAPTOP, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "names"), [("zero0", NAMES), ("zero2", NAMES), ("zero3", FOR_A_LAPTOP)])
def test_they_train_and_go_on_exactly(stage: str, names: list[str], tmp_path: Path) -> None:
    """Published recipes are their family's miniature here: at the slowest stage those for a laptop are enough."""
    again = tmp_path / "again"
    trains(stage, names, tmp_path / "whole", str(again))
    for name in names:
        whole, resumed = (
            Path(folder) / name / "checkpoints" / step_name(STEPS) for folder in (tmp_path / "whole", again)
        )
        assert unlike(resumed, whole) == [], name


@pytest.mark.parametrize("name", NAMES)
def test_its_own_size_builds(name: str) -> None:
    run = config.load(name)
    with torch.device("meta"):
        family = config.pick("families", run.family_name).build(run.family)
    assert sum(parameter.numel() for parameter in family.parameters()) > 1e5
    views = set(run.views)
    model = build.build_model(shrunk(name))
    assert model.views() <= views
