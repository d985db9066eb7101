"""The learnable temperature that similarities are divided by."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """A positive scalar of shape [1], kept within `least` and `greatest`.

    A value outside the limits is used as the nearer limit, with the gradient of the value itself, so that it
    can come back; the engine also clamps the parameter after every step (`limits` of the objective that
    trains it), which is what ALBEF's authors do in place before every forward pass.
    """

    def __init__(self, start: float, least: float, greatest: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), start))
        self.least = least
        self.greatest = greatest

    def forward(self) -> Tensor:
        """[1] fp32."""
        value = self.value.float()
        return value + (value.clamp(self.least, self.greatest) - value).detach()

    def limits(self) -> tuple[nn.Parameter, float, float]:
        """(parameter, least, greatest)."""
        return self.value, self.least, self.greatest


class LogitScale(Temperature):
    """The temperature as CLIP learns it (Radford et al. 2021, section 2.5): `value` [1] = ln(1 / temperature).

    `limits` are those of `value`. The engine keeps it within them after every step; `forward` does not, as in
    the authors' code.

    Args:
        start: temperature at the start.
        least: of the scale 1 / temperature.
        greatest: of the scale.
    """

    def __init__(self, start: float, least: float = 1.0, greatest: float = 100.0) -> None:
        super().__init__(-math.log(start), math.log(least), math.log(greatest))

    def forward(self) -> Tensor:
        """The temperature exp(-value), [1] fp32."""
        return torch.exp(-self.value.float())
