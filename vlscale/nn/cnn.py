"""ResNet (He et al. 2016) as a trunk: the last stage's map. BatchNorm's running figures move after the step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.nn.moving import Moving

BLOCKS = {  # He et al. 2016, table 1: bottlenecks or not, blocks of the four stages
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
EXPANSION = 4  # a bottleneck's output over its inner width
STRIDE = 32  # of the last map
# Channel statistics of [0, 1] pixels of ImageNet (torchvision, mmcls: 123.675 / 255, ...).
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def imagenet_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 3, H, W], uint8 or floating and already normalised -> normalised, in `dtype`."""
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    mean = torch.tensor(PIXEL_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=pixels.device).view(3, 1, 1)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)  # loaders stack [B, H, W, 3]
    return ((pixels / 255 - mean) / std).to(dtype)


class BatchNorm(Moving):
    """Batch normalisation (Ioffe and Szegedy 2015) of [B, C, H, W], or of [B, C, T, H, W].

    In training each micro-batch is normalised by its own statistics, and the running ones, which evaluation
    takes, move once per step by the mean of what micro-batches and ranks saw.

    Args:
        width: C.
        live: False = always the running statistics, which never move.
        over_ranks: a micro-batch's statistics are those of all ranks together.
    """

    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]

    def __init__(self, width: int, live: bool = True, over_ranks: bool = False) -> None:
        super().__init__()
        self.live = live
        self.over_ranks = over_ranks
        self.momentum, self.eps = 0.1, 1e-5  # torch's, which mmcls keeps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        weight, bias = self.weight.float(), self.bias.float()
        if not (self.training and self.live):
            given = (self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
            return _in_order(F.batch_norm(hidden, *given))
        if self.over_ranks and distributed.world_size() > 1:
            return self._over_ranks(hidden, weight, bias)
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        out = F.batch_norm(hidden, mean, variance, weight, bias, True, 1.0, self.eps)  # writes them, unbiased
        self.note(torch.cat([mean, variance, torch.ones_like(mean[:1])]))
        return _in_order(out)

    def moved(self, sums: Tensor) -> dict[str, Tensor]:
        """The running statistics, a tenth of the way to the step's."""
        mean, variance = sums[:-1].div(sums[-1]).chunk(2)
        return {
            "running_mean": torch.lerp(self.running_mean, mean, self.momentum),
            "running_var": torch.lerp(self.running_var, variance, self.momentum),
        }

    def _over_ranks(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values = hidden.float()
        places = tuple(range(2, values.ndim))
        own_variance, own_mean = torch.var_mean(values, dim=(0, *places), correction=0)
        number = own_mean.new_full((1,), values.numel() / values.shape[1])
        (everyone,) = distributed.gather([torch.cat([own_mean, own_variance, number])[None]])  # [W, 2 C + 1]
        means, variances, numbers = torch.split(everyone, [len(own_mean), len(own_mean), 1], dim=1)
        share = numbers / numbers.sum()
        mean = (share * means).sum(dim=0)
        variance = (share * (variances + (means - mean).square())).sum(dim=0)
        unbiased = variance * (numbers.sum() / (numbers.sum() - 1))
        self.note(torch.cat([mean, unbiased, torch.ones_like(mean[:1])]))
        factor = weight * (variance + self.eps).rsqrt()
        shape = (-1, *(1 for _ in places))
        out: Tensor = values * factor.view(shape) + (bias - mean * factor).view(shape)
        return out.to(hidden.dtype)


class Convolution(nn.Conv2d):
    """Without bias, padded so that only the stride makes the map smaller; normal start by fan-out (He et al. 2015)."""

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(before, after, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, around which the input is added.

    The stride is on the (first) 3x3 convolution, as in torchvision and mmcls.
    """

    def __init__(self, before: int, inner: int, stride: int, bottleneck: bool, live: bool) -> None:
        super().__init__()
        after = inner * EXPANSION if bottleneck else inner
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        widths = (before, inner, inner, after) if bottleneck else (before, inner, after)
        places = range(len(kernels))
        self.convolutions = nn.ModuleList(
            Convolution(widths[place], widths[place + 1], kernels[place], strides[place]) for place in places
        )
        self.norms = nn.ModuleList(BatchNorm(widths[place + 1], live) for place in places)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(Convolution(before, after, 1, stride), BatchNorm(after, live))
        self.width = after

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        out = hidden
        for place, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            out = norm(convolution(out if place == 0 else out.relu()))
        joined: Tensor = (out + self.shortcut(hidden)).relu()
        return joined


class ResNet(nn.Module):
    """Pixels to the last stage's map.

    Args:
        depth: a key of `BLOCKS`.
        stem: channels of the first convolution.
        base: inner width of the first stage; it doubles from stage to stage.
        frozen: the stem and so many stages learn nothing, their statistics stay; -1 = not even the stem.
        live: the other stages' statistics in training are the micro-batch's; False = the running ones, for ever.

    Raises:
        ValueError: another depth.
    """

    def __init__(self, depth: int, stem: int = 64, base: int = 64, frozen: int = -1, live: bool = True) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"no ResNet of depth {depth}; there is {', '.join(map(str, BLOCKS))}")
        bottleneck, numbers = BLOCKS[depth]
        self.stem = nn.ModuleDict(
            {"convolution": Convolution(3, stem, 7, 2), "norm": BatchNorm(stem, live and frozen < 0)}
        )
        self.stages = nn.ModuleDict()
        width = stem
        for stage, number in enumerate(numbers, start=1):
            blocks = []
            for place in range(number):
                stride = 2 if stage > 1 and place == 0 else 1
                block = Block(width, base * 2 ** (stage - 1), stride, bottleneck, live and frozen < stage)
                blocks.append(block)
                width = block.width
            self.stages[str(stage)] = nn.Sequential(*blocks)
        self.width = width
        if frozen >= 0:
            self.stem.requires_grad_(False)
        for stage in range(1, frozen + 1):
            self.stages[str(stage)].requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W], uint8 or normalised -> [B, width, H / 32, W / 32], rounded up."""
        convolution = self.stem["convolution"]
        assert isinstance(convolution, Convolution)
        hidden: Tensor = convolution(imagenet_pixels(pixels, convolution.weight.dtype))
        hidden = F.max_pool2d(self.stem["norm"](hidden).relu(), 3, 2, 1)
        for stage in self.stages.values():
            hidden = stage(hidden)
        return hidden

    def flops(self, height: int, width: int) -> int:
        """Multiply-add FLOPs (2 per MAC) of the convolutions on one picture."""
        total = 0
        for convolution, cells in self._cells(height, width):
            weights = convolution.weight
            total += 2 * (weights.ds_numel if hasattr(weights, "ds_numel") else weights.numel()) * cells
        return total

    def _cells(self, height: int, width: int) -> Iterator[tuple[Convolution, int]]:
        """Every convolution with the number of places in its output."""
        size = (_half(height), _half(width))
        yield self.stem["convolution"], size[0] * size[1]  # type: ignore[misc]
        size = (_half(size[0]), _half(size[1]))
        for stage in self.stages.values():
            for block in stage.modules():
                if not isinstance(block, Block):
                    continue
                before = size
                for convolution in block.convolutions:
                    assert isinstance(convolution, Convolution)
                    if convolution.stride[0] == 2:
                        size = (_half(size[0]), _half(size[1]))
                    yield convolution, size[0] * size[1]
                if isinstance(block.shortcut, nn.Sequential):
                    assert before == size or size == (_half(before[0]), _half(before[1]))
                    yield block.shortcut[0], size[0] * size[1]  # type: ignore[misc]


def _in_order(out: Tensor) -> Tensor:
    """The same, and its gradient arrives in memory order.

    torch 2.13 on a CPU: the backward pass of batch_norm reads the gradient of a single picture wrongly where its
    channels lie last, as they do behind `flatten(2).transpose(1, 2)`.
    """
    if out.requires_grad and len(out) == 1:
        out.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
    return out


def _half(length: int) -> int:
    """What a stride of 2 leaves."""
    return (length + 1) // 2
