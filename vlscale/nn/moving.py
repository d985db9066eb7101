"""Layers that keep running figures of what they see: noted in `forward`, moved after the step, alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlscale import distributed


class Moving(nn.Module):
    """A layer with running figures in its buffers.

    `forward` calls `note` and leaves the buffers as they are; `move`, after the step's last backward, adds up what
    all micro-batches and ranks noted and lets it in. A pass without gradient, or outside training, notes nothing,
    so a pass that is made twice in a step counts once.

    Floating buffers stay in fp32 whatever the network is turned into: an average in bf16 loses its small moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted: Tensor | None = None  # [n] fp32 sums of the step so far, on this rank

    def note(self, sums: Tensor) -> None:
        """Remember sums [n] fp32, without gradient, of one pass for the step's move."""
        if self.training and torch.is_grad_enabled():
            self.noted = sums.detach() if self.noted is None else self.noted + sums.detach()

    def moved(self, sums: Tensor) -> dict[str, Tensor]:
        """{buffer: its next value} after a step in which all passes on all ranks noted `sums` [n]."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


@torch.no_grad()
def move(module: nn.Module) -> None:
    """Move all layers of `module` that noted something; their sums cross ranks in one message.

    The same layers must have noted on every rank. What holds a number that is not finite moves nothing: an average
    would never get rid of it.
    """
    layers = _noting(module)
    noted = [layer.noted for layer in layers if layer.noted is not None]
    if not noted:
        return
    message = torch.cat(noted)
    distributed.sum_(message)
    for layer, sums in zip(layers, torch.split(message, [len(part) for part in noted]), strict=True):
        finite = sums.isfinite().all()
        for name, value in layer.moved(sums).items():
            buffer = layer.get_buffer(name)
            buffer.copy_(torch.where(finite, value, buffer))
        layer.noted = None


def forget(module: nn.Module) -> None:
    """Drop what the layers of `module` noted: the step was skipped."""
    for layer in _noting(module):
        layer.noted = None


def _noting(module: nn.Module) -> list[Moving]:
    return [layer for layer in module.modules() if isinstance(layer, Moving) and layer.noted is not None]
