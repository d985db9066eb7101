"""The DeepSpeed JSON: read strictly, and completed with what the recipe decides. It stays plain DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.errors import ConfigError, did_you_mean

# Top-level keys of a DeepSpeed configuration that make sense here; DeepSpeed itself ignores a mistyped one
KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "steps_per_print",
        "bf16",
        "fp16",
        "torch_autocast",
        "data_types",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "checkpoint",
        "wall_clock_breakdown",
        "comms_logger",
        "flops_profiler",
        "memory_breakdown",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "sparse_gradients",
        "dump_state",
        "aio",
        "compile",
        "compression_training",
        "disable_python_gc",
        "timers",
        "tensorboard",
        "wandb",
        "csv_monitor",
    }
)


COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
CHECKS = (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm"))  # of each step's gradients
SECTIONS = ("bf16", "fp16", "data_types", "zero_optimization", "checkpoint")


def load(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON file.

    Raises:
        ConfigError: it is missing, is not JSON, or has a top-level key that DeepSpeed would silently ignore.
    """
    file = Path(path)
    if not file.is_file():
        known = [str(each) for each in file.parent.glob("*.json")] if file.parent.is_dir() else []
        raise ConfigError(f"--ds_config {path}: no such file{did_you_mean(path, known)}")
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--ds_config {path} should hold one JSON object")
    for key in tree:
        if key in ("optimizer", "scheduler"):
            raise ConfigError(f"{path} sets '{key}'; the recipe decides that: move it to optim.* and delete it here")
        if key not in KEYS:
            raise ConfigError(f"{path}: '{key}' is not a DeepSpeed key{did_you_mean(key, KEYS)}")
    for key in SECTIONS:
        if not isinstance(tree.get(key, {}), dict):
            raise ConfigError(f'{path}: {key} should hold an object such as {{"enabled": true}} (got {tree[key]!r})')
    for section, key in CHECKS:
        if tree.get(section, {}).get(key) is False:
            reason = "gradients that are not finite would go into the weights"
            raise ConfigError(f"{path}: with {section}.{key} false {reason}; delete it there")
    for key in COUNTS:
        given = tree.get(key, "auto")
        if given != "auto" and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise ConfigError(f'{path}: {key} should be a whole number from 1, or "auto" (got {given!r})')
    given = tree.get("zero_optimization", {}).get("stage", 0)
    if given not in (0, 1, 2, 3) or isinstance(given, bool):
        raise ConfigError(f"{path}: zero_optimization.stage should be 0, 1, 2 or 3 (got {given!r})")
    return tree


@dataclass(frozen=True)
class Decided:
    """What the recipe says about things that a DeepSpeed file can also say."""

    recipe: str
    batch: int  # samples per optimizer step over all ranks
    micro_batch: int | None  # samples per rank and forward pass; None = the file's, else batch / ranks
    clip: float  # greatest global gradient norm, 0 = off


def merge(tree: Mapping[str, Any], path: str, decided: Decided, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration with what the recipe decides filled in (absent or `"auto"` = the recipe's).

    Raises:
        ConfigError: both places give the same thing different values (names both), or the batch does not divide.
    """
    micro = decided.micro_batch or _micro_batch(tree, decided.batch, world)
    accumulation = accumulation_steps(decided.batch, micro, world)
    values = {
        "train_micro_batch_size_per_gpu": (micro, "data.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "data.batch / (data.micro_batch * ranks)"),
        "train_batch_size": (decided.batch, "data.batch"),
        "gradient_clipping": (decided.clip, "optim.clip"),
    }
    merged = dict(tree)
    for key, (value, source) in values.items():
        given = merged.get(key, "auto")
        if given not in ("auto", value):
            raise ConfigError(
                f"{key} is {given} in {path}, but {source} of recipe '{decided.recipe}' makes it {value}; "
                f"delete it from the file, or change the recipe's value to agree"
            )
        merged[key] = value
    merged.setdefault("steps_per_print", 10**9)  # the monitor speaks, not DeepSpeed
    return merged


def accumulation_steps(batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches per rank and step; ConfigError unless the batch is a multiple of micro_batch * ranks."""
    if batch < 1 or micro_batch < 1:
        raise ConfigError(f"data.batch={batch} and data.micro_batch={micro_batch}: both should be at least 1")
    together = micro_batch * world
    if batch % together:
        below, above = batch // together * together, -(-batch // together) * together
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"data.batch={batch} is not a multiple of data.micro_batch={micro_batch} times {world} ranks; "
            f"write data.batch={near}, or another data.micro_batch"
        )
    return batch // together


def check_free(tree: Mapping[str, Any], path: str) -> None:
    """ConfigError if the file says how a step is cut, which `data.tokens` is to find."""
    for key in COUNTS[1:]:
        if tree.get(key, "auto") != "auto":
            raise ConfigError(f"{path} sets {key}, which data.tokens finds; delete it there, or leave out data.tokens")


def precision(tree: Mapping[str, Any]) -> str:
    """`bf16`, `fp16` or `fp32`, as the file says."""
    for name in ("bf16", "fp16"):
        if tree.get(name, {}).get("enabled"):
            return name
    return "fp32"


def stage(tree: Mapping[str, Any]) -> int:
    """The ZeRO stage that the file asks for, 0 to 3."""
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def for_device(tree: Mapping[str, Any], path: str, cuda: bool) -> dict[str, Any]:
    """The same configuration without what only a GPU has (pinned host memory, quantised weights).

    Raises:
        ConfigError: fp16 on a CPU; names the bf16 file.
    """
    if cuda:
        return dict(tree)
    if precision(tree) == "fp16":
        other = path.replace("_fp16", "")
        instead = f"use {other} (bf16)" if other != path else 'write "bf16": {"enabled": true} instead of fp16'
        raise ConfigError(f"{path} asks for fp16, which needs a GPU, and this machine shows none; {instead}")
    zero = dict(tree.get("zero_optimization", {}))
    for part in ("offload_optimizer", "offload_param"):
        if part in zero:
            zero[part] = {**zero[part], "pin_memory": False}
    zero.pop("zero_quantized_weights", None)  # its kernels exist for GPUs only
    return {**tree, "zero_optimization": zero}


def _micro_batch(tree: Mapping[str, Any], batch: int, world: int) -> int:
    given = tree.get("train_micro_batch_size_per_gpu", "auto")
    if given != "auto":
        return int(given)
    accumulation = tree.get("gradient_accumulation_steps", "auto")
    together = world * (1 if accumulation == "auto" else int(accumulation))
    if batch % together:
        raise ConfigError(
            f"data.batch={batch} does not divide over {together} micro-batches ({world} rank(s)); "
            f"write data.batch={-(-batch // together) * together}"
        )
    return batch // together
