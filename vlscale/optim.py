"""What the optimizer is given: decay groups, learning rates per part, and schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from vlscale.errors import ConfigError, did_you_mean

KEPT = (  # options that an optimizer's state holds; those of the schedule are read anew
    *("name", "sgd", "betas", "eps", "weight_decay", "no_decay", "decay_always", "clip", "clip_each", "scale"),
)
KINDS = frozenset({"one_dimensional", "bias"})  # of parameters, among the parts of names in `no_decay`


@dataclass(frozen=True)
class SgdConfig:
    """SGD with momentum for some parts of the model, beside another optimizer for the rest (SOHO's trunk)."""

    parts: tuple[str, ...]  # parts of parameters' names
    lr_scale: float = 1.0  # factor on `lr`, and so on its whole schedule
    momentum: float = 0.9
    weight_decay: float = 0.0  # added to the gradient, of biases and vectors too
    cold_steps: int = 0  # first updates in which these parts stay as they are (SOHO: ten epochs)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("optim.sgd.parts is empty; name parts of parameters, e.g. optim.sgd.parts=[trunk]")
        for key in ("lr_scale", "weight_decay", "cold_steps"):
            _not_negative(f"optim.sgd.{key}", getattr(self, key))
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.sgd.momentum should be from 0 and below 1 (got {self.momentum})")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer (see `vlscale.optimizers`) and its schedule. Steps are optimizer steps, counted from 1."""

    name: Literal["adamw", "adamw_transformers", "adam_bert", "lamb"] = "adamw"
    sgd: SgdConfig | None = None  # parts that move by SGD instead
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.02
    no_decay: tuple[str, ...] = ("one_dimensional", "bias")  # also: any part of a parameter's name
    decay_always: tuple[str, ...] = ()  # parts of names that decay although `no_decay` would spare them
    clip: float = 0.0  # greatest global gradient norm; 0 = no clipping
    clip_each: float = 0.0  # after that, greatest norm of each parameter's gradient; 0 = no clipping
    schedule: Literal["constant", "linear", "cosine", "step"] = "cosine"
    milestones: tuple[int, ...] = ()  # for `step`: after so many steps the rate is multiplied by decay_factor
    decay_factor: float = 0.1
    warmup: int = 0  # steps from warmup_lr to lr
    warmup_lr: float = 0.0
    warmup_start_factor: float = 0.0  # instead of warmup_lr: this share of lr
    warmup_stair: int = 1  # the warm-up moves once per so many steps (ALBEF: 100)
    stair: int = 1  # after it the schedule moves once per so many steps (ALBEF: an epoch)
    decay_after_warmup: bool = True  # the decay starts where the warm-up ends; False = it runs from step 1
    final_lr: float = 0.0
    scale: Mapping[str, float] = field(default_factory=dict)  # part of a name -> factor on the learning rate

    def __post_init__(self) -> None:
        for key in ("clip_each", "eps", "weight_decay", "decay_factor", "warmup_lr", "warmup_start_factor", "final_lr"):
            _not_negative(f"optim.{key}", getattr(self, key))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas should each be from 0 and below 1 (got {list(self.betas)})")
        if self.warmup_lr and self.warmup_start_factor:
            raise ConfigError(
                f"optim.warmup_lr is {self.warmup_lr} and optim.warmup_start_factor is {self.warmup_start_factor}, "
                f"but a warm-up starts in one place; write one of them"
            )
        if (self.schedule == "step") != bool(self.milestones):
            raise ConfigError(
                f"optim.schedule is {self.schedule} and optim.milestones is {list(self.milestones)}; "
                f"`step` needs milestones, e.g. optim.milestones=[5000,7000], and no other schedule has any"
            )
        for key, value, usual in (("stair", self.stair, 1), ("decay_after_warmup", self.decay_after_warmup, True)):
            if self.schedule in ("step", "constant") and value != usual:
                raise ConfigError(
                    f"optim.{key} is {value}, but optim.schedule={self.schedule} knows no such thing; "
                    f"leave it out, or write optim.schedule=linear or cosine"
                )


class Group(TypedDict):
    """One parameter group; `name` appears as `lr/<name>` in the metrics."""

    name: str
    rule: str  # an `optim.name`, or sgd
    params: list[Any]
    adapts: bool  # whether LAMB's ratio applies
    weight_decay: float
    lr: float
    scale: float


def lr_at(step: int, config: OptimConfig, steps: int) -> float:
    """The learning rate of optimizer step `step` (1 .. steps) before a group's own factor.

    A warm-up from 0 gives the first step rate 0, as the counters of BertAdam and of LXMERT's triangle do; `linear`
    with a warm-up is that triangle.
    """
    if step <= config.warmup:
        start_lr = config.warmup_lr or config.warmup_start_factor * config.lr
        done = (step - 1) // config.warmup_stair * config.warmup_stair
        return start_lr + (config.lr - start_lr) * done / config.warmup
    if config.schedule == "step":
        return config.lr * config.decay_factor ** sum(step > milestone for milestone in config.milestones)
    start = config.warmup if config.decay_after_warmup else 0
    done = (step - 1 - start) // config.stair * config.stair
    progress = min(1.0, done / max(1, steps - start))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        return config.lr + (config.final_lr - config.lr) * progress
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress))


def groups(named_parameters: Iterable[tuple[str, Any]], config: OptimConfig) -> list[Group]:
    """Trainable parameters by rule, decay and learning-rate factor, in a fixed order.

    A parameter is spared from decay if it is one-dimensional, a bias, or its name holds a part listed in
    `no_decay`; `decay_always`, which knows the same words, overrules. The first entry of `scale` that is part of the
    name sets the factor. `sgd.parts` go first: they know no exceptions from decay, and `sgd.lr_scale` comes on top.

    Raises:
        ConfigError: an entry of `scale`, `no_decay`, `decay_always` or `sgd.parts` matches no parameter.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    sgd = config.sgd
    _check_parts("optim.scale", config.scale, trainable)
    _check_parts("optim.no_decay", set(config.no_decay) - KINDS, trainable)
    _check_parts("optim.decay_always", set(config.decay_always) - KINDS, trainable)
    _check_parts("optim.sgd.parts", sgd.parts if sgd else (), trainable)
    out: dict[str, Group] = {}
    for name, parameter in trainable:
        part = next((part for part in config.scale if part in name), None)
        factor = config.scale[part] if part else 1.0
        # a parameter that ZeRO 3 has parted is flat and says under `ds_shape` what it was
        spared = not _decays(name, len(getattr(parameter, "ds_shape", parameter.shape)), config)
        if sgd and any(each in name for each in sgd.parts):
            label, rule, decay, factor = "sgd", "sgd", sgd.weight_decay, factor * sgd.lr_scale
        elif spared:
            label, rule, decay = "no_decay", config.name, 0.0
        else:
            label, rule, decay = "decay", config.name, config.weight_decay
        label += f"/{part}" if part else ""
        if label not in out:
            lr = config.lr * factor
            out[label] = Group(
                name=label, rule=rule, params=[], adapts=not spared, weight_decay=decay, lr=lr, scale=factor
            )
        out[label]["params"].append(parameter)
    return list(out.values())


def _decays(name: str, ndim: int, config: OptimConfig) -> bool:
    spared, always = (
        any(_is_of(name, ndim, part) for part in parts) for parts in (config.no_decay, config.decay_always)
    )
    return always or not spared


def _is_of(name: str, ndim: int, part: str) -> bool:
    if part == "one_dimensional":
        return ndim == 1
    return name.endswith("bias") if part == "bias" else part in name


def _not_negative(where: str, value: float) -> None:
    if not value >= 0:
        raise ConfigError(f"{where} should be at least 0 (got {value})")


def _check_parts(where: str, parts: Iterable[str], named: list[tuple[str, Any]]) -> None:
    for part in parts:
        if not any(part in name for name, _ in named):
            pieces = {piece for name, _ in named for piece in name.split(".")}
            raise ConfigError(f"{where}: no trainable parameter's name holds '{part}'{did_you_mean(part, pieces)}")
