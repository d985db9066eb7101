"""Texts beside clips, all with all: by hand, both ways, in blocks, with several clips a sample, and in parts.

tests/test_cbt.py has it on two ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import batch_for
from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families import cbt
from vlscale.model import PretrainModel
from vlscale.objectives import pair_nce
from vlscale.types import Batch, Moment

FAMILY = replace(cbt.tiny(), dropout=0.0, init_scale=8.0)


def model_of(family: cbt.Config = FAMILY, **options: Any) -> PretrainModel:
    torch.manual_seed(0)
    network = cbt.build(family)
    model = PretrainModel(network, {"pair_nce": pair_nce.build(pair_nce.Config(**options), network)})
    nn.init.normal_(model.objectives["pair_nce"].score.weight)  # type: ignore[union-attr, arg-type]
    return model


def batch_of(samples: int = 4, clips: int = 1) -> Batch:
    """Several clips a sample: the rows of one sample stand together."""
    batch = batch_for(FAMILY.inputs, FAMILY.vocab, samples * clips)
    return replace(batch, pair_id=torch.arange(samples), answers=None)


def loss_of(model: PretrainModel, batch: Batch) -> Tensor:
    return model(batch, Moment(1)).losses["pair_nce"].value


@pytest.mark.parametrize("direction", ["text_to_video", "video_to_text"])
@pytest.mark.parametrize(("hidden", "clips"), [(0, 1), (5, 2)])
def test_by_hand(direction: str, hidden: int, clips: int) -> None:
    model, batch = model_of(direction=direction, hidden=hidden), batch_of(3, clips)
    objective: Any = model.objectives["pair_nce"]
    family = model.family
    text, visual = family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["clean"])
    rows = 3 * clips
    scores = torch.empty(rows, rows)
    for i in range(rows):
        for j in range(rows):
            one = type(text)(text.hidden[i : i + 1], text.mask[i : i + 1])  # type: ignore[index]
            other = type(text)(visual.hidden[j : j + 1], visual.mask[j : j + 1])  # type: ignore[index]
            pooled = family.fuse(one, other).pooled
            inner = F.gelu(objective.dense(pooled)) if hidden else pooled
            scores[i, j] = objective.score(inner)[0, 0]
    scores = scores if direction == "text_to_video" else scores.T
    expected = -scores.log_softmax(dim=1).diagonal().mean()
    loss = model(batch, Moment(1)).losses["pair_nce"]
    torch.testing.assert_close(loss.value, expected)
    assert loss.metrics["pair_nce/accuracy"].item() == pytest.approx(
        float((scores.argmax(dim=1) == torch.arange(rows)).float().mean())
    )
    assert loss.metrics["pair_nce/chance"].item() == pytest.approx(1 / rows)


def test_equal_scores_are_no_hit() -> None:
    model, batch = model_of(), batch_of()
    nn.init.zeros_(model.objectives["pair_nce"].score.weight)  # type: ignore[union-attr, arg-type]
    assert model(batch, Moment(1)).losses["pair_nce"].metrics["pair_nce/accuracy"] == 0


@pytest.mark.parametrize(("dropout", "block"), [(0.0, 3), (0.3, 16)])
def test_blocks_change_nothing(dropout: float, block: int) -> None:
    """What is made again drops what was dropped the first time; 16 are all pairs."""
    found = []
    for size in (0, block):
        model = model_of(replace(FAMILY, dropout=dropout), block=size)
        torch.manual_seed(1)
        loss = loss_of(model, batch_of())
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)])
    torch.testing.assert_close(*found)


def test_a_block_holds_the_activations_of_its_pairs_alone() -> None:
    """Numbers kept for the backward pass."""
    kept = {}
    for block in (0, 4):
        numbers = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of(model_of(block=block), batch_of(8))
        kept[block] = numbers
    assert kept[4] < 0.3 * kept[0]


def test_padding_cannot_change_the_loss() -> None:
    values = [loss_of(model_of(), batch_for(FAMILY.inputs, FAMILY.vocab, padding=padding)) for padding in (0, 3)]
    torch.testing.assert_close(*values)


def test_refused() -> None:
    with pytest.raises(ConfigError, match=r"pair_nce.block should be at least 0 \(got -1\)"):
        model_of(block=-1)
    several = batch_of(4)
    text = several.text["clean"]
    doubled = text._replace(ids=text.ids.repeat(2, 1), mask=text.mask.repeat(2, 1))
    with pytest.raises(ConfigError, match=r"pairs 8 texts \(view 'clean'\) with 4 clips"):
        loss_of(model_of(), replace(several, text={"clean": doubled}))


def whole_texts() -> PretrainModel:
    return model_of(scope="global", block=5)


def whole_clips() -> PretrainModel:
    return model_of(scope="global", direction="video_to_text", hidden=4)


@pytest.mark.parametrize("make", [whole_texts, whole_clips])
def test_a_step_in_micro_batches_equals_one_batch(make: Any) -> None:
    check_whole(make, batch_of(4, clips=2), 1, 2)


def test_head_flops_equal_torchs_counter() -> None:
    model, batch = model_of(hidden=5), batch_of()
    family = model.family
    assert batch.visual["clean"].feats.shape[1] == FAMILY.frames  # `flops` are of the most
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as passes:
        family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["clean"])
    own = counter.get_total_flops() - passes.get_total_flops()
    assert model.objectives["pair_nce"].head_flops(batch) == (own, 0)  # type: ignore[operator]
