"""The optimizers behind `optim.name`: each parameter group moves by its own rule, also where ZeRO cuts parameters.

In step t, with m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2, and m' = m / (1 - b1^t), v' = v / (1 - b2^t):

- `adamw`, torch's (Loshchilov and Hutter 2019): p <- (1 - lr decay) p - lr m' / (sqrt(v') + eps)
- `adamw_transformers`, of the library of that name, which OSCAR, UNITER and SOHO train with: epsilon is added before
  the second moment's bias is corrected, and decay comes last: p <- p - lr m' sqrt(1 - b2^t) / (sqrt(v) + eps), then
  p <- (1 - lr decay) p
- `adam_bert`, of BERT's optimization.py, which LXMERT, ViLBERT and VLP train with: p <- p - lr (m / (sqrt(v) + eps) +
  decay p). No bias is corrected: step t is (1 - b1^t) / sqrt(1 - b2^t) times Adam's, 6.5 times in step 10 with the
  default betas, which the published warm-up from 0 makes up for
- `lamb` (You et al. 2020, algorithm 2, with phi(z) = z), for batches of many thousands: u = m' / (sqrt(v') + eps) +
  decay p, then p <- p - lr |p| / |u| u, with the norms of each parameter on its own. Where one of them is 0, and for
  parameters that are spared from decay (as in ALBERT's lamb_optimizer.py and TensorFlow Addons), the ratio is 1
- `sgd`, torch's, for `optim.sgd.parts`: b <- momentum b + g + decay p, p <- p - lr b; not in
  the first `cold_steps`, whose gradients count in the global norm alone

`optim.clip_each` scales each parameter's gradient down to that norm before any of them (1: ViLBERT and VLP, whose
BertAdam does it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.optim import OptimConfig, groups
from vlscale.saving.state import Span


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over `optim.groups`, at learning rate 0: whoever steps sets each group's "lr".

    Raises:
        ConfigError: see `optim.groups`.
    """
    made: list[Any] = [{**group, "lr": 0.0} for group in groups(named_parameters, config)]
    if config.name == "adamw" and config.sgd is None and config.clip_each == 0:
        return torch.optim.AdamW(made, betas=config.betas, eps=config.eps, fused=True)
    return ByGroup(made, config)


def check_offload(optimizer: torch.optim.Optimizer, ds: Mapping[str, Any]) -> None:
    """Whether DeepSpeed under the configuration `ds` steps all of the model by this optimizer.

    Raises:
        ConfigError: it leaves a share of it on the GPU, and moves that by an AdamW of its own; or sends some to NVMe,
            out of reach of twins and checkpoints.
    """
    for part in ("offload_optimizer", "offload_param"):
        if (ds.get("zero_optimization", {}).get(part) or {}).get("device") == "nvme":
            raise ConfigError(
                f"zero_optimization.{part} sends to NVMe what checkpoints are made of; "
                f'write "device": "cpu" in the ds_config'
            )
    ratio = (ds.get("zero_optimization", {}).get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio < 1 and isinstance(optimizer, ByGroup):
        raise ConfigError(
            f"zero_optimization.offload_optimizer.ratio is {ratio} in the ds_config, and what it leaves on the GPU "
            f'DeepSpeed moves by its own AdamW; write "ratio": 1.0, or optim.name=adamw without optim.sgd and '
            f"optim.clip_each"
        )


class Pieces:
    """Which parameters lie where in the flat tensors that ZeRO hands an optimizer.

    With no `spans` every tensor is one whole parameter, on every rank.

    Args:
        flats: the tensors.
        spans: of what lies in them on this rank.
        parameters: all of them, in the same order on all ranks.
        device: from which messages to other ranks go.
    """

    def __init__(
        self,
        flats: Sequence[Tensor] = (),
        spans: Sequence[Span] = (),
        parameters: Sequence[nn.Parameter] = (),
        device: torch.device | None = None,
    ) -> None:
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self._spans: dict[Tensor, list[Span]] = {flat: [] for flat in flats}
        for span in spans:
            self._spans[span.flat].append(span)
        self._device = device

    def of(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of parameters that `values`, of the shapes of `tensors`, hold on this rank: views."""
        if not self._spans:
            return list(values)
        pairs = zip(tensors, values, strict=True)
        return [span.of(value) for each, value in pairs for span in self._spans[each]]

    def norms(self, tensors: Sequence[Tensor], *several: Sequence[Tensor]) -> Tensor:
        """[len(several), pieces]: the L2 norm of the whole parameter, over all ranks, that each piece is of.

        All in ONE message; every rank calls it with the same tensors' parts.
        """
        pieces = [self.of(tensors, values) for values in several]
        if not self._spans:
            return torch.stack([torch.stack(list(torch._foreach_norm(each))) for each in pieces])
        numbers = [self._numbers[span.parameter] for each in tensors for span in self._spans[each]]
        squares = torch.zeros(len(several), len(self._numbers), device=tensors[0].device)
        for row, each in zip(squares, pieces, strict=True):
            if each:
                row[numbers] = torch.stack(list(torch._foreach_norm(each))).square()
        message = squares.to(self._device)
        distributed.sum_(message)
        return message.sqrt().to(squares.device)[:, numbers]

    def scale_(self, tensors: Sequence[Tensor], values: Sequence[Tensor], factors: Tensor) -> None:
        """Multiply each piece of `values` by its own of `factors` [pieces], in place."""
        for piece, factor in zip(self.of(tensors, values), factors.unbind(), strict=True):
            piece.mul_(factor)


class ByGroup(torch.optim.Optimizer):
    """Moves each parameter group by the rule that its "rule" names.

    Whoever lets it step flat parts of parameters sets `pieces`.

    Args:
        parameter_groups: of `optim.groups`.
        config: what all groups share.
    """

    def __init__(self, parameter_groups: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        shared = {"betas": config.betas, "eps": config.eps, "clip_each": config.clip_each}
        own = {"momentum": config.sgd.momentum, "cold_steps": config.sgd.cold_steps} if config.sgd else {}
        super().__init__(parameter_groups, {**shared, **own})
        self.pieces = Pieces()

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
                if group["clip_each"] > 0:
                    gradients = _clipped(gradients, parameters, group["clip_each"], self.pieces)
                states = [self.state[parameter] for parameter in parameters]
                RULES[group["rule"]](Move(parameters, gradients, states, group, self.pieces))
        return loss


@dataclass(frozen=True)
class Move:
    """What a rule is given: some parameters, and what belongs to each."""

    parameters: list[Tensor]
    gradients: list[Tensor]  # of their shapes
    states: list[dict[str, Any]]  # what is kept from step to step
    options: Mapping[str, Any]  # the group
    pieces: Pieces

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


def _clipped(gradients: list[Tensor], parameters: list[Tensor], greatest: float, pieces: Pieces) -> list[Tensor]:
    """Each parameter's gradient as torch's clip_grad_norm_ would scale it alone (1e-6 beside the norm)."""
    (norms,) = pieces.norms(parameters, gradients)
    clipped = [gradient.clone() for gradient in gradients]
    pieces.scale_(parameters, clipped, (greatest / (norms + 1e-6)).clamp(max=1.0))
    return clipped


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
    counts = _count(move)
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


def _lamb(move: Move) -> None:
    means, squares = _moments(move)
    first, second = move.options["betas"]
    counts = _count(move)
    unbiased = torch._foreach_div(squares, [1 - second**count for count in counts])
    updates = torch._foreach_div(means, _roots(unbiased, move.options["eps"]))
    torch._foreach_div_(updates, [1 - first**count for count in counts])
    if move.options["weight_decay"] > 0:
        torch._foreach_add_(updates, move.parameters, alpha=move.options["weight_decay"])
    if move.options["adapts"]:
        held, asked = move.pieces.norms(move.parameters, move.parameters, updates)
        ratios = torch.where((held > 0) & (asked > 0), held / asked, 1.0)
        move.pieces.scale_(move.parameters, updates, ratios)
    torch._foreach_add_(move.parameters, updates, alpha=-move.options["lr"])


def _count(move: Move) -> list[float]:
    """The number of this step for each parameter, from 1."""
    torch._foreach_add_(move.steps(), 1)
    return [float(step) for step in move.steps()]


def _moments(move: Move) -> tuple[list[Tensor], list[Tensor]]:
    """Adam's running means of the gradient and of its square, with this step's."""
    means, squares = move.kept("exp_avg"), move.kept("exp_avg_sq")
    first, second = move.options["betas"]
    torch._foreach_lerp_(means, move.gradients, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, move.gradients, move.gradients, value=1 - second)
    return means, squares


def _roots(squares: list[Tensor] | tuple[Tensor, ...], eps: float) -> list[Tensor]:
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    return list(roots)


def _sgd(move: Move) -> None:
    momentum: list[Tensor | None] = [*move.kept("momentum_buffer")]
    if move.options["cold_steps"]:
        torch._foreach_add_(move.steps(), 1)
        if float(move.steps()[0]) <= move.options["cold_steps"]:
            return
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
    "lamb": _lamb,
    "sgd": _sgd,
}
MOMENTS: Mapping[str, int] = {rule: 1 if rule == "sgd" else 2 for rule in RULES}  # fp32 numbers kept for each weight
