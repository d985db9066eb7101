"""What the optimizer is given: decay groups, learning rates per part, and schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from vlscale.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) and its schedule. Steps are optimizer steps, counted from 1."""

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.02
    no_decay: tuple[str, ...] = ("one_dimensional", "bias")  # also: any part of a parameter's name
    decay_always: tuple[str, ...] = ()  # parts of names that decay although `no_decay` would spare them
    clip: float = 0.0  # greatest global gradient norm; 0 = no clipping
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = 0  # steps from warmup_lr to lr
    warmup_lr: float = 0.0
    warmup_stair: int = 1  # the warm-up moves once per so many steps (ALBEF: 100)
    stair: int = 1  # after it the schedule moves once per so many steps (ALBEF: an epoch)
    decay_after_warmup: bool = True  # the decay starts where the warm-up ends; False = it runs from step 1
    final_lr: float = 0.0
    scale: Mapping[str, float] = field(default_factory=dict)  # part of a name -> factor on the learning rate


class Group(TypedDict):
    """One parameter group; `name` appears as `lr/<name>` in the metrics."""

    name: str
    params: list[Any]
    weight_decay: float
    lr: float
    scale: float


def lr_at(step: int, config: OptimConfig, steps: int) -> float:
    """The learning rate of optimizer step `step` (1 .. steps) before a group's own factor."""
    if step <= config.warmup:
        done = (step - 1) // config.warmup_stair * config.warmup_stair
        return config.warmup_lr + (config.lr - config.warmup_lr) * done / config.warmup
    start = config.warmup if config.decay_after_warmup else 0
    done = (step - 1 - start) // config.stair * config.stair
    progress = min(1.0, done / max(1, steps - start))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        return config.lr + (config.final_lr - config.lr) * progress
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress))


def groups(named_parameters: Iterable[tuple[str, Any]], config: OptimConfig) -> list[Group]:
    """Trainable parameters by decay and learning-rate factor, in a fixed order.

    A parameter is spared from decay if it is one-dimensional, a bias, or its name holds a part listed in
    `no_decay`; `decay_always` overrules. The first entry of `scale` that is part of the name sets the factor.

    Raises:
        ConfigError: an entry of `scale`, `no_decay` or `decay_always` matches no parameter.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    _check_parts("optim.scale", config.scale, trainable)
    _check_parts("optim.no_decay", set(config.no_decay) - {"one_dimensional", "bias"}, trainable)
    _check_parts("optim.decay_always", config.decay_always, trainable)
    out: dict[str, Group] = {}
    for name, parameter in trainable:
        decays = _decays(name, parameter.ndim, config)
        part = next((part for part in config.scale if part in name), None)
        label = ("decay" if decays else "no_decay") + (f"/{part}" if part else "")
        if label not in out:
            factor = config.scale[part] if part else 1.0
            decay = config.weight_decay if decays else 0.0
            out[label] = Group(name=label, params=[], weight_decay=decay, lr=config.lr * factor, scale=factor)
        out[label]["params"].append(parameter)
    return list(out.values())


def _decays(name: str, ndim: int, config: OptimConfig) -> bool:
    if any(part in name for part in config.decay_always):
        return True
    for part in config.no_decay:
        if part == "one_dimensional":
            if ndim == 1:
                return False
        elif part == "bias":
            if name.endswith("bias"):
                return False
        elif part in name:
            return False
    return True


def _check_parts(where: str, parts: Iterable[str], named: list[tuple[str, Any]]) -> None:
    for part in parts:
        if not any(part in name for name, _ in named):
            pieces = {piece for name, _ in named for piece in name.split(".")}
            raise ConfigError(f"{where}: no trainable parameter's name holds '{part}'{did_you_mean(part, pieces)}")
