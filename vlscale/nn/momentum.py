"""Arithmetic of momentum encoders and their soft targets; what moves when is decided elsewhere."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlscale.nn.transformer import Stack


@torch.no_grad()
def update(averages: Sequence[Tensor], sources: Sequence[Tensor], coefficient: float) -> None:
    """average <- coefficient * average + (1 - coefficient) * source, in place (He et al. 2020, equation 2).

    Both lists hold fp32 tensors of equal shapes: at coefficient 0.995 a bf16 average loses most of its moves.
    """
    if averages:
        torch._foreach_lerp_(list(averages), list(sources), 1.0 - coefficient)


def coefficient(step: int, base: float, schedule: Literal["constant", "cosine"], steps: int) -> float:
    """The momentum coefficient of optimizer step `step` (from 1) of `steps`.

    `constant` is `base`; `cosine` goes from `base` to 1 over the run (Grill et al. 2020, BYOL, section 3.2).

    Raises:
        ValueError: another schedule.
    """
    if schedule == "constant":
        return base
    if schedule == "cosine":
        done = min((step - 1) / max(steps, 1), 1.0)
        return 1.0 - (1.0 - base) * (math.cos(math.pi * done) + 1.0) / 2.0
    raise ValueError(f"no momentum schedule '{schedule}'; there is constant, cosine")


def softening(step: int, share: float, warmup: int) -> float:
    """The share of soft targets at optimizer step `step` (from 1): linear from 0 over `warmup` steps.

    ALBEF Pretrain.py: alpha * i / len(loader) in the first epoch, i from 0, then alpha.
    """
    return share * min(1.0, (step - 1) / warmup) if warmup > 0 else share


def drop_layers(model: nn.Module, probability: float, seed: int, step: int, every: int = 1) -> None:
    """Skip each layer of every `Stack` of `model` in this step, independently with `probability`.

    CVLP drops the layers of its key network with 0.5, so that the keys of one picture differ (arXiv
    2007.13135); its code skips each second layer at most, which is `every` 2. The draw depends on (seed, step) alone:
    every rank skips the same layers, as ZeRO 3 needs.
    """
    draw = random.Random(f"{seed} {step}")
    for module in model.modules():
        if isinstance(module, Stack):
            places = range(1, 1 + len(module.blocks))
            module.kept = tuple(place % every > 0 or draw.random() >= probability for place in places)
