"""The Vision Transformer (Dosovitskiy et al. 2021), and how pictures reach it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.nn.transformer import PreNormBlock, Stack

NORM_EPS = 1e-6  # timm and ALBEF models/vit.py
INIT_STD = 0.02  # truncated normal, timm and ALBEF models/vit.py
# CLIP's channel statistics of [0, 1] pixels (Radford et al. 2021, released code), which ALBEF uses too.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Pictures as the network takes them.

    Args:
        pixels: [B, 3, H, W], uint8 in 0..255, or floating and already normalised.
        dtype: what the network computes in.

    Returns:
        [B, 3, H, W] in `dtype`.
    """
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    mean = torch.tensor(PIXEL_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=pixels.device).view(3, 1, 1)
    return ((pixels.float() / 255 - mean) / std).to(dtype)


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

    def __init__(self, width: int, patch: int, bias: bool = True) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W], uint8 or normalised -> [B, H/p * W/p, D], row by row."""
        pixels = normalize_pixels(pixels, self.projection.weight.dtype)
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


def resize_positions(table: Tensor, shape: torch.Size) -> Tensor:
    """A position table [1, 1 + R, D] for another number of patches: bicubic over the square grid; the class
    token's row is kept (ALBEF models/vit.py interpolate_pos_embed).

    Raises:
        ValueError: one of the two is not 1 + a square number of rows, or the widths differ.
    """
    if table.shape == shape:
        return table
    old, new = (round((size[1] - 1) ** 0.5) for size in (table.shape, shape))
    if old**2 + 1 != table.shape[1] or new**2 + 1 != shape[1] or table.shape[2] != shape[2]:
        raise ValueError(f"a position table {tuple(table.shape)} cannot be resized to {tuple(shape)}")
    grid = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], grid], dim=1)
