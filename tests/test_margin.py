"""Max-margin ranking: by hand, over ranks and micro-batches, in blocks, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.spawn import run_ranks
from tests.tables import Gradients, Tables, mean, rows, step, tables
from vlscale import distributed
from vlscale.errors import ConfigError, DataError
from vlscale.model import PretrainModel
from vlscale.objectives import margin
from vlscale.objectives.base import Objective
from vlscale.types import Batch, Loss, Moment

N_PAIR = 3  # clips of a video


def objectives(family: Tables, **options: Any) -> dict[str, Objective]:
    return {"margin": margin.build(margin.Config(**options), family)}


def videos(first: int, number: int, clips: int) -> Batch:
    """The micro-batch of videos first, first + 1, ..., each of so many clips with one caption each."""
    batch = rows(first * clips, number * clips)
    return replace(batch, pair_id=torch.arange(first, first + number))


def loss_of(family: Tables, number: int, clips: int, **options: Any) -> Loss:
    found: dict[str, Loss] = PretrainModel(family, objectives(family, **options))(
        videos(0, number, clips), Moment(1)
    ).losses
    return found["margin"]


def wanted(family: Tables, number: int, clips: int, rate: float | None) -> Tensor:
    """The authors' formula, pair by pair."""
    scores, total = family.text @ family.image.T, torch.zeros(())
    size = number * clips
    for i in range(size):
        for j in range(size):
            same = i // clips == j // clips
            weight = 1.0
            if rate is not None and clips > 1:
                weight = number * rate if same else number * (1 - rate) / (number - 1)
            own = (0.1 + scores[i, j] - scores[i, i]).relu() + (0.1 + scores[i, j] - scores[j, j]).relu()
            total = total + weight * own
    return total / size**2


def test_by_hand() -> None:
    family = Tables(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [1.0]]))
    # scores: caption 1 has 0.5 and 1, caption 2 has 1 and 2; the diagonal is 0.5 and 2
    first = [0.1, 0.1 + 1 - 0.5, 0, 0.1]  # against the caption's own clip
    second = [0.1, 0, 0.1 + 1 - 0.5, 0.1]  # against the clip's own caption
    found = loss_of(family, 2, 1)
    assert float(found.value.detach()) == pytest.approx((sum(first) + sum(second)) / 4, rel=1e-6)
    assert float(found.metrics["margin/accuracy"]) == 0.5  # caption 1 likes clip 2 better


@pytest.mark.parametrize("rate", [0.5, 0.2, 0.0, None])
def test_weights_of_the_own_video(rate: float | None) -> None:
    family = tables(4 * N_PAIR)
    found, want = loss_of(family, 4, N_PAIR, same_video=rate).value, wanted(family, 4, N_PAIR, rate)
    torch.testing.assert_close(found, want)
    if rate is not None:
        assert abs(float((found - wanted(family, 4, N_PAIR, None)).detach())) > 1e-3


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tables(4 * N_PAIR), tables(4 * N_PAIR)
    loss_of(whole, 4, N_PAIR).value.backward()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(margin, "BLOCK", 5 * 4 * N_PAIR)  # five columns at a time
    found = loss_of(parts, 4, N_PAIR)
    torch.testing.assert_close(found.value, wanted(parts, 4, N_PAIR, 0.5))
    found.value.backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_normalised() -> None:
    family = tables(4)
    unit = Tables(*(torch.nn.functional.normalize(each.detach(), dim=1) for each in (family.image, family.text)))
    torch.testing.assert_close(loss_of(family, 4, 1, normalize=True).value, wanted(unit, 4, 1, None))


def on_rank(size: int, of: int) -> tuple[Tensor, Gradients]:
    return step(objectives, tables(8), size, of)


@pytest.mark.parametrize(("world", "of"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_ranks_and_micro_batches_are_one_large_batch(world: int, of: int) -> None:
    found = mean(run_ranks(on_rank, world, 8 // world // of, of) if world > 1 else [on_rank(8 // of, of)])
    family = tables(8)
    loss = wanted(family, 8, 1, 0.5)
    torch.testing.assert_close(found[0], loss.detach())
    image, text = torch.autograd.grad(loss, [family.image, family.text])
    for name, gradient in (("family.image", image), ("family.text", text)):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found[1][name], gradient)


def gradients(first: int, number: int) -> tuple[Tensor, Gradients]:
    """Of four videos of several clips, a rank's part."""
    family = tables(4 * N_PAIR)
    model = PretrainModel(family, objectives(family))
    loss = model(videos(first, number, N_PAIR), Moment(1)).losses["margin"].value
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def on_rank_with_clips() -> tuple[Tensor, Gradients]:
    return gradients(2 * distributed.rank(), 2)


def test_ranks_with_several_clips_of_a_video_are_one_large_batch() -> None:
    found, (loss, whole) = mean(run_ranks(on_rank_with_clips, 2)), gradients(0, 4)
    torch.testing.assert_close(found[0], loss)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[1][name], gradient)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="same_video should be from 0 and below 1"):
        margin.Config(same_video=1.0)
    with pytest.raises(DataError, match=r"sees one video; write data\.batch=2"):
        loss_of(tables(N_PAIR), 1, N_PAIR)
    family = tables(4, candidates=2)
    with pytest.raises(DataError, match=r"8 captions .* for 4 clips; give every clip one caption"):
        PretrainModel(family, objectives(family))(rows(0, 4, 2), Moment(1))
