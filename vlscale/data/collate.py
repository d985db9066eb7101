"""Samples of different lengths to one `Batch`: padded ids and regions, pixels stacked or padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.data.augment import KeepRatio
from vlscale.data.clip_samples import ClipSample, TextRows
from vlscale.data.decode import Pixels
from vlscale.data.frames import Frames
from vlscale.data.masking import Ids
from vlscale.data.pictures import pad_pictures
from vlscale.data.regions import Floats
from vlscale.types import IGNORE, Batch, Text, Visual


class RegionSample(NamedTuple):
    """The regions of one picture."""

    feats: Floats  # [R, F] as the detector gave them
    boxes: Floats  # [R, G] in the family's way
    fields: dict[str, NDArray[Any]]  # fields of `Visual`, [R, ...]
    views: dict[str, tuple[Floats, NDArray[np.bool_] | None]]  # view -> features [R, F], picked [R]


class Sample(NamedTuple):
    """One sample in all its views."""

    number: int  # in the data set, the `pair_id`
    key: str
    text: dict[str, tuple[Ids, Ids | None]]  # view -> ids [L], labels [L]
    visual: dict[str, Pixels]  # view -> uint8 [H, W, 3], of those that lie nowhere else
    regions: RegionSample | None = None
    clips: ClipSample | None = None  # in the place of `text`, `visual` and `regions`
    lost_words: int = 0  # of its text, for which there was no room
    segments: Ids | None = None  # [L]
    matched: bool | None = None
    tags_swapped: int | None = None
    answer: int | None = None


def collate(
    samples: Sequence[Sample],
    pad: int,
    task: str = "all",
    targets: bool = False,
    keep_ratio: Mapping[str, KeepRatio] | None = None,
    squares: Mapping[str, Pixels] | None = None,
    frames: int = 0,
) -> Batch:
    """One micro-batch; `pad` is the id of [PAD]. Texts, regions and frames are as many as the most of them.

    `targets`: whether someone restores features. `keep_ratio`: the views whose pictures differ in shape. `squares`:
    the pictures [B, S, S, 3] of views whose samples lie there already. `frames`: how many a clip of pixels gets.
    """
    shapes, filled = keep_ratio or {}, squares or {}
    first = samples[0]
    text = {view: pad_texts([sample.text[view] for sample in samples], pad) for view in first.text}
    segments = [sample.segments for sample in samples if sample.segments is not None]
    if segments:
        padded = torch.from_numpy(_padded(segments, 0, np.int64))
        text = {view: each._replace(segments=padded) for view, each in text.items()}
    clips = [sample.clips for sample in samples if sample.clips is not None]
    if clips:
        text = {view: stack_texts([clip.text[view] for clip in clips], pad) for view in clips[0].text}
    regions = [sample.regions for sample in samples if sample.regions is not None]
    visual = {view: _shown(pictures) for view, pictures in filled.items()}
    for view in [view for view in first.visual if view not in filled]:
        visual[view] = _pictures([sample.visual[view] for sample in samples], shapes.get(view))
    for view in clips[0].visual if clips else ():
        visual[view] = stack_frames([row for clip in clips for row in clip.visual[view]], targets, frames)
    return Batch(
        text=text,
        visual=stack_regions(regions, targets) if regions else visual,
        pair_id=torch.tensor([sample.number for sample in samples], dtype=torch.int64),
        keys=tuple(sample.key for sample in samples),
        lost_words=tuple(sample.lost_words for sample in samples),
        task=task,
        matched=_column([sample.matched for sample in samples], torch.bool),
        tags_swapped=_column([sample.tags_swapped for sample in samples], torch.int64),
        answers=_column([sample.answer for sample in samples], torch.int64),
    )


def pad_texts(texts: Sequence[tuple[Ids, Ids | None]], pad: int) -> Text:
    """(ids, labels) per sample to ids [B, L], mask [B, L], labels [B, L] (None if the view has none)."""
    lengths = np.array([len(ids) for ids, _ in texts])
    mask = np.arange(lengths.max()) < lengths[:, None]  # [B, L]
    ids = torch.from_numpy(_padded([ids for ids, _ in texts], pad, np.int64))
    wanted = [labels for _, labels in texts if labels is not None]
    labels = torch.from_numpy(_padded(wanted, IGNORE, np.int64)) if wanted else None
    return Text(ids, torch.from_numpy(mask), labels)


def stack_texts(samples: Sequence[TextRows], pad: int) -> Text:
    """The texts of samples that have several: as many rows each as the most of them, missing ones being padding."""
    count = max(1, *(len(sample.ids) for sample in samples))
    nothing = np.empty(0, dtype=np.int64)
    restored = any(labels is not None for sample in samples for labels in sample.labels)
    rows: list[tuple[Ids, Ids | None]] = []
    for sample in samples:
        rows += zip(sample.ids, sample.labels, strict=True)
        rows += [(nothing, nothing if restored else None)] * (count - len(sample.ids))
    spans = [sample.spans for sample in samples if sample.spans is not None]
    text = pad_texts(rows, pad)
    if not spans:
        return text
    table = np.zeros((len(samples), count, 2), dtype=np.int64)
    for place, each in zip(table, spans, strict=True):
        place[: len(each)] = each
    return text._replace(spans=torch.from_numpy(table.reshape(-1, 2)))


def stack_frames(rows: Sequence[Frames], targets: bool, most: int) -> Visual:
    """The frames of some clips; of pixels `most` places each, uint8 [rows, T, 3, H, W], black where there is none.

    `targets`: whether someone restores features.
    """
    counts = np.array([row.length for row in rows])
    mask = np.arange(most if rows[0].pixels else counts.max()) < counts[:, None]  # [rows, T]

    def padded(name: str, fill: Any) -> Tensor | None:
        values = [getattr(row, name) for row in rows]
        if values[0] is None:
            return None
        out = np.full((*mask.shape, *values[0].shape[1:]), fill, dtype=values[0].dtype)
        for place, value in zip(out, values, strict=True):
            place[: len(value)] = value
        return torch.from_numpy(out)

    feats, order = padded("feats", 0), padded("order", 0)
    assert feats is not None
    places = torch.arange(mask.shape[1])
    return Visual(
        feats.permute(0, 1, 4, 2, 3) if rows[0].pixels else feats,
        torch.from_numpy(mask),
        picked=padded("picked", False),
        targets=padded("targets", 0) if targets else None,
        codes=padded("codes", 0),
        code_labels=padded("code_labels", IGNORE),
        order=None if order is None else torch.where(torch.from_numpy(mask), order, places),
    )


def stack_pictures(pictures: Sequence[Pixels]) -> Visual:
    """uint8 [H, W, 3] each, of one size, to uint8 [B, 3, H, W], which lies in memory as [B, H, W, 3]."""
    return _shown(np.stack(pictures))


def _shown(pictures: Pixels) -> Visual:
    return Visual(torch.from_numpy(pictures).permute(0, 3, 1, 2))


def _pictures(pictures: Sequence[Pixels], keep_ratio: KeepRatio | None) -> Visual:
    if keep_ratio is None:
        return stack_pictures(pictures)
    return pad_pictures(pictures, keep_ratio.multiple, keep_ratio.mask)


def stack_regions(samples: Sequence[RegionSample], targets: bool) -> dict[str, Visual]:
    """The views of some pictures' regions; at least one place each, so that pictures without regions can stand."""
    counts = np.array([len(sample.feats) for sample in samples])
    mask = np.arange(max(1, counts.max())) < counts[:, None]  # [B, R]
    feats = [sample.feats for sample in samples]
    whole = torch.from_numpy(_padded(feats, 0, np.float32))
    clean = Visual(whole, torch.from_numpy(mask), torch.from_numpy(_padded([s.boxes for s in samples], 0, np.float32)))
    fields = {
        name: torch.from_numpy(_padded([sample.fields[name] for sample in samples], 0, values.dtype))
        for name, values in samples[0].fields.items()
    }
    clean = clean._replace(**fields)
    return {view: _hidden(clean, [sample.views[view] for sample in samples], targets) for view in samples[0].views}


def _hidden(clean: Visual, views: Sequence[tuple[Floats, NDArray[np.bool_] | None]], targets: bool) -> Visual:
    picked = [each for _, each in views if each is not None]
    if not picked:
        return clean
    feats = torch.from_numpy(_padded([feats for feats, _ in views], 0, np.float32))
    hidden = torch.from_numpy(_padded(picked, False, np.bool_))
    return clean._replace(feats=feats, picked=hidden, targets=clean.feats if targets else None)


def _padded(rows: Sequence[NDArray[Any]], fill: Any, kind: Any) -> NDArray[Any]:
    """[n, ...] each to [B, longest, ...]; at least one place."""
    out = np.full((len(rows), max(1, *map(len, rows)), *rows[0].shape[1:]), fill, dtype=kind)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return out


def _column(values: Sequence[Any], kind: torch.dtype) -> Tensor | None:
    """[B], or None where a sample says nothing."""
    return None if values[0] is None else torch.tensor(values, dtype=kind)
