"""Miniature models and batches that several tests share."""

from __future__ import annotations

from dataclasses import replace

import torch

from vlscale.families import albef
from vlscale.model import PretrainModel
from vlscale.objectives import itc, itm, mlm
from vlscale.types import IGNORE, Batch, Inputs, Text, Visual


def albef_model(
    queue: int = 8, soften: float = 0.4, dropout: float = 0.0, layers: int = 1, seed: int = 0
) -> PretrainModel:
    torch.manual_seed(seed)
    config = replace(albef.tiny(), dropout=dropout, text_layers=layers, fusion_layers=layers)
    family = albef.build(config)
    return PretrainModel(
        family,
        {
            "itc": itc.build(itc.Config(queue=queue, soften=soften), family),
            "itm": itm.build(itm.Config(keys="momentum" if queue or soften else "online"), family),
            "mlm": mlm.build(mlm.Config(soften=soften), family),
        },
    )


def batch_for(inputs: Inputs, vocab: int, size: int = 4, padding: int = 0, seed: int = 0) -> Batch:
    """Pictures and captions of several lengths; `padding` more columns of padding."""
    generator = torch.Generator().manual_seed(seed)
    length = inputs.text_length - 4
    ids = torch.randint(4, vocab, (size, length), generator=generator)
    lengths = torch.tensor([length - number % 4 for number in range(size)])
    hidden = torch.rand(size, length, generator=generator) < 0.3
    hidden[:, 1] = True
    width = length + padding
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.nn.functional.pad(ids, (0, padding)) * mask
    hidden = torch.nn.functional.pad(hidden, (0, padding)) & mask
    return Batch(
        text={
            "clean": Text(ids, mask),
            "masked": Text(ids.masked_fill(hidden, 3), mask, ids.masked_fill(~hidden, IGNORE)),
        },
        visual=pictures_for(inputs, size, generator),
        pair_id=torch.arange(size),
        matched=torch.arange(size) % 2 == 0 if inputs.regions else None,
        answers=torch.where(torch.arange(size) % 4 == 1, IGNORE, torch.arange(size) % 3),
    )


def pictures_for(inputs: Inputs, size: int, generator: torch.Generator) -> dict[str, Visual]:
    """Pixels; or regions of several numbers, some of them hidden in the view `masked`."""
    if not inputs.regions:
        shape = (size, 3, inputs.image_size, inputs.image_size)
        clean = Visual(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
        return {"clean": clean, "masked": clean}  # what is hidden of pixels is the family's to draw
    mask = torch.arange(inputs.regions) < torch.arange(inputs.regions, inputs.regions - size, -1).clamp(min=2)[:, None]
    feats = torch.rand(size, inputs.regions, inputs.feats, generator=generator) * mask[..., None]
    boxes = torch.rand(size, inputs.regions, inputs.boxes, generator=generator) * mask[..., None]
    picked = (torch.rand(size, inputs.regions, generator=generator) < 0.3) & mask
    picked[:, 0] = True
    probs = torch.rand(size, inputs.regions, inputs.classes, generator=generator).softmax(dim=2)
    clean = Visual(feats, mask, boxes, classes=probs.argmax(dim=2), class_probs=probs)
    clean = clean._replace(
        class_confidence=probs.amax(dim=2), attributes=probs.argmin(dim=2), attribute_confidence=probs[..., 0]
    )
    return {
        "clean": clean,
        "masked": clean._replace(feats=feats.masked_fill(picked[..., None], 0.0), picked=picked, targets=feats),
    }


def albef_batch(size: int = 4, padding: int = 0, seed: int = 0) -> Batch:
    config = albef.tiny()
    return batch_for(config.inputs, config.vocab, size, padding, seed)
