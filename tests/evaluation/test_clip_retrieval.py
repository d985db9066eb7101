"""Retrieval over clips: which stretch and which windows are seen, and how their embeddings are compared."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.clip_files import clip, counting, number
from tests.shard_files import make_tokenizer, write_tar
from vlscale.data.clip_windows import Clips
from vlscale.data.retrieval import ClipBatches, RetrievalBatch
from vlscale.data.samples import MAX_CAPTIONS
from vlscale.data.shards import Shards
from vlscale.evaluation.retrieval import evaluate
from vlscale.types import Inputs, Stream, Text, Visual

CPU = torch.device("cpu")
PIXELS = Inputs(image_size=8, text_length=12, separator=False, frames=4)
FEATS = Inputs(image_size=0, text_length=12, separator=False, feats=1, frames=4)
TIMED = {
    "sentences": [
        {"start": 0.5, "end": 1.5, "text": "a red thing"},
        {"start": 1.0, "end": 1.2, "text": "a blue thing"},
        {"start": 0.5, "end": 1.5, "text": "number 7"},
    ]
}


def sample(name: str, record: Mapping[str, Any], field: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(f"{name}.{field}", data), (f"{name}.json", json.dumps(record).encode())]


def features(count: int) -> bytes:
    """One row a second, whose only number is the second."""
    out = io.BytesIO()
    times = np.arange(count, dtype=np.float64)
    np.savez(out, features=times[:, None].astype(np.float32), times=times)
    return out.getvalue()


def batches(folder: Path, members: list[tuple[str, bytes]], inputs: Inputs, **options: Any) -> ClipBatches:
    folder.mkdir(exist_ok=True)
    shards = Shards(str(write_tar(folder / "clips.tar", members)), folder / "cache")
    return ClipBatches(shards, make_tokenizer(folder, inputs), inputs, Clips(fps=10.0), **{"batch": 8, **options})


def seconds(batch: RetrievalBatch) -> list[list[int]]:
    """The frames that each window shows: tenths of a second of `counting` clips."""
    assert batch.visual.mask is not None
    rows = zip(batch.visual.feats, batch.visual.mask.tolist(), strict=True)
    return [[number(frame.numpy()) for frame, real in zip(row, kept, strict=True) if real] for row, kept in rows]


def test_a_stretch_is_what_a_sentence_goes_with(tmp_path: Path) -> None:
    """Sentences of the same time are captions of the same one; windows go evenly from its beginning to its end, and a
    short one is filled with what comes after it."""
    (batch,) = batches(tmp_path, sample("a", TIMED, "mp4", clip(counting(20))), PIXELS, windows=3)
    assert batch.index.tolist() == [0, 1]
    assert batch.owner.tolist() == [0, 0, 1]
    assert batch.windows == 3
    assert tuple(batch.visual.feats.shape) == (6, 4, 3, 8, 8)
    assert seconds(batch) == [[5, 6, 7, 8], [8, 9, 10, 11], [11, 12, 13, 14], *[[10, 11, 12, 13]] * 3]


def test_a_clip_without_times_is_one_with_all_its_captions(tmp_path: Path) -> None:
    record = {"caption": ["a red thing", "number 3"]}
    members = sample("a", record, "mp4", clip(counting(20))) + sample("b", record, "gif", clip(counting(3), "gif"))
    (batch,) = batches(tmp_path, members, PIXELS, windows=2)
    assert batch.owner.tolist() == [0, 0, MAX_CAPTIONS, MAX_CAPTIONS]
    assert seconds(batch) == [[0, 1, 2, 3], [16, 17, 18, 19], [0, 1, 2], [0, 1, 2]]
    assert not batch.visual.feats[2, 3].any()  # where the clip is over


def test_the_middle_square_of_a_clip_is_seen(tmp_path: Path) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 240
    (batch,) = batches(tmp_path, sample("a", {"caption": "a thing"}, "mp4", clip([wide] * 4)), PIXELS)
    assert batch.visual.feats[0, 0].float().mean() > 200


def test_features_are_seen_in_runs_of_rows(tmp_path: Path) -> None:
    record = {"sentences": [{"start": 2.0, "end": 9.5, "text": "a thing"}, {"start": 4.0, "end": 5, "text": "a thing"}]}
    (batch,) = batches(tmp_path, sample("a", record, "frames.npz", features(20)), FEATS, windows=3)
    rows = [row[mask].flatten().tolist() for row, mask in zip(batch.visual.feats, batch.visual.mask, strict=True)]  # type: ignore[arg-type]
    assert rows == [[2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9], *[[4, 5]] * 3]


def test_ranks_share_the_samples_and_unusable_ones_are_counted(tmp_path: Path) -> None:
    data = clip(counting(20))
    late = {"sentences": [{"start": 0.0, "end": 1.0, "text": "a thing"}, {"start": 7.0, "end": 8.0, "text": "a thing"}]}
    members = sample("a", TIMED, "mp4", data) + sample("b", late, "mp4", data) + sample("c", TIMED, "mp4", data[:900])
    members += sample("d", TIMED, "mp4", data) + sample("e", TIMED, "mp4", data)
    found: dict[int, list[int]] = {}
    for rank in range(2):
        mine = batches(tmp_path, members, PIXELS, rank=rank, world=2, limit=4, batch=4, windows=2)
        sizes = []
        for batch in mine:
            sizes.append(len(batch.index))
            found.setdefault(rank, []).extend((batch.index // MAX_CAPTIONS).tolist())
        assert max(sizes) == 2  # of two windows each
        assert mine.skipped == 1
        assert ("is cut short", "from 7 s to 8 s")[rank] in str(mine.broken)
    assert found == {0: [0, 0], 1: [1, 3, 3]}


class Looker(nn.Module):
    """Embeds a clip as the mean colour of its first frame, times a number, and a text as its first id beside 10."""

    def __init__(self, *offers: str) -> None:
        super().__init__()
        self.offers = frozenset({"text", "visual", "embed", *offers})

    def encode_visual(self, visual: Visual) -> Stream:
        embed = visual.feats[:, 0, :2].float().mean(dim=(2, 3))
        return Stream(embed[:, None], None, embed)

    def encode_text(self, text: Text) -> Stream:
        embed = text.ids[:, :2].float()
        return Stream(embed[:, None], text.mask, embed)


def colours(*rows: tuple[int, int]) -> Visual:
    """A window of one frame for each (red, green)."""
    feats = torch.tensor([[red, green, 0] for red, green in rows], dtype=torch.uint8)
    return Visual(
        feats[:, None, :, None, None].expand(-1, 3, -1, 2, 2), torch.tensor([[True, True, False]] * len(rows))
    )


@pytest.mark.parametrize(("offers", "places"), [((), 1), (("temperature",), 2)])
def test_lengths_count_where_no_temperature_is_trained(offers: tuple[str, ...], places: int) -> None:
    """And windows are averaged before anything is compared."""
    ids = torch.tensor([[10, 1], [1, 10]])
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool))
    visual = colours((100, 60), (180, 80), (10, 0), (10, 2))  # means (140, 70) and (10, 1): longer, and nearer
    batch = RetrievalBatch(visual, text, torch.tensor([0, 1]), torch.tensor([0, 1]), windows=2)
    found = evaluate(Looker(*offers), [batch], CPU, decode=str)
    assert found.metrics["eval/retrieval/candidates"] == 2
    # dot products of the captions with the clips: 1470, 101 and 840, 20; cosines: .94, 1.0 and .53, .20
    assert [example.rank for example in found.examples] == [places, 2]
    assert tuple(found.examples[0].picture.shape) == (3, 2, 4)  # two real frames beside one another
