"""The Vision Transformer (Dosovitskiy et al. 2021), and how pictures reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.nn.attention import attend
from vlscale.nn.transformer import Mlp, PreNormBlock, Stack

NORM_EPS = 1e-6  # timm and ALBEF models/vit.py
INIT_STD = 0.02  # truncated normal, timm and ALBEF models/vit.py
# CLIP's channel statistics of [0, 1] pixels (Radford et al. 2021, released code), which ALBEF uses too.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Statistics(NamedTuple):
    """What pixels in [0, 1] are centred by and divided by, per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CLIP_PIXELS = Statistics(PIXEL_MEAN, PIXEL_STD)
HALVES = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # to [-1, 1]: SigLIP


def normalize_pixels(pixels: Tensor, dtype: torch.dtype, statistics: Statistics = CLIP_PIXELS) -> Tensor:
    """Pictures as the network takes them.

    Args:
        pixels: [B, 3, H, W], uint8 in 0..255, or floating and already normalised.
        dtype: what the network computes in.
        statistics: of the channels.

    Returns:
        [B, 3, H, W] in `dtype`.
    """
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    mean = torch.tensor(statistics.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(statistics.std, device=pixels.device).view(3, 1, 1)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)  # loaders stack [B, H, W, 3]
    return ((pixels / 255 - mean) / std).to(dtype)


def init_truncated(module: nn.Module) -> None:
    """ViT's start: truncated normal 0.02 for matrices, 0 for biases; a convolution keeps torch's own start.

    As in ALBEF models/vit.py. For `Module.apply`.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class PatchEmbedding(nn.Module):
    """One linear map per patch, written as a convolution."""

    def __init__(self, width: int, patch: int, bias: bool = True, statistics: Statistics = CLIP_PIXELS) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=bias)
        self.statistics = statistics

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W], uint8 or normalised -> [B, H/p * W/p, D], row by row."""
        pixels = normalize_pixels(pixels, self.projection.weight.dtype, self.statistics)
        out: Tensor = self.projection(pixels)
        return out.flatten(2).transpose(1, 2)


class ClassAndPositions(nn.Module):
    """Puts the class token in front and adds the learned position table [1, 1 + R, D]."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + patches, width))
        nn.init.trunc_normal_(self.class_token, std=INIT_STD)
        nn.init.trunc_normal_(self.positions, std=INIT_STD)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, R, D] -> [B, 1 + R, D]."""
        first = self.class_token.expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1) + self.positions


class Positions(nn.Module):
    """Adds a learned position table [1, R, D]; there is no class token."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, patches, width))
        nn.init.normal_(self.positions, std=width**-0.5)  # big_vision models/vit.py, get_posemb

    def forward(self, patches: Tensor) -> Tensor:
        """[B, R, D] -> [B, R, D]."""
        return patches + self.positions


class QueryToken(nn.Module):
    """A learned query [1, 1, D]; the authors say probe."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(1, 1, width))
        nn.init.xavier_uniform_(self.value)

    def forward(self, rows: int) -> Tensor:
        """[rows, 1, D], the same in every row."""
        return self.value.expand(rows, -1, -1)


class AttentionPool(nn.Module):
    """A learned query reads all tokens, then an MLP with a residual: "MAP" (Zhai et al. 2022, arXiv 2106.04560,
    after Lee et al. 2019, Set Transformer). Code: big_vision models/vit.py, MAPHead.
    """

    def __init__(self, width: int, heads: int, inner: int, eps: float, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads = heads
        self.query_token = QueryToken(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, inner, activation)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, R, D] -> [B, D]."""
        query = self.query(self.query_token(len(hidden)))
        key, value = self.key_value(hidden).chunk(2, dim=2)
        pooled = self.output(attend(query, key, value, self.heads, None, 0.0))
        out: Tensor = pooled + self.mlp(self.norm(pooled))
        return out[:, 0]


class ImageEncoder(nn.Module):
    """ViT without a classifier: every token is kept, the class token stands first."""

    def __init__(self, image_size: int, patch: int, width: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.patches = PatchEmbedding(width, patch)
        self.tokens = ClassAndPositions(width, (image_size // patch) ** 2)
        self.stack = Stack((PreNormBlock(width, heads, inner, NORM_EPS) for _ in range(layers)), once=True)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.apply(init_truncated)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W], uint8 or normalised -> [B, 1 + R, D]."""
        out: Tensor = self.norm(self.stack(self.tokens(self.patches(pixels))))
        return out


def resize_positions(table: Tensor, shape: torch.Size, kept: int = 1) -> Tensor:
    """A position table [1, kept + R, D] for another number of patches: bicubic over the square grid; the first
    rows (the class token's) are kept (ALBEF models/vit.py interpolate_pos_embed).

    Raises:
        ValueError: one of the two is not `kept` + a square number of rows, or the widths differ.
    """
    if table.shape == shape:
        return table
    old, new = (round((size[1] - kept) ** 0.5) for size in (table.shape, shape))
    if old**2 + kept != table.shape[1] or new**2 + kept != shape[1] or table.shape[2] != shape[2]:
        raise ValueError(f"a position table {tuple(table.shape)} cannot be resized to {tuple(shape)}")
    grid = table[:, kept:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :kept], grid], dim=1)
