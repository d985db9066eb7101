"""Samples of different text lengths to one `Batch`: padded ids, stacked pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlscale.data.decode import Pixels
from vlscale.data.text import Ids
from vlscale.types import IGNORE, Batch, Text, Visual


@dataclass(frozen=True)
class Sample:
    """One sample in all its views."""

    index: int  # its number in the data set, the `pair_id`
    key: str
    visual: dict[str, Pixels]  # view -> uint8 [H, W, 3]
    text: dict[str, tuple[Ids, Ids | None]]  # view -> ids [L], labels [L]


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """One micro-batch; `pad` is the id of [PAD]. Texts are as long as the longest of them."""
    first = samples[0]
    return Batch(
        text={view: pad_texts([sample.text[view] for sample in samples], pad) for view in first.text},
        visual={view: stack_pictures([sample.visual[view] for sample in samples]) for view in first.visual},
        pair_id=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        keys=tuple(sample.key for sample in samples),
    )


def pad_texts(texts: Sequence[tuple[Ids, Ids | None]], pad: int) -> Text:
    """(ids, labels) per sample to ids [B, L], mask [B, L], labels [B, L] (None if the view has none)."""
    lengths = np.array([len(ids) for ids, _ in texts])
    mask = np.arange(lengths.max()) < lengths[:, None]  # [B, L]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.concatenate([ids for ids, _ in texts])
    wanted = [labels for _, labels in texts if labels is not None]
    if not wanted:
        return Text(torch.from_numpy(ids), torch.from_numpy(mask))
    labels = np.full(mask.shape, IGNORE, dtype=np.int64)
    labels[mask] = np.concatenate(wanted)
    return Text(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels))


def stack_pictures(pictures: Sequence[Pixels]) -> Visual:
    """uint8 [H, W, 3] each, of one size, to uint8 [B, 3, H, W]."""
    height, width = pictures[0].shape[:2]
    pixels = np.empty((len(pictures), 3, height, width), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        pixels[i] = picture.transpose(2, 0, 1)
    return Visual(torch.from_numpy(pixels))
