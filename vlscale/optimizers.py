"""The optimizers behind `optim.name`: each parameter group moves by its own rule, also where ZeRO cuts parameters.

In step t, with m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2, and m' = m / (1 - b1^t), v' = v / (1 - b2^t):

- `adamw`, torch's (Loshchilov and Hutter 2019): p <- (1 - lr decay) p - lr m' / (sqrt(v') + eps)
- `adamw_transformers`, of the library of that name, which OSCAR, UNITER and SOHO train with: epsilon is added before
  the second moment's bias is corrected, and decay comes last: p <- p - lr m' sqrt(1 - b2^t) / (sqrt(v) + eps), then
  p <- (1 - lr decay) p
- `adam_bert`, of BERT's optimization.py, which LXMERT, ViLBERT and VLP train with: p <- p - lr (m / (sqrt(v) + eps) +
  decay p). No bias is corrected: step t is (1 - b1^t) / sqrt(1 - b2^t) times Adam's, 6.5 times in step 10 with the
  default betas, which the published warm-up from 0 makes up for
- `sgd`, torch's, for `optim.sgd.parts`: b <- momentum b + g + decay p, p <- p - lr b
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from vlscale.optim import OptimConfig, groups


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over `optim.groups`, at learning rate 0: whoever steps sets each group's "lr".

    Raises:
        ConfigError: see `optim.groups`.
    """
    made: list[Any] = [{**group, "lr": 0.0} for group in groups(named_parameters, config)]
    if config.name == "adamw" and config.sgd is None:
        return torch.optim.AdamW(made, betas=config.betas, eps=config.eps, fused=True)
    return ByGroup(made, config)


class ByGroup(torch.optim.Optimizer):
    """Moves each parameter group by the rule that its "rule" names.

    Args:
        parameter_groups: of `optim.groups`.
        config: what all groups share.
    """

    def __init__(self, parameter_groups: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        momentum = config.sgd.momentum if config.sgd else 0.0
        super().__init__(parameter_groups, {"betas": config.betas, "eps": config.eps, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; gradients stay as they are.

        Returns:
            What `closure`, called first with gradients on, returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                gradients = [parameter.grad for parameter in parameters]
                RULES[group["rule"]](Move(parameters, gradients, [self.state[each] for each in parameters], group))
        return loss


@dataclass(frozen=True)
class Move:
    """What a rule is given: some parameters, and what belongs to each."""

    parameters: list[Tensor]
    gradients: list[Tensor]  # of their shapes
    states: list[dict[str, Any]]  # what is kept from step to step
    options: Mapping[str, Any]  # the group

    def kept(self, name: str) -> list[Tensor]:
        """A tensor of each parameter's shape from its state, zeros at first."""
        for parameter, state in zip(self.parameters, self.states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return [state[name] for state in self.states]

    def steps(self) -> list[Tensor]:
        """How many steps each parameter has made before this one, a scalar on the host each, as torch keeps it."""
        for state in self.states:
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
        return [state["step"] for state in self.states]


def _adamw(move: Move) -> None:
    first, second = move.options["betas"]
    adamw(
        move.parameters,
        move.gradients,
        move.kept("exp_avg"),
        move.kept("exp_avg_sq"),
        [],
        move.steps(),
        foreach=True,
        amsgrad=False,
        beta1=first,
        beta2=second,
        lr=move.options["lr"],
        weight_decay=move.options["weight_decay"],
        eps=move.options["eps"],
        maximize=False,
    )


def _adamw_transformers(move: Move) -> None:
    means, squares, lr = *_moments(move), move.options["lr"]
    first, second = move.options["betas"]
    torch._foreach_add_(move.steps(), 1)
    counts = [float(step) for step in move.steps()]
    rates = [-lr * math.sqrt(1 - second**count) / (1 - first**count) for count in counts]
    torch._foreach_addcdiv_(move.parameters, means, _roots(squares, move.options["eps"]), rates)
    if move.options["weight_decay"] > 0:
        torch._foreach_mul_(move.parameters, 1 - lr * move.options["weight_decay"])


def _adam_bert(move: Move) -> None:
    means, squares = _moments(move)
    updates = torch._foreach_div(means, _roots(squares, move.options["eps"]))
    if move.options["weight_decay"] > 0:
        torch._foreach_add_(updates, move.parameters, alpha=move.options["weight_decay"])
    torch._foreach_add_(move.parameters, updates, alpha=-move.options["lr"])


def _moments(move: Move) -> tuple[list[Tensor], list[Tensor]]:
    """Adam's running means of the gradient and of its square, with this step's."""
    means, squares = move.kept("exp_avg"), move.kept("exp_avg_sq")
    first, second = move.options["betas"]
    torch._foreach_lerp_(means, move.gradients, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, move.gradients, move.gradients, value=1 - second)
    return means, squares


def _roots(squares: list[Tensor], eps: float) -> list[Tensor]:
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    return list(roots)


def _sgd(move: Move) -> None:
    momentum: list[Tensor | None] = [*move.kept("momentum_buffer")]
    sgd(
        move.parameters,
        move.gradients,
        momentum,
        foreach=True,
        weight_decay=move.options["weight_decay"],
        momentum=move.options["momentum"],
        lr=move.options["lr"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


RULES: Mapping[str, Callable[[Move], None]] = {
    "adamw": _adamw,
    "adamw_transformers": _adamw_transformers,
    "adam_bert": _adam_bert,
    "sgd": _sgd,
}
