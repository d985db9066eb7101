"""Miniature models and batches that several tests share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

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
    text = {
        "clean": Text(ids, mask),
        "masked": Text(ids.masked_fill(hidden, 3), mask, ids.masked_fill(~hidden, IGNORE)),
        "target": written(ids, mask),
    }
    visual = pictures_for(inputs, size, generator)
    return Batch(
        text=sentences_for(text, visual["clean"]) if inputs.sentences else text,
        visual=visual,
        pair_id=torch.arange(size),
        matched=torch.arange(size) % 2 == 0 if inputs.regions else None,
        answers=torch.where(torch.arange(size) % 4 == 1, IGNORE, torch.arange(size) % 3),
    )


def written(ids: torch.Tensor, mask: torch.Tensor) -> Text:
    """Every place but the last reads a token, and its label is the next."""
    read, following = ids[:, :-1], mask[:, 1:]
    return Text(read * following, following, ids[:, 1:].masked_fill(~following, IGNORE))


def sentences_for(text: dict[str, Text], clean: Visual) -> dict[str, Text]:
    """Of each sample three sentences: its text, another's, and none; those with frames overlap, and some have none. The
    first two are queries."""
    assert clean.mask is not None
    frames = clean.mask.sum(dim=1)
    middle = frames // 2
    spans = torch.stack([torch.zeros_like(frames), middle + 1, middle, frames, frames, frames], dim=1)
    spans[1::2, 2:4] = 0

    def three(each: Tensor | None, fill: int) -> Tensor | None:
        if each is None:
            return None
        return torch.stack([each, each.flip(0), torch.full_like(each, fill)], dim=1).flatten(0, 1)

    def rows(view: Text) -> Text:
        ids, mask = three(view.ids, 0), three(view.mask, False)
        assert ids is not None
        assert mask is not None
        return Text(ids, mask, three(view.labels, IGNORE), spans=spans.view(-1, 2))

    made = {name: rows(view) for name, view in text.items()}
    asked = torch.arange(len(spans) * 3).view(-1, 3)[:, :2].flatten()
    ids, mask, spans = made["clean"].ids[asked], made["clean"].mask[asked], spans.view(-1, 2)[asked]
    return {**made, "query": Text(ids, mask, spans=spans)}


def pictures_for(inputs: Inputs, size: int, generator: torch.Generator) -> dict[str, Visual]:
    """Pixels; or regions or frames of several numbers, some of them hidden in the view `masked`."""
    if inputs.frames:
        return clips_for(inputs, size, generator)
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


def clips_for(inputs: Inputs, size: int, generator: torch.Generator) -> dict[str, Visual]:
    """Frames as the family reads them: pixels, features or visual words; some hidden, and some out of their order."""
    mask = torch.arange(inputs.frames) < torch.arange(inputs.frames, inputs.frames - size, -1).clamp(min=2)[:, None]
    picked = (torch.rand(mask.shape, generator=generator) < 0.3) & mask
    picked[:, 0] = True
    feats = torch.rand(*mask.shape, inputs.feats, generator=generator) * mask[..., None]
    if inputs.image_size:
        shape = (*mask.shape, 3, inputs.image_size, inputs.image_size)
        clean = Visual(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), mask)
        return {"clean": clean, "masked": clean._replace(picked=picked)}
    order = torch.arange(inputs.frames).repeat(size, 1)
    order[:, :2] = order[:, :2].flip(1)
    chosen = (torch.arange(inputs.frames) < 2).repeat(size, 1)
    clean = Visual(feats, mask)
    hidden = clean._replace(feats=feats.masked_fill(picked[..., None], 0.0), picked=picked, targets=feats)
    if inputs.codes:
        words = torch.randint(0, inputs.codes, mask.shape, generator=generator) * mask
        clean = clean._replace(codes=words)
        changed = torch.where(picked, (words + 1) % inputs.codes, words)
        hidden = hidden._replace(codes=changed, code_labels=words.masked_fill(~picked, IGNORE))
    return {"clean": clean, "masked": hidden, "shuffled": clean._replace(order=order, picked=chosen)}


def albef_batch(size: int = 4, padding: int = 0, seed: int = 0) -> Batch:
    config = albef.tiny()
    return batch_for(config.inputs, config.vocab, size, padding, seed)
