"""The small runs that are broken: six recipes, ZeRO 0 to 3, one or two ranks, all in a second or a few."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import yaml

from tests.shard_files import write_tar
from tests.test_recipes import shrunk
from vlscale import config
from vlscale.data.scenes import embedded

STEPS, EVERY, BATCH = 8, 3, 8
POISONED = (4,)  # steps whose gradient is not finite on the last rank, where a setting says so
RECIPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "albef": ("albef_tiny", ()),  # queue and twin
    "albef_sharded": (
        "albef_tiny",
        (
            *("objectives.itc.queue_store=sharded", "objectives.itc.queue_dtype=bf16"),
            *("momentum.drop_layers=0.5", "momentum.schedule=cosine"),
        ),
    ),
    "soho": ("soho_tiny", ()),  # dictionary, BatchNorm
    "uniter": ("uniter_tiny", ()),  # a task a step
    "milnce": ("milnce_tiny", ()),  # clips of pixels, frozen words, BatchNorm
    "hero": ("hero_tiny", ()),  # features of clips, sentences of several numbers
}
STAGES = {0: ("zero0", "fp32"), 1: ("zero1",), 2: ("zero2", "zero2_offload"), 3: ("zero3", "zero3_offload")}
SAMPLES = {"train": 128, "val": 8}
KINDS = ("pixels", "regions", "clips")


@dataclass(frozen=True)
class Setting:
    """A run, but for what goes wrong."""

    recipe: str
    ds: str  # of ds_configs
    ranks: int
    poisoned: bool

    def __str__(self) -> str:
        return f"{self.recipe}-{self.ds}-{self.ranks}" + ("-poisoned" if self.poisoned else "")


def draw(seed: int, recipes: Sequence[str], stages: Sequence[int], ranks: Sequence[int]) -> Setting:
    """The setting of a seed: each block of seeds goes once through all that were asked for."""
    grid = list(product(recipes, stages, ranks))
    block, place = divmod(seed, len(grid))
    random.Random(f"order {block}").shuffle(grid)
    recipe, stage, world = grid[place]
    rng = random.Random(f"setting {seed}")
    ways = STAGES[stage]
    return Setting(recipe, ways[-1] if rng.random() < 0.25 else ways[0], world, rng.random() < 0.15)


def write_recipes(folder: Path) -> None:
    """The recipes and their few samples, into `folder`."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for split, number in SAMPLES.items():
            train = split == "train"
            drawn = embedded.clip_samples(train) if kind == "clips" else embedded.samples(train, kind == "regions")
            numbered = enumerate(islice(drawn, number))
            members = [(f"{n:04d}.{field}", value) for n, fields in numbered for field, value in fields.items()]
            write_tar(folder / kind / f"{split}.tar", members)
    for name, (recipe, overrides) in RECIPES.items():
        run = shrunk(recipe)
        tree: dict[str, Any] = config.dump(run)
        inputs = run.family.inputs
        where = folder / ("clips" if inputs.frames else "regions" if inputs.regions else "pixels")
        tree["data"] |= {"train": str(where / "train.tar"), "val": str(where / "val.tar"), "batch": BATCH}
        if "dropout" in tree["family"]:
            tree["family"]["dropout"] = 0.1
        tree |= {"steps": STEPS}
        tree["checkpoint"]["every"] = EVERY
        tree["logging"] |= {"every": 1, "sample_keys": True}
        for override in overrides:
            config.apply_override(tree, override)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def command(setting: Setting, folder: Path, out: Path) -> list[str]:
    """The launcher's arguments; every step has two micro-batches."""
    return [
        *("launchers/pretrain.py", "--recipe", str(folder / f"{setting.recipe}.yaml")),
        *("--ds_config", f"ds_configs/{setting.ds}.json", "--out", str(out)),
        f"data.micro_batch={BATCH // 2 // setting.ranks}",
    ]
