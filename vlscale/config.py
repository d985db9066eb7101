"""Recipe YAML, then dotted overrides, then strict frozen dataclasses.

A recipe says what is trained (`RunConfig`); `--ds_config` says how the work is spread (ds_config.py).
The folder is the registry: `family.name` and the keys of `objectives` are module names, and each module's
`Config` says which options it takes.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from vlscale.data.options import DataConfig
from vlscale.errors import ConfigError, did_you_mean
from vlscale.optim import OptimConfig
from vlscale.options import (
    CheckpointConfig,
    EvaluationConfig,
    InitConfig,
    LoggingConfig,
    MomentumConfig,
    NonFiniteConfig,
    SpikeConfig,
    TaskConfig,
    TextConfig,
    WatchdogConfig,
)

HERE = Path(__file__).parent
RECIPES = HERE / "recipes"


@dataclass(frozen=True)
class RunConfig:
    """One run, whole. `family` and the values of `objectives` are the `Config` of their own modules."""

    recipe: str
    family_name: str
    family: Any
    objectives: Mapping[str, Any]
    steps: int
    seed: int = 0
    views: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    init: InitConfig = field(default_factory=InitConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    non_finite: NonFiniteConfig = field(default_factory=NonFiniteConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    activation_checkpointing: str = "none"


SECTIONS = {
    "text": TextConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "momentum": MomentumConfig,
    "init": InitConfig,
    "checkpoint": CheckpointConfig,
    "non_finite": NonFiniteConfig,
    "spikes": SpikeConfig,
    "evaluation": EvaluationConfig,
    "logging": LoggingConfig,
    "watchdog": WatchdogConfig,
}
PLAIN = {"steps": int, "seed": int, "activation_checkpointing": str}
AT_LEAST_1 = (
    "steps",
    "data.batch",
    "data.micro_batch",
    "data.window",
    "data.max_pixels",
    "text.max_words",
    "optim.warmup_stair",
    "optim.stair",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.failures",
    "non_finite.budget",
    "non_finite.window",
    "spikes.window",
    "evaluation.limit",
    "logging.every",
)
AT_LEAST_0 = (
    "seed",
    "data.workers",
    "data.bad_budget",
    "data.bad_always",
    "optim.lr",
    "optim.warmup",
    "optim.clip",
    "spikes.budget",
    "checkpoint.keep_every",
    "evaluation.every",
    "watchdog.start",
    "watchdog.step",
)
KEYS = (*PLAIN, *SECTIONS, "family", "objectives", "views", "tasks")


def load(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a recipe (name or file) and `key.path=value` overrides describe.

    Raises:
        ConfigError: no such recipe, an unknown key, a value of the wrong type; the sentence names the key.
    """
    path = find_recipe(recipe)
    tree = read_yaml(path)
    if isinstance(tree.get("data"), dict):
        tree["data"].pop("pipe", None)  # leave to run commands is given on the command line, never by a file
    for override in overrides:
        apply_override(tree, override)
    return from_tree(tree.pop("recipe", path.stem), tree)  # a dumped configuration remembers which recipe it was


def from_tree(recipe: str, tree: Mapping[str, Any]) -> RunConfig:
    """Check a plain tree of values and freeze it."""
    for key in tree:
        if key not in KEYS:
            raise ConfigError(f"'{key}' is not a key of a recipe{did_you_mean(key, KEYS)}")
    for key in ("family", "objectives", "steps"):
        if key not in tree:
            raise ConfigError(f"recipe '{recipe}' has no '{key}'; every recipe states it")
    family_name, family = family_of(tree["family"])
    values: dict[str, Any] = {key: _value(key, kind, tree[key]) for key, kind in PLAIN.items() if key in tree}
    values |= {key: build(kind, tree[key], key) for key, kind in SECTIONS.items() if key in tree}
    run = RunConfig(
        recipe=recipe,
        family_name=family_name,
        family=family,
        objectives=_objectives(tree["objectives"]),
        views=_mapping(tree.get("views") or {}, "views"),
        tasks=_tasks(tree.get("tasks") or {}),
        **values,
    )
    _check(run)
    return run


def dump(run: RunConfig) -> dict[str, Any]:
    """The plain tree that `from_tree` reads back to an equal run."""
    tree: dict[str, Any] = {"recipe": run.recipe, "family": {"name": run.family_name, **_plain(run.family)}}
    tree["objectives"] = {name: _plain(config) for name, config in run.objectives.items()}
    for key in ("views", "tasks", *SECTIONS, *PLAIN):
        tree[key] = _plain(getattr(run, key))
    return tree


def flat(run: RunConfig) -> dict[str, str]:
    """{dotted key: value as text} of `dump`."""

    def leaves(tree: Mapping[str, Any], prefix: str) -> dict[str, str]:
        out: dict[str, str] = {}
        for key, value in tree.items():
            nested = isinstance(value, Mapping) and value
            out |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
        return out

    return leaves(dump(run), "")


def pick(folder: str, name: str) -> types.ModuleType:
    """The module `vlscale/<folder>/<name>.py`; the folder is the registry.

    Raises:
        ConfigError: there is no such file; names the nearest.
    """
    known = [path.stem for path in (HERE / folder).glob("*.py") if path.stem not in ("__init__", "base")]
    if name not in known:
        kind = {"families": "family", "objectives": "objective", "evaluation": "task"}.get(folder, folder)
        raise ConfigError(f"no {kind} '{name}'{did_you_mean(str(name), known)}")
    return importlib.import_module(f"vlscale.{folder}.{name}")


# --- reading -----------------------------------------------------------------------------------------------


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given by name or path."""
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"--recipe {recipe}: no such file; give a file, or one of {_recipe_names()}")
        return path
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise ConfigError(f"no recipe '{recipe}'{did_you_mean(recipe, [each.stem for each in RECIPES.glob('*.yaml')])}")
    return path


def _recipe_names() -> str:
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} should hold 'key: value' lines (got {type(tree).__name__})")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` (value parsed as YAML) in a tree, in place."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"'{override}' is not an override; write key.path=value, e.g. data.batch=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    keys = _split(path, tree)
    node = tree
    for depth, key in enumerate(keys[:-1]):
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(keys[: depth + 1])} is a value, so {path} cannot be set")
        node = child
    node[keys[-1]] = value


def _split(path: str, tree: Mapping[str, Any]) -> list[str]:
    keys = path.split(".")
    if keys[0] == "views" and len(keys) > 2:  # the key of a view holds a dot itself: text.masked
        keys = [keys[0], ".".join(keys[1:3]), *keys[3:]]
    return keys


# --- checking ----------------------------------------------------------------------------------------------


def build(kind: type, tree: Any, where: str) -> Any:
    """A frozen dataclass from plain values; unknown keys and wrong types name their dotted path."""
    tree = _mapping(tree, where)
    hints = typing.get_type_hints(kind)
    names = [each.name for each in fields(kind)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            raise ConfigError(f"{where}.{key} is not an option{did_you_mean(str(key), names)}")
        values[key] = _value(f"{where}.{key}", hints[key], value)
    for each in fields(kind):
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and each.name not in values:
            raise ConfigError(f"{where}.{each.name} is missing; write {where}.{each.name}=...")
    return kind(**values)


def _value(where: str, hint: Any, value: Any) -> Any:
    nested = [part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and is_dataclass(part)]
    if nested and isinstance(value, Mapping):
        return build(nested[0], value, where)
    if _takes_strings(hint) and isinstance(value, str):
        value = (value,)
    if isinstance(value, bool) and hint in (int, float, int | None, float | None):
        raise ConfigError(f"{where}: should be a number (got {str(value).lower()})")  # pydantic would take 1 or 0
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{where}: {message.replace('input ', '')} (got {value!r})") from None


def _takes_strings(hint: Any) -> bool:
    return any(part == tuple[str, ...] for part in (hint, *typing.get_args(hint)))


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where} should hold 'key: value' pairs (got {tree!r})")
    return dict(tree)


def family_of(tree: Any) -> tuple[str, Any]:
    """(name, its `Config`) from the `family` part of a recipe."""
    tree = _mapping(tree, "family")
    if "name" not in tree:
        raise ConfigError("family.name is missing; write e.g. family.name=albef")
    return (name := tree.pop("name")), build(pick("families", name).Config, tree, "family")


def _objectives(tree: Any) -> dict[str, Any]:
    tree = _mapping(tree, "objectives")
    if not tree:
        raise ConfigError("objectives is empty; name at least one, e.g. objectives: {mlm: {}}")
    return {name: build(pick("objectives", name).Config, value, f"objectives.{name}") for name, value in tree.items()}


def _tasks(tree: Any) -> dict[str, TaskConfig]:
    return {name: build(TaskConfig, value, f"tasks.{name}") for name, value in _mapping(tree, "tasks").items()}


def _check(run: RunConfig) -> None:
    for key in AT_LEAST_1:
        _at_least(1, run, key)
    for key in AT_LEAST_0:
        _at_least(0, run, key)
    for key in ("coefficient", "drop_layers"):
        share = getattr(run.momentum, key)
        if not 0 <= share <= 1:
            raise ConfigError(f"momentum.{key} should be between 0 and 1 (got {share})")
    for name, task in run.tasks.items():
        if not task.share > 0:
            raise ConfigError(f"tasks.{name}.share should be above 0 (got {task.share}); leave the task out instead")
        if not task.objectives:
            raise ConfigError(f"tasks.{name}.objectives is empty; name at least one of {', '.join(run.objectives)}")
        for objective in task.objectives:
            if objective not in run.objectives:
                known = did_you_mean(objective, run.objectives)
                raise ConfigError(f"tasks.{name}.objectives: '{objective}' is not under objectives{known}")


def _at_least(least: int, run: RunConfig, key: str) -> None:
    section, _, name = key.rpartition(".")
    value = getattr(getattr(run, section) if section else run, name)
    if value is not None and not value >= least:
        raise ConfigError(f"{key} should be at least {least} (got {value})")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
