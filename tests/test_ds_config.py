"""The DeepSpeed files: plain DeepSpeed, completed by the recipe, refused where both say different things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlscale import ds_config
from vlscale.errors import ConfigError

FILES = Path(__file__).parent.parent / "ds_configs"
NAMES = sorted(path.name for path in FILES.glob("*.json"))
EXPECTED = {
    "fp32.json": (0, "fp32"),
    "zero0.json": (0, "bf16"),
    "zero1.json": (1, "bf16"),
    "zero2.json": (2, "bf16"),
    "zero2_fp16.json": (2, "fp16"),
    "zero2_offload.json": (2, "bf16"),
    "zero3.json": (3, "bf16"),
    "zero3_fp16.json": (3, "fp16"),
    "zero3_offload.json": (3, "bf16"),
    "zeropp.json": (3, "bf16"),
}


def decided(batch: int = 64, micro_batch: int | None = None, clip: float = 1.0) -> ds_config.Decided:
    return ds_config.Decided("mine", batch, micro_batch, clip)


def merged(tree: dict[str, Any], world: int = 1, **recipe: Any) -> dict[str, Any]:
    return ds_config.merge(tree, "mine.json", decided(**recipe), world)


def load(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "mine.json"
    path.write_text(text)
    return ds_config.load(str(path))


def test_all_files_are_here() -> None:
    assert set(EXPECTED) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_plain_deepspeed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    tree = ds_config.load(str(FILES / name))
    if name in EXPECTED:
        assert (ds_config.stage(tree), ds_config.precision(tree)) == EXPECTED[name]
    whole = ds_config.merge(tree, name, decided(), world=1)
    theirs = DeepSpeedConfig(dict(whole))
    assert theirs.train_batch_size == 64
    assert theirs.train_micro_batch_size_per_gpu == 64
    assert theirs.gradient_accumulation_steps == 1
    assert theirs.gradient_clipping == 1.0
    assert theirs.zero_optimization_stage == ds_config.stage(tree)
    assert theirs.zero_allow_untested_optimizer is True
    known = theirs.zero_config.model_dump(by_alias=True)
    for key, value in tree.get("zero_optimization", {}).items():
        if not isinstance(value, dict):
            assert known[key] == value, key


@pytest.mark.parametrize("name", [name for name in NAMES if "fp16" not in name])
def test_a_cpu_gets_the_file_without_what_only_a_gpu_has(name: str) -> None:
    tree = ds_config.load(str(FILES / name))
    before = json.dumps(tree)
    zero = ds_config.for_device(tree, name, cuda=False)["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        assert zero.get(part, {}).get("pin_memory", False) is False
    assert "zero_quantized_weights" not in zero
    assert zero["stage"] == tree["zero_optimization"]["stage"]
    assert json.dumps(tree) == before
    assert ds_config.for_device(tree, name, cuda=True) == tree


@pytest.mark.parametrize(("name", "instead"), [("zero2_fp16.json", "zero2.json"), ("zero3_fp16.json", "zero3.json")])
def test_fp16_on_a_cpu_names_the_bf16_file(name: str, instead: str) -> None:
    path = f"ds_configs/{name}"
    with pytest.raises(ConfigError) as caught:
        ds_config.for_device(ds_config.load(str(FILES / name)), path, cuda=False)
    assert caught.value.exit_code == 2
    assert f"use ds_configs/{instead} (bf16)" in str(caught.value)
    assert (FILES / instead).is_file()


def test_an_fp16_file_of_ones_own_is_told_what_to_write() -> None:
    with pytest.raises(ConfigError) as caught:
        ds_config.for_device({"fp16": {"enabled": True}}, "my.json", cuda=False)
    assert str(caught.value).endswith('write "bf16": {"enabled": true} instead of fp16')


@pytest.mark.parametrize(
    ("given", "source", "value"),
    [
        ({"train_batch_size": 32}, "data.batch", 64),
        ({"train_micro_batch_size_per_gpu": 8}, "data.micro_batch", 16),
        ({"gradient_accumulation_steps": 2}, "data.batch / (data.micro_batch * ranks)", 4),
        ({"gradient_clipping": 0.5}, "optim.clip", 1.0),
    ],
)
def test_the_same_thing_given_twice(given: dict[str, Any], source: str, value: float) -> None:
    (key,) = given
    with pytest.raises(ConfigError) as caught:
        merged(given, micro_batch=16)
    says = str(caught.value)
    assert f"{key} is {given[key]} in mine.json" in says
    assert f"{source} of recipe 'mine' makes it {value}" in says
    assert merged({key: value}, micro_batch=16) == merged({}, micro_batch=16)
    assert merged({key: "auto"}, micro_batch=16) == merged({}, micro_batch=16)


def test_what_the_recipe_leaves_open_the_file_decides() -> None:
    whole = merged({"train_micro_batch_size_per_gpu": 8})
    assert whole["gradient_accumulation_steps"] == 8
    whole = merged({"gradient_accumulation_steps": 4}, world=2)
    assert whole["train_micro_batch_size_per_gpu"] == 8
    assert merged({"steps_per_print": 5})["steps_per_print"] == 5


@pytest.mark.parametrize(("world", "micro"), [(1, 64), (2, 32), (4, 16)])
def test_without_a_micro_batch_nothing_is_accumulated(world: int, micro: int) -> None:
    whole = merged({}, world=world)
    assert (whole["train_micro_batch_size_per_gpu"], whole["gradient_accumulation_steps"]) == (micro, 1)


@pytest.mark.parametrize(("micro", "world", "steps"), [(64, 1, 1), (16, 1, 4), (16, 2, 2), (4, 4, 4), (1, 64, 1)])
def test_accumulation_follows(micro: int, world: int, steps: int) -> None:
    assert ds_config.accumulation_steps(64, micro, world) == steps
    assert merged({}, world=world, micro_batch=micro)["gradient_accumulation_steps"] == steps


@pytest.mark.parametrize(
    ("batch", "micro", "world", "near"),
    [(64, 24, 1, "data.batch=48 or 72"), (64, 16, 3, "data.batch=48 or 96"), (8, 16, 1, "data.batch=16")],
)
def test_a_batch_that_does_not_divide(batch: int, micro: int, world: int, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        merged({}, world=world, batch=batch, micro_batch=micro)


def test_a_batch_that_does_not_divide_over_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"does not divide over 3 micro-batches \(3 rank\(s\)\); write data.batch=66"):
        merged({}, world=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"optimizer": {"type": "AdamW"}}', "sets 'optimizer'; the recipe decides that: move it to optim"),
        ('{"scheduler": {}}', "sets 'scheduler'; the recipe decides that"),
        ('{"zero_optimisation": {}}', "'zero_optimisation' is not a DeepSpeed key; did you mean 'zero_optimization'"),
        ('{"zero_optimization": {"stage": 4}}', r"zero_optimization.stage should be 0, 1, 2 or 3 \(got 4\)"),
        ('{"zero_optimization": 2}', "zero_optimization should hold an object"),
        ('{"bf16": true}', "bf16 should hold an object"),
        ('{"train_micro_batch_size_per_gpu": "many"}', "train_micro_batch_size_per_gpu should be a whole number"),
        ('{"gradient_accumulation_steps": 0}', "gradient_accumulation_steps should be a whole number"),
        ("[1]", "should hold one JSON object"),
        ("{", "is not JSON"),
        ('{"bf16": {"enabled": true, "check_grad_overflow": false}}', "with bf16.check_grad_overflow false gradients"),
        ('{"zero_optimization": {"compute_grad_norm": false}}', "zero_optimization.compute_grad_norm false gradients"),
    ],
)
def test_files_that_cannot_be_meant(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero22.json: no such file; did you mean '.*zero2.json'"):
        ds_config.load(str(FILES / "zero22.json"))
    with pytest.raises(ConfigError, match="no such file"):
        ds_config.load(str(tmp_path / "nowhere" / "a.json"))


def test_a_file_that_cuts_the_step_where_a_budget_of_tokens_does() -> None:
    ds_config.check_free({"train_batch_size": 8, "gradient_accumulation_steps": "auto"}, "ds.json")
    with pytest.raises(ConfigError, match=r"ds.json sets gradient_accumulation_steps, which data.tokens finds; delete"):
        ds_config.check_free({"gradient_accumulation_steps": 2}, "ds.json")
