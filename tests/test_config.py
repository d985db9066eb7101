"""Recipe, overrides, frozen dataclasses; and what a user reads when one of them is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlscale import config, options
from vlscale.config import RunConfig
from vlscale.errors import ConfigError

NAMES = sorted(path.stem for path in config.RECIPES.rglob("*.yaml"))


def load(*overrides: str) -> RunConfig:
    return config.load("quickstart", overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_survives_a_dump(name: str, tmp_path: Path) -> None:
    run = config.load(name)
    tree = config.dump(run)
    assert config.from_tree(tree.pop("recipe"), tree) == run
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.dump(run), sort_keys=False))
    assert config.load(str(file)) == run  # the recipe's own name included


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_states_what_decides_its_figures(name: str) -> None:
    tree = config.read_yaml(config.RECIPES / f"{name}.yaml")
    assert {"steps", "seed", "family", "objectives", "views", "data", "optim"} <= set(tree)
    assert {"train", "val", "batch"} <= set(tree["data"])
    assert {"lr", "warmup"} <= set(tree["optim"])


def test_the_keys_that_users_rely_on() -> None:
    tree = config.dump(load())
    paths = (
        "steps seed data.train data.val data.batch data.micro_batch data.workers optim.lr optim.warmup "
        "activation_checkpointing checkpoint.every checkpoint.keep evaluation.every logging.every "
        "logging.sample_keys family objectives views tasks"
    )
    for path in paths.split():
        node: Any = tree
        for key in path.split("."):
            assert key in node, path
            node = node[key]


def test_overrides_are_yaml() -> None:
    run = load(
        "data.batch=16",
        "data.micro_batch=4",
        "optim.lr=1e-4",
        "optim.betas=[0.8, 0.95]",
        "text.vocab=null",
        "logging.sample_keys=true",
        "views.text.masked.mask_tokens.prob=0.3",
        "tasks.words.objectives=[mlm]",
        "tasks.words.share=0.5",
        "data.train=[a-*.tar, b-*.tar]",
        "data.val=c-{000..003}.tar",
        "init.text=a=b",
    )
    assert (run.data.batch, run.data.micro_batch) == (16, 4)
    assert (run.optim.lr, run.optim.betas) == (1e-4, (0.8, 0.95))
    assert run.text.vocab is None
    assert run.logging.sample_keys is True
    assert run.views["text.masked"] == {"mask_tokens": {"prob": 0.3}}
    assert run.tasks["words"] == options.TaskConfig(objectives=("mlm",), share=0.5)
    assert run.data.train == ("a-*.tar", "b-*.tar")
    assert run.data.val == ("c-{000..003}.tar",)
    assert run.init.text == "a=b"


def test_a_string_serves_where_strings_are_asked() -> None:
    run = load("optim.no_decay=bias", "optim.decay_always=temperature", "tasks.words.objectives=mlm")
    assert run.optim.no_decay == ("bias",)
    assert run.optim.decay_always == ("temperature",)
    assert run.tasks["words"].objectives == ("mlm",)


def test_the_later_override_counts_and_the_recipe_file_stays() -> None:
    assert load("steps=3", "steps=4").steps == 4
    assert load().steps != 4


def test_a_run_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stepps=3", "'stepps' is not a key of a recipe; did you mean 'steps'?"),
        ("data.bacth=3", "data.bacth is not an option; did you mean 'batch'?"),
        ("optim.wamup=3", "optim.wamup is not an option; did you mean 'warmup'?"),
        ("family.hiden=3", "family.hiden is not an option; did you mean 'hidden'?"),
        ("objectives.mlm.wieght=2", "objectives.mlm.wieght is not an option; did you mean 'weight'?"),
        ("objectives.mln.weight=2", "no objective 'mln'; did you mean 'mlm'?"),
        ("tasks.words.shrae=2", "tasks.words.shrae is not an option; did you mean 'share'?"),
        ("family.name=albeff", "no family 'albeff'; did you mean 'albef'?"),
        ("family.name=[albef]", "no family '['albef']'"),
        ("checkpoint.evry=2", "checkpoint.evry is not an option; did you mean 'every'?"),
        ("7=2", "'7' is not a key of a recipe"),
        ("tasks.words.share=2", "tasks.words.objectives is missing; write tasks.words.objectives=..."),
        (
            "tasks.words.objectives=[mlm, itx]",
            "tasks.words.objectives: 'itx' is not under objectives; did you mean 'it",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(override: str, says: str) -> None:
    assert says in refusal(override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps=many", "steps: should be a valid integer"),
        ("steps=null", "steps: should be a valid integer"),
        ("steps=1.5", "steps: should be a valid integer"),
        ("steps=true", "steps: should be a number (got true)"),
        ("optim.lr=yes", "optim.lr: should be a number (got true)"),
        ("optim.warmup_stair=0", "optim.warmup_stair should be at least 1 (got 0)"),
        ("evaluation.every=-1", "evaluation.every should be at least 0 (got -1)"),
        ("optim.lr=.nan", "optim.lr should be at least 0 (got nan)"),
        ("tasks.words={objectives: mlm, share: 0}", "tasks.words.share should be above 0 (got 0.0)"),
        ("tasks.words={objectives: []}", "tasks.words.objectives is empty; name at least one of itc, itm, mlm"),
        ("data.batch=wide", "data.batch: should be a valid integer"),
        ("data.batch=0", "data.batch should be at least 1 (got 0)"),
        ("data.micro_batch=0", "data.micro_batch should be at least 1 (got 0)"),
        ("seed=-1", "seed should be at least 0 (got -1)"),
        ("logging.sample_keys=perhaps", "logging.sample_keys: should be a valid boolean"),
        ("optim.lr=fast", "optim.lr: should be a valid number"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.schedule=steps", "optim.schedule: should be 'constant', 'linear', 'cosine' or 'step' (got 'steps')"),
        ("optim.scale=3", "optim.scale"),
        ("optim=3", "optim should hold 'key: value' pairs (got 3)"),
        ("family=albef", "family should hold 'key: value' pairs (got 'albef')"),
        ("objectives=mlm", "objectives should hold 'key: value' pairs (got 'mlm')"),
        ("objectives={}", "objectives is empty; name at least one"),
        ("views=3", "views should hold 'key: value' pairs (got 3)"),
        ("family.hidden.size=3", "family.hidden is a value, so family.hidden.size cannot be set"),
        ("data.batch", "'data.batch' is not an override; write key.path=value, e.g. data.batch=64"),
        ("=3", "'=3' is not an override"),
        ("data..batch=3", "data. is not an option"),
        ("activation_checkpointing=7", "activation_checkpointing: should be a valid string"),
    ],
)
def test_a_wrong_value_is_answered_with_its_key(override: str, says: str) -> None:
    assert says in refusal(override)


def test_unknown_recipes() -> None:
    with pytest.raises(ConfigError, match="no recipe 'quikstart'; did you mean 'quickstart'"):
        config.load("quikstart")
    with pytest.raises(
        ConfigError, match=r"--recipe a/b.yaml: no such file; give a file, or one of albef_14m, albef_4m,"
    ):
        config.load("a/b.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"steps: [", "mine.yaml cannot be read as YAML"),
        (b"\xff", "mine.yaml cannot be read as YAML"),
        (b"- steps", "mine.yaml should hold 'key: value' lines (got list)"),
        (b"", "mine.yaml should hold 'key: value' lines (got NoneType)"),
        (b"steps: 3", "recipe 'mine' has no 'family'; every recipe states it"),
        (b"{family: {}, objectives: {mlm: {}}, steps: 3}", "family.name is missing; write e.g. family.name=albef"),
    ],
)
def test_recipe_files_that_are_none(text: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        config.load(str(file))
    assert says in str(caught.value)
