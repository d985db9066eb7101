"""Adam as BERT's released code has it (Devlin et al. 2019, optimization.py), which LXMERT and ViLBERT train with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class BertAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) without bias correction, its decay inside the step: the learning rate scales both.

        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - lr (m / (sqrt(v) + eps) + decay p)

    Step t is (1 - b1^t) / sqrt(1 - b2^t) times Adam's: 6.5 times in step 10 with the default betas, which the
    published warm-up from 0 (`triangle`) makes up for.

    Args:
        params: parameters, or groups with an `lr`, `weight_decay` or `clip_each` of their own.
        lr: learning rate; whoever steps sets each group's "lr" to follow a schedule.
        betas: (b1, b2).
        eps: added to the root.
        weight_decay: also of biases and LayerNorms, unless a group says otherwise.
        clip_each: greatest L2 norm of each parameter's gradient on its own, 0 = no clipping. ViLBERT: 1. LXMERT
            clips the norm over all parameters, before the step. Under ZeRO an optimizer is handed flat parts of
            many parameters, whose norms are not those.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        clip_each: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("clip_each", clip_each)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it cannot be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; each lies in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_each": clip_each}
        super().__init__(params, defaults)

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
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moved:
                self._move(moved, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        if group["clip_each"] > 0:
            gradients = _clipped(gradients, group["clip_each"])
        first, second = group["betas"]
        torch._foreach_mul_(means, first)
        torch._foreach_add_(means, gradients, alpha=1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(means, roots)
        if group["weight_decay"] > 0:
            torch._foreach_add_(steps, parameters, alpha=group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-group["lr"])


def _clipped(gradients: list[Tensor], greatest: float) -> list[Tensor]:
    """Each scaled to at most this norm, as torch's clip_grad_norm_ would alone (1e-6 beside the norm)."""
    norms = torch._foreach_norm(gradients)
    return [each * (greatest / (norm + 1e-6)).clamp(max=1.0) for each, norm in zip(gradients, norms, strict=True)]


def triangle(step: int, steps: int, warmup: float) -> float:
    """The factor on the learning rate in optimizer step `step` (from 1) of `steps`: up from 0, then down to 0.

    With x = (step - 1) / steps it is x / warmup up to the share `warmup` of the run, then (1 - x) / (1 - warmup)
    (`warmup_linear` of the authors). The first step's factor is 0: it fills the moments and moves nothing.
    """
    done = (step - 1) / steps
    if done < warmup:
        return done / warmup
    return max((1 - done) / (1 - warmup), 0.0) if warmup < 1 else 0.0
