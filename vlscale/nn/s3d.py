"""S3D-G (Xie et al. 2018, arXiv 1712.04851): Inception over time and space with separable convolutions and gates.

The layer table is that of antoine77340/MIL-NCE_HowTo100M (s3dg.py). BatchNorm's running figures move after the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlscale.nn.cnn import BatchNorm

Triple = tuple[int, int, int]  # of time, height, width

STAGES = {  # channels of the branches: b0; b1 before and after; b2 before and after; b3 (s3dg.py:236-262)
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLS: dict[str, tuple[Triple, Triple]] = {  # before a stage: kernel, stride
    "conv_2b": ((1, 3, 3), (1, 2, 2)),
    "mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class Norms(NamedTuple):
    """How `BatchNorm` takes its statistics."""

    live: bool = True  # of the micro-batch, in training; False = always the running ones
    over_ranks: bool = False  # a micro-batch's are those of all ranks together


USUAL = Norms()


@dataclass(frozen=True)
class S3dSizes:
    """Channels; the defaults are the published ones."""

    stem: int = 64  # of conv1 and conv_2b
    second: int = 192  # of conv_2c
    mixed: tuple[tuple[int, ...], ...] = tuple(STAGES.values())
    space_to_depth: bool = False  # the stem of the weights trained on TPUs
    norms: Norms = USUAL
    start: Literal["uniform", "kaiming_normal"] = "uniform"  # of convolutions: torch's own, or the authors' option

    @property
    def width(self) -> int:
        """Of the last stage's map."""
        return _after(self.mixed[-1])

    def divided(self, by: int) -> S3dSizes:
        """A miniature: every channel count divided."""
        mixed = tuple(tuple(max(1, count // by) for count in stage) for stage in self.mixed)
        return replace(self, stem=max(1, self.stem // by), second=max(1, self.second // by), mixed=mixed)


class TimeConvolution(nn.Conv3d):
    """A convolution over time alone, taken as one over two dimensions: time, and all places.

    The same numbers, no slower. Of one over three, oneDNN 3.12 gets the weights' gradient wrong in bf16, without a
    word, where there are two moments, on processors with AVX512-BF16 and without AMX.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T', H, W]."""
        stride, padding = (self.stride[0], 1), (int(self.padding[0]), 0)
        flat = F.conv2d(hidden.flatten(3), self.weight.flatten(3), self.bias, stride, padding)
        return flat.reshape(*flat.shape[:3], *hidden.shape[3:])


class Convolution3d(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; `separable`: over space, then the same over time."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: Triple = (1, 1, 1),
        stride: Triple = (1, 1, 1),
        padding: Triple = (0, 0, 0),
        separable: bool = False,
        norms: Norms = USUAL,
    ) -> None:
        super().__init__()
        if separable:
            space = nn.Conv3d(before, after, (1, *kernel[1:]), (1, *stride[1:]), (0, *padding[1:]), bias=False)
            time = TimeConvolution(after, after, (kernel[0], 1, 1), (stride[0], 1, 1), (padding[0], 0, 0), bias=False)
            parts = [space, time]
        else:
            parts = [nn.Conv3d(before, after, kernel, stride, padding, bias=False)]
        self.convolutions = nn.ModuleList(parts)
        self.norms = nn.ModuleList(BatchNorm(after, *norms) for _ in parts)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T', H', W']."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = norm(convolution(hidden)).relu()
        return hidden


class SelfGating(nn.Module):
    """Each channel times a gate that a linear layer of all channels' means gives."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        gates: Tensor = self.linear(hidden.mean(dim=(2, 3, 4))).sigmoid()
        return hidden * gates[:, :, None, None, None]


class Inception(nn.Module):
    """Four branches, each with its own gate, side by side in the channels.

    Args:
        before: channels of the input.
        channels: of the branches, as in `STAGES`.
        norms: of its convolutions.
    """

    def __init__(self, before: int, channels: tuple[int, ...], norms: Norms = USUAL) -> None:
        super().__init__()
        b0, b1_first, b1, b2_first, b2, b3 = channels

        def one(into: int, after: int) -> Convolution3d:
            return Convolution3d(into, after, norms=norms)

        def wide(into: int, after: int) -> Convolution3d:
            return Convolution3d(into, after, (3, 3, 3), (1, 1, 1), (1, 1, 1), True, norms)

        self.branches = nn.ModuleList(
            [
                nn.Sequential(one(before, b0)),
                nn.Sequential(one(before, b1_first), wide(b1_first, b1)),
                nn.Sequential(one(before, b2_first), wide(b2_first, b2)),
                nn.Sequential(nn.MaxPool3d(3, 1, 1), one(before, b3)),
            ]
        )
        self.gates = nn.ModuleList(SelfGating(width) for width in (b0, b1, b2, b3))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, b0 + b1 + b2 + b3, T, H, W]."""
        pairs = zip(self.branches, self.gates, strict=True)
        return torch.cat([gate(branch(hidden)) for branch, gate in pairs], dim=1)


class S3d(nn.Module):
    """Clips to the last stage's map (`mixed_5c`)."""

    def __init__(self, sizes: S3dSizes) -> None:
        super().__init__()
        self.sizes = sizes
        norms, stem = sizes.norms, sizes.stem
        if sizes.space_to_depth:
            first = Convolution3d(24, stem, (2, 4, 4), (1, 1, 1), (1, 2, 2), norms=norms)
        else:
            first = Convolution3d(3, stem, (3, 7, 7), (2, 2, 2), (1, 3, 3), norms=norms)
        self.stages = nn.ModuleDict(
            {
                "conv1": first,
                "conv_2b": Convolution3d(stem, stem, norms=norms),
                "conv_2c": Convolution3d(stem, sizes.second, (3, 3, 3), (1, 1, 1), (1, 1, 1), True, norms),
                "gating": SelfGating(sizes.second),
            }
        )
        width = sizes.second
        for name, channels in zip(STAGES, sizes.mixed, strict=True):
            self.stages[name] = Inception(width, channels, norms)
            width = _after(channels)
        if sizes.start == "kaiming_normal":
            for module in self.modules():
                if isinstance(module, nn.Conv3d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, clips: Tensor) -> Tensor:
        """[B, T, 3, H, W], uint8 or floating in 0..1 -> [B, C, T / 8, H / 32, W / 32], rounded up."""
        hidden = clip_pixels(clips, next(self.parameters()).dtype)
        if self.sizes.space_to_depth:
            hidden = space_to_depth(hidden)
        for name, stage in self.stages.items():
            if name in POOLS:
                hidden = same_pool(hidden, *POOLS[name])
            hidden = stage(hidden)
            if name == "conv1" and self.sizes.space_to_depth:
                hidden = hidden[:, :, 1:, 1:, 1:]
        return hidden


def clip_pixels(clips: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, 3, H, W], uint8 in 0..255 or floating -> [B, 3, T, H, W] in 0..1, in `dtype`."""
    if clips.dtype == torch.uint8:
        clips = clips.float() / 255
    return clips.to(dtype).transpose(1, 2).contiguous()


def space_to_depth(clips: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, 8 C, T / 2, H / 2, W / 2]: blocks of 2 x 2 x 2 become channels, numbered by their
    offset in time, row and column, then by colour."""
    for axis in (2, 4, 6):
        clips = clips.unflatten(axis, (-1, 2))  # type: ignore[no-untyped-call]
    return clips.permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4).contiguous()


def same_pool(hidden: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Max pooling with TensorFlow's padding "SAME" (s3dg.py:124-156): kernel - stride zeros on each axis, the lesser
    half in front; zeros win against nothing, because what is pooled is never negative."""
    missing = [max(0, k - s) for k, s in zip(kernel, stride, strict=True)]
    padding = [side for each in reversed(missing) for side in (each // 2, each - each // 2)]
    return F.max_pool3d(F.pad(hidden, padding), kernel, stride, ceil_mode=True)


@lru_cache(maxsize=8)
def s3d_flops(sizes: S3dSizes, frames: int, height: int, width: int) -> int:
    """Multiply-add FLOPs (2 per MAC) of one clip, from shapes alone."""
    with torch.no_grad(), torch.device("meta"):
        network, clip = S3d(sizes).eval(), torch.empty(1, frames, 3, height, width)
    with FlopCounterMode(display=False) as counter:
        network(clip)
    return int(counter.get_total_flops())


def _after(channels: tuple[int, ...]) -> int:
    return channels[0] + channels[2] + channels[4] + channels[5]
