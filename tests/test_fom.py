"""Frame order: which places are asked, and what their answers are; the frames that change places in the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.models import batch_for
from vlscale.data.augment import OptionError
from vlscale.data.frames import Frames, FrameView, MaskFrames, ShuffleFrames
from vlscale.errors import ConfigError
from vlscale.families import hero
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import fom
from vlscale.types import Batch, Moment

TINY = replace(hero.tiny(), dropout=0.0, init_scale=8.0)


def model_of(places: int = 6) -> tuple[PretrainModel, fom.Fom]:
    torch.manual_seed(0)
    family = hero.build(TINY)
    objective = fom.build(fom.Config(places=places), family)
    return PretrainModel(family, {"fom": objective}), objective


def batch_of(order: list[int], chosen: list[int], padding: int = 0) -> Batch:
    """Two videos of 6 and 5 frames, both shuffled alike."""
    batch = batch_for(TINY.inputs, TINY.vocab, size=2, padding=padding)
    picked = torch.zeros(2, 6, dtype=torch.bool)
    picked[:, chosen] = True
    clean = batch.visual["clean"]
    return replace(batch, visual={"shuffled": clean._replace(order=torch.tensor([order] * 2), picked=picked)})


def test_a_place_is_asked_whose_frame_stands_there() -> None:
    """Frame 0 has gone to place 2, 2 to 4, 4 to 0; frame 3 was chosen and stayed; of the shorter video all are real."""
    _, objective = model_of()
    batch = batch_of([2, 1, 4, 3, 0, 5], [0, 2, 3, 4])
    assert objective.labels(batch).tolist() == [4, 0, 3, 2] * 2
    counted = objective.count(batch)
    assert counted is not None
    assert int(counted) == 8


def test_the_loss_is_the_mean_over_chosen_frames() -> None:
    model, objective = model_of(places=9)
    batch = batch_of([2, 1, 4, 3, 0, 5], [0, 2, 4])
    loss = model(batch, Moment(1)).losses["fom"]
    states = Encodings(model.family, batch, Moment(1), {}).fused("clean", "shuffled").visual
    assert states is not None
    head, terms = objective.head, []
    for video in range(2):
        for place, frame in ((0, 4), (2, 0), (4, 2)):
            inner = F.layer_norm(
                F.gelu(head.dense(states[video, place])), (32,), head.norm.weight, head.norm.bias, 1e-5
            )
            terms.append(-head.decoder(inner).log_softmax(dim=0)[frame])
    torch.testing.assert_close(loss.value, torch.stack(terms).mean())
    assert head.decoder.out_features == 9


def test_nothing_chosen_costs_nothing() -> None:
    model, _ = model_of()
    loss = model(batch_of([0, 1, 2, 3, 4, 5], []), Moment(1)).losses["fom"]
    assert float(loss.value.detach()) == 0.0


def test_padding_changes_nothing() -> None:
    model, _ = model_of()
    loss, longer = (model(batch_of([1, 0, 2, 3, 4, 5], [0, 1], n), Moment(1)).losses["fom"].value for n in (0, 3))
    torch.testing.assert_close(loss, longer)


def test_a_clip_may_not_have_more_frames_than_places() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.fom\.places is 5, but a clip may have family\.frames 6"):
        model_of(places=5)


def test_frames_change_places_among_themselves() -> None:
    frames = Frames(np.arange(400, dtype=np.float32).reshape(200, 2))
    view = FrameView(shuffle_frames=ShuffleFrames(0.15))
    made, again = (view(frames, np.random.default_rng(7)) for _ in range(2))
    assert made.picked is not None
    assert made.order is not None
    assert again.order is not None
    assert 10 < made.picked.sum() < 60
    assert sorted(made.order) == list(range(200))
    assert np.array_equal(np.sort(made.order[made.picked]), np.flatnonzero(made.picked))
    assert np.array_equal(made.order[~made.picked], np.flatnonzero(~made.picked))
    assert (made.order != np.arange(200)).sum() > 5
    assert np.array_equal(made.order, again.order)
    assert np.array_equal(made.feats, frames.feats)


def test_frames_are_not_hidden_and_shuffled_in_one_view() -> None:
    with pytest.raises(OptionError):
        FrameView(mask_frames=MaskFrames(), shuffle_frames=ShuffleFrames())
