"""Zero-shot retrieval: every picture (or stretch of a clip) and every caption ranks all of the other kind.

They are compared by cosine if the family trains a temperature, else by the dot product of what it embeds them as:
MIL-NCE's and UniVL's vectors keep their length. Of a stretch seen in several windows the embeddings are averaged.

A place is counted against us: 1 + the number of others that score at least as high, so that a model which
gives everything the same embedding is last everywhere, and one that gives NaN too.

Shapes: P pictures or stretches, C captions (a picture may have several), E width of the shared embedding, L text
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale import distributed
from vlscale.data.retrieval import ClipBatches, RetrievalBatch, retrieval_batches
from vlscale.errors import ConfigError, DataError
from vlscale.evaluation.base import Example, Found, HeldOut, evaluating

if TYPE_CHECKING:
    from vlscale.families.base import Family

CHUNK = 1024  # rows of the similarity matrix that exist at a time
EXAMPLES = 8
STRIP = 8  # frames of an example
PREFIX = "eval/retrieval/"


class Features(NamedTuple):
    """Embeddings from all ranks."""

    visual: Tensor  # [P, E] fp32
    text: Tensor  # [C, E] fp32
    picture: Tensor  # [P] int64, number in the data set
    owner: Tensor  # [C] int64, number of the picture


def measure(held: HeldOut) -> Found:
    """Retrieve among the first samples of the shards; see `evaluate`. `skipped` counts those that cannot be used."""
    family = held.model.family
    if family.inputs.frames:
        clips = clip_batches(held, distributed.rank(), distributed.world_size())
        try:
            found = evaluate(family, held.watched(clips), held.device, held.tokenizer.decode)
        except DataError as error:
            raise DataError(f"{error}{f'; {clips.broken}' if clips.broken else ''}") from error
        counts: list[Any] = distributed.gather_objects(clips.skipped)
        return found._replace(metrics={**found.metrics, PREFIX + "skipped": float(sum(counts))})
    asked = min(held.limit or len(held.shards), len(held.shards))
    batches = retrieval_batches(
        held.shards,
        held.tokenizer,
        family.inputs,
        batch=held.batch,
        rank=distributed.rank(),
        world=distributed.world_size(),
        max_words=held.preprocessing.max_words,
        limit=held.limit,
    )
    found = evaluate(family, held.watched(batches), held.device, held.tokenizer.decode)
    skipped = asked - found.metrics[PREFIX + "candidates"]
    return found._replace(metrics={**found.metrics, PREFIX + "skipped": skipped})


def clip_batches(held: HeldOut, rank: int, world: int) -> ClipBatches:
    """One rank's part of the clips."""
    cut = [views.clips for views in held.preprocessing.views.values() if views.clips is not None]
    return ClipBatches(
        held.shards,
        held.tokenizer,
        held.model.family.inputs,
        cut[0],
        batch=held.batch,
        windows=held.windows,
        rank=rank,
        world=world,
        max_words=held.preprocessing.max_words,
        limit=held.limit,
        max_pixels=held.preprocessing.max_pixels,
    )


def evaluate(
    family: Family,
    batches: Iterable[RetrievalBatch],
    device: torch.device,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Found:
    """Retrieve among the pictures of all ranks; every rank calls this with its own part of them.

    Ranks may have different numbers of batches: all call the family equally often, as ZeRO-3 needs.
    `decode` turns token ids into the captions of the examples. The family's training mode is as before.

    Raises:
        ConfigError: the family gives no embeddings.
        DataError: there is no picture, or no caption.
    """
    if "embed" not in family.offers:
        raise ConfigError(
            f"retrieval needs embeddings, which family '{type(family).__name__}' does not offer; "
            "the task pretext measures any family by its own objectives"
        )
    with evaluating(family, device):
        return _evaluate(family, batches, device, decode)


def ranks(features: Features) -> tuple[Tensor, Tensor]:
    """Places from 1: of each picture's best caption [P with captions], of each caption's picture [C]."""
    order = torch.argsort(features.picture)
    visual, index = features.visual[order], features.picture[order]
    own = torch.searchsorted(index, features.owner)  # [C] row of each caption's picture
    text_to_image = [
        _places(text @ visual.T, place[:, None] == torch.arange(len(index), device=place.device))
        for text, place in zip(torch.split(features.text, CHUNK), torch.split(own, CHUNK), strict=True)
    ]
    image_to_text = []
    for number, rows in enumerate(torch.split(visual, CHUNK)):
        mine = own == torch.arange(len(rows), device=own.device)[:, None] + number * CHUNK  # [chunk, C]
        told = mine.any(dim=1)  # a picture without captions is a candidate only
        image_to_text.append(_places(rows[told] @ features.text.T, mine[told]))
    return torch.cat(image_to_text), torch.cat(text_to_image)


def _places(scores: Tensor, right: Tensor) -> Tensor:
    """[N, M] scores and which are right -> [N] place of the best right one."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    beaten = (scores < best) & ~right  # everything that is not clearly beaten stands before
    return 1 + (~right).sum(dim=1) - beaten.sum(dim=1)


def _evaluate(
    family: Family,
    batches: Iterable[RetrievalBatch],
    device: torch.device,
    decode: Callable[[Sequence[int]], str] | None,
) -> Found:
    visual, text, index, owner = [], [], [], []
    first: RetrievalBatch | None = None
    for batch, counts in _in_step(batches):
        seen = family.encode_visual(_on(batch.visual, device)).embed
        read = family.encode_text(_on(batch.text, device)).embed
        assert seen is not None, "a family that offers `embed` sets it"
        assert read is not None, "a family that offers `embed` sets it"
        if counts:
            first = first or batch
            visual.append(seen.float().view(-1, batch.windows, seen.shape[1]).mean(dim=1))
            text.append(read.float())
            index.append(batch.index.to(device))
            owner.append(batch.owner.to(device))
    features = _gathered(visual, text, index, owner, device)
    if "temperature" in family.offers:
        features = features._replace(visual=F.normalize(features.visual, dim=1), text=F.normalize(features.text, dim=1))
    image_to_text, text_to_image = ranks(features)
    metrics = {
        **_figures("i2t", image_to_text),
        **_figures("t2i", text_to_image),
        "candidates": float(len(features.picture)),
        "chance_r1": 1 / len(features.picture),
    }
    examples = _examples(first, features.owner, text_to_image, decode) if distributed.rank() == 0 else []
    return Found({PREFIX + name: value for name, value in metrics.items()}, examples)


def _in_step(batches: Iterable[RetrievalBatch]) -> Iterator[tuple[RetrievalBatch, bool]]:
    """(batch, whether it counts) equally often on every rank; a rank that has run out repeats a batch."""
    iterator = iter(batches)
    spare: RetrievalBatch | None = None
    while True:
        batch = next(iterator, None)
        have: list[Any] = distributed.gather_objects(batch is not None)
        if not any(have):
            if spare is None:
                raise DataError("there is no picture or clip to retrieve; check data.val")
            return
        if spare is None and not all(have):  # a rank without a single batch borrows one
            spare = next(each for each in distributed.gather_objects(batch) if each is not None)  # type: ignore[assignment]
        spare = batch or spare
        assert spare is not None, "some rank has a batch"
        yield spare, batch is not None


def _gathered(
    visual: list[Tensor], text: list[Tensor], index: list[Tensor], owner: list[Tensor], device: torch.device
) -> Features:
    width = next((each.shape[1] for each in visual), 0)
    widths: list[Any] = distributed.gather_objects(width)
    nothing = torch.zeros(0, max(widths), device=device)
    number = torch.zeros(0, dtype=torch.int64, device=device)
    features = Features(
        _from_all(torch.cat([nothing, *visual])),
        _from_all(torch.cat([nothing, *text])),
        _from_all(torch.cat([number, *index])),
        _from_all(torch.cat([number, *owner])),
    )
    if not len(features.text):
        raise DataError("no picture has a caption to retrieve it by; check data.val")
    return features


def _from_all(rows: Tensor) -> Tensor:
    """[n, ...] of every rank, n differing -> all rows in rank order."""
    counts: list[Any] = distributed.gather_objects(len(rows))
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    if not len(padded):
        return rows
    parts = torch.split(distributed.gather([padded.detach()])[0], len(padded))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _figures(direction: str, places: Tensor) -> dict[str, float]:
    recalls = {f"{direction}_r{k}": float((places <= k).double().mean()) for k in (1, 5, 10)}
    return recalls | {f"{direction}_median_rank": float(places.double().quantile(0.5))}


def _examples(
    batch: RetrievalBatch | None,
    owner: Tensor,
    places: Tensor,
    decode: Callable[[Sequence[int]], str] | None,
) -> list[Example]:
    """The first pictures of rank 0; its captions are the first of `owner`. None of features."""
    if batch is None or batch.visual.feats.dtype != torch.uint8:
        return []
    found: list[Example] = []
    for row, picture in enumerate(batch.index.tolist()):
        captions = (batch.owner == picture).nonzero().flatten().tolist()
        if not captions or len(found) == EXAMPLES:
            continue
        caption = captions[0]
        ids = batch.text.ids[caption][batch.text.mask[caption]].tolist()
        words = decode(ids) if decode is not None else " ".join(map(str, ids))
        found.append(Example(_picture(batch, row), words, int(places[caption])))
    return found


def _picture(batch: RetrievalBatch, row: int) -> Tensor:
    """[3, H, W]; of a clip up to `STRIP` frames of its first window from left to right, [3, H, n W]."""
    shown, mask = batch.visual.feats[row * batch.windows].cpu(), batch.visual.mask
    if shown.ndim == 3 or mask is None:
        return shown
    frames = shown[mask[row * batch.windows].cpu()]
    picked = torch.linspace(0, len(frames) - 1, min(STRIP, len(frames))).round().long()
    return torch.cat(list(frames[picked]), dim=2)


def _on(fields: Any, device: torch.device) -> Any:
    """The same NamedTuple of tensors on `device`."""
    return type(fields)(*(each.to(device) if isinstance(each, Tensor) else each for each in fields))
