"""The optimizer step in plain PyTorch, which everything that DeepSpeed does is held to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlscale import averages, optim, optimizers
from vlscale.engine import StepReport, TwinEngine
from vlscale.model import PretrainModel
from vlscale.saving import state
from vlscale.saving.pieces import Piece, Reader
from vlscale.saving.state import State
from vlscale.types import Batch, Moment, Pass


class LocalEngine(TwinEngine):
    """One process of plain PyTorch in fp32: the measure that every ZeRO stage is held to."""

    def __init__(
        self,
        model: PretrainModel,
        optim_config: optim.OptimConfig,
        device: torch.device,
        accumulation: int = 1,
    ) -> None:
        self.model = model.to(device)
        self.device = device
        self.dtype = torch.float32
        self._clip = optim_config.clip
        self._accumulation = accumulation
        self._optimizer = optimizers.build(model.named_parameters(), optim_config)
        self._spans = state.whole((each, each) for each in self.model.parameters() if each.requires_grad)
        self._averages = averages.whole(self._followed(), self._spans)
        self._state = State(self.model, self._spans, self._averages, lambda flat: self._optimizer)

    def forward(self, batch: Batch, at: Moment, phase: object | None = None) -> Pass:
        """See `Engine.forward`."""
        made: Pass = self.model(batch, at, phase)
        return made

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine.backward`."""
        torch.autograd.backward(loss / self._accumulation)

    def step(self, lr: float) -> StepReport:
        """See `Engine.step`."""
        own = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        for parameter in own:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in own])
        if not norm.isfinite():
            self._optimizer.zero_grad()
            return StepReport(math.nan, False, None)
        if self._clip > 0:
            nn.utils.clip_grads_with_norm_(own, self._clip, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepReport(float(norm), True, None)

    def pieces(self) -> list[Piece]:
        """See `Engine.pieces`."""
        return self._state.pieces(alike=True)

    def scalars(self) -> dict[str, Any]:
        """See `Engine.scalars`."""
        return {}

    def restore(self, reader: Reader, scalars: Mapping[str, Any]) -> None:
        """See `Engine.restore`."""
        self._state.restore(reader)
