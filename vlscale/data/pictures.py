"""Pictures of a micro-batch, each in its own shape, to one tensor (SOHO, Huang et al. 2021, arXiv 2104.03135)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vlscale.data.decode import Pixels
from vlscale.types import Visual

CELL = 64  # pixels of a cell's side: a ResNet's stride of 32, then a pooling of 2
# The authors pad with zeros after normalising, that is with the mean colour (123.675, 116.28, 103.53). Rounded to
# bytes it normalises to less than 0.01 from zero.
MEAN_COLOUR = np.array([124, 116, 104], dtype=np.uint8)


def pad_pictures(
    pictures: Sequence[Pixels], multiple: int = 32, mask: Literal["picture", "authors"] = "picture"
) -> Visual:
    """uint8 [h, w, 3] each to uint8 [B, 3, H, W], padded below and to the right with the mean colour.

    It lies in memory as [B, H, W, 3].

    H and W are the greatest height and width, rounded up to `multiple`, and at least one cell. `Visual.mask` [B, R]
    tells, row by row, which of the R = (H // 64) (W // 64) cells are of the picture: those whose first pixel is,
    where cells are spread over the canvas as evenly as its sides allow.

    With mask "authors" the canvas is H x H whatever W is, as in the released code (SOHO/models/necks/necks.py):
    in a batch of upright pictures the last columns are hidden, in one of wide ones padding on the right is taken for
    picture. Their batches are all upright or all wide; in a mixed one H and W are alike, and so are both masks.

    Args:
        pictures: at least one.
        multiple: of 32.
        mask: whose canvas.
    """
    sides = np.array([picture.shape[:2] for picture in pictures])  # [B, 2]
    height, width = (max(CELL, -(-int(side) // multiple) * multiple) for side in sides.max(axis=0))
    pixels = np.empty((len(pictures), height, width, 3), dtype=np.uint8)
    for canvas, picture in zip(pixels, pictures, strict=True):
        h, w = picture.shape[:2]
        canvas[:h, :w], canvas[:h, w:], canvas[h:] = picture, MEAN_COLOUR, MEAN_COLOUR
    rows = _first_pixels(height, height // CELL) < sides[:, :1]  # [B, H // 64]
    columns = _first_pixels(height if mask == "authors" else width, width // CELL) < sides[:, 1:]  # [B, W // 64]
    cells = rows[:, :, None] & columns[:, None, :]
    return Visual(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(cells.reshape(len(pictures), -1)))


def _first_pixels(length: int, cells: int) -> NDArray[np.int64]:
    """[cells] where each of so many cells along `length` pixels begins, rounded down (torch's `nearest`)."""
    return np.arange(cells) * length // cells
