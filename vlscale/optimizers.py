"""The optimizers behind `optim.name`: each parameter group moves by its own rule, also where ZeRO cuts parameters.

| rule | what it is |
|---|---|
| `adamw` | torch's AdamW: bias correction, decay before the step |
| `sgd` | torch's SGD with momentum, its decay added to the gradient; for `optim.sgd.parts` |
"""

from __future__ import annotations

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


RULES: Mapping[str, Callable[[Move], None]] = {"adamw": _adamw, "sgd": _sgd}
