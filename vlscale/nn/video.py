"""Towers that turn a clip's pixels into features, for families that read either."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vlscale.nn.cnn import ResNet
from vlscale.nn.s3d import S3d, S3dSizes, s3d_flops
from vlscale.nn.transformer import layer_flops
from vlscale.nn.vit import ImageEncoder
from vlscale.types import Visual

# "" = features come ready-made; resnet and vit: one of each frame; s3d: one of each window of frames, space to depth
# being the stem of the weights trained on TPUs
TowerKind = Literal[
    "", "resnet18", "resnet50", "resnet101", "resnet152", "vit_b32", "vit_b16", "s3d", "s3d_space_to_depth"
]
TOWERS: tuple[TowerKind, ...] = get_args(TowerKind)
VIT = (768, 12, 12, 3072)  # width, layers, heads, inner width of ViT-B (Dosovitskiy et al. 2021, table 1)


class FrameTower(nn.Module):
    """A pixel `Visual` (feats [N, T, 3, H, W], uint8) in, a feature `Visual` (feats [N, T / window, F]) out.

    Padding frames cost nothing and have zero features. Hidden frames (`picked`) have zero features too, and their own
    in `targets`; of a window, its first frame tells whether it is real and whether it is hidden.

    Args:
        kind: see `TowerKind`; with "" a `Visual` passes as it is, and `width` is 0.
        image_size: H = W, for a ViT's table of positions.
        window: frames that make one feature of `s3d`; others read frame by frame.
        frozen: it learns nothing: no gradient, no optimizer state, BatchNorm by its running figures; its weights are
            in checkpoints like all others.
        divided: a miniature for tests; every width divided.

    Raises:
        ValueError: another kind.
    """

    def __init__(
        self, kind: TowerKind, image_size: int = 224, window: int = 16, frozen: bool = False, divided: int = 1
    ):
        super().__init__()
        if kind not in TOWERS:
            raise ValueError(f"no tower '{kind}'; there is {', '.join(TOWERS[1:])}")
        self.kind, self.image_size, self.frozen = kind, image_size, frozen
        self.window = window if kind.startswith("s3d") else 1
        self.encoder: nn.Module = nn.Identity()
        self.width = 0  # F
        if kind.startswith("s3d"):
            self.encoder = S3d(S3dSizes(space_to_depth=kind != "s3d").divided(divided))
            self.width = self.encoder.sizes.width
        elif kind.startswith("resnet"):
            stem = 64 // divided
            self.encoder = ResNet(int(kind.removeprefix("resnet")), stem, stem, live=not frozen)
            self.width = self.encoder.width
        elif kind:
            width, layers, heads, inner = (max(1, number // divided) for number in VIT)
            self.sizes = (width, max(1, layers), inner)
            self.patch = int(kind.removeprefix("vit_b"))
            self.encoder = ImageEncoder(image_size, self.patch, width, max(1, layers), max(1, heads), inner)
            self.width = width
        if frozen:
            self.requires_grad_(False)

    def train(self, mode: bool = True) -> FrameTower:
        """A frozen tower stays as in evaluation."""
        super().train(mode and not self.frozen)
        return self

    def places(self, frames: int) -> int:
        """T / window, rounded up: the features of so many frames."""
        return -(-frames // self.window)

    def forward(self, visual: Visual) -> Visual:
        """See the class."""
        if not self.kind:
            return visual
        real, picked = self._windows(visual.mask), self._windows(visual.picked)
        clips = self._cut(visual.feats)  # [N, T', window, 3, H, W]
        given = clips.flatten(0, 1) if real is None else clips[real]
        feats = self._encode(given)  # [n, F]
        if real is None:
            feats = feats.view(*clips.shape[:2], -1)
        else:
            feats = feats.new_zeros(*real.shape, self.width).index_put((real,), feats)
        targets = None if picked is None else feats
        hidden = feats if picked is None else feats.masked_fill(picked[..., None], 0.0)
        return visual._replace(feats=hidden, mask=real, picked=picked, targets=targets)

    def flops(self, frames: int) -> int:
        """Multiply-add FLOPs (2 per MAC) of one clip of so many frames."""
        size = self.image_size
        if isinstance(self.encoder, S3d):
            return self.places(frames) * s3d_flops(self.encoder.sizes, self.window, size, size)
        if isinstance(self.encoder, ResNet):
            return frames * self.encoder.flops(size, size)
        if not self.kind:
            return 0
        width, layers, inner = self.sizes
        patches = (size // self.patch) ** 2
        return frames * (2 * patches * 3 * self.patch**2 * width + layers * layer_flops(patches + 1, width, inner))

    def _encode(self, clips: Tensor) -> Tensor:
        """[n, window, 3, H, W] -> [n, F]: means over time and space, or a ViT's class token."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out: Tensor = self.encoder(clips if isinstance(self.encoder, S3d) else clips.flatten(0, 1))
            return out[:, 0] if out.ndim == 3 else out.flatten(2).mean(dim=2)

    def _cut(self, frames: Tensor) -> Tensor:
        """[N, T, 3, H, W] -> [N, T', window, 3, H, W]; black frames fill the last window up."""
        missing = self.places(frames.shape[1]) * self.window - frames.shape[1]
        if missing:
            frames = torch.cat([frames, frames.new_zeros(len(frames), missing, *frames.shape[2:])], dim=1)
        return frames.view(len(frames), -1, self.window, *frames.shape[2:])

    def _windows(self, flags: Tensor | None) -> Tensor | None:
        """[N, T] bool -> [N, T']."""
        return None if flags is None else flags[:, :: self.window]
