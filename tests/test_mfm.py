"""Hidden frames found among other frames: by hand, with several clips a sample, with padding, and in parts.

tests/test_cbt.py has it on two ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.models import clips_for
from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.objectives import mfm
from vlscale.types import Batch, Dims, Fused, Inputs, Moment, Stream, Text, Visual, lengthened

SAMPLES, FRAMES, FEATS, WIDTH, LENGTH, VOCAB = 4, 6, 5, 8, 3, 10


class Clips(Family):
    """Frames through one layer that their features enter by; beside a text its mean word is added."""

    offers = frozenset({"text", "visual", "fuse", "regions", "tied_regions", "frames"})

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(FEATS)
        self.projection = nn.Linear(FEATS, WIDTH)
        self.mixing = nn.Linear(WIDTH, WIDTH)
        self.dims = Dims(WIDTH, WIDTH, WIDTH, vocab=VOCAB, feats=FEATS)
        self.inputs = Inputs(0, LENGTH, True, feats=FEATS, frames=FRAMES)

    @property
    def region_projection(self) -> nn.Linear:
        """F -> D."""
        return self.projection

    def encode_text(self, text: Text) -> Stream:
        """Words."""
        return Stream(self.words(text.ids), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """Frames, each of which knows of the others."""
        hidden = self.projection(self.norm(visual.feats))
        return Stream(hidden + self.mixing(hidden).tanh().mean(dim=1, keepdim=True), visual.mask)

    def frame_keys(self, visual: Visual) -> Tensor:
        """Normalised features."""
        assert visual.picked is None
        out: Tensor = self.norm(visual.feats)
        return out

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """Both."""
        assert text is not None
        assert visual is not None
        return Fused(None, visual.hidden + text.hidden.mean(dim=1, keepdim=True), None)


def model_of(**options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = Clips()
    return PretrainModel(family, {"mfm": mfm.build(mfm.Config(**{"head": "untied", **options}), family)})


def batch_of(samples: int = SAMPLES, clips: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(0)
    visual = clips_for(Clips().inputs, samples * clips, generator)
    ids = torch.randint(1, VOCAB, (samples * clips, LENGTH), generator=generator)
    return Batch({"clean": Text(ids, ids > 0)}, {"masked": visual["masked"]}, torch.arange(samples))


def loss_of(model: PretrainModel, batch: Batch) -> Tensor:
    return model(batch, Moment(1)).losses["mfm"].value


@pytest.mark.parametrize(
    ("candidates", "padding", "clips"),
    [
        ("all", "excluded", 1),
        ("all", "excluded", 2),
        ("video", "excluded", 1),
        ("video", "excluded", 2),
        ("hidden_and_predicted", "excluded", 1),
        ("hidden_and_predicted", "counted", 2),
    ],
)
def test_by_hand(candidates: str, padding: str, clips: int) -> None:
    options = {"candidates": candidates, "padding": padding, "scope": "rank", "temperature": 0.7}
    model, batch = model_of(**options), batch_of(clips=clips)
    loss = model(batch, Moment(1)).losses["mfm"]
    family, seen = model.family, batch.visual["masked"]
    assert seen.picked is not None
    assert seen.mask is not None
    assert seen.targets is not None
    states = family.fuse(family.encode_text(batch.text["clean"]), family.encode_visual(seen)).visual
    predicted = model.objectives["mfm"].head(states)  # type: ignore[operator]
    keys = F.layer_norm(seen.targets, (FEATS,), family.norm.weight, family.norm.bias)  # type: ignore
    terms, right, chances = [], [], []
    for row, frame in seen.picked.nonzero().tolist():
        own = predicted[row, frame] @ keys[row, frame] / 0.7
        others = []
        for other, place in torch.ones_like(seen.mask).nonzero().tolist():
            counts = seen.mask[other, place] or padding == "counted"
            if candidates == "video" and other // clips != row // clips:
                counts = False
            if not counts or (other, place) == (row, frame):
                continue
            raw = candidates != "hidden_and_predicted" or seen.picked[other, place]
            against = keys[other, place] if raw else predicted[other, place]
            others.append(predicted[row, frame] @ against / 0.7)
        terms.append(torch.logsumexp(torch.stack([own, *others]), dim=0) - own)
        right.append(bool(own > max(others)))
        chances.append(1 / (1 + len(others)))
    torch.testing.assert_close(loss.value, torch.stack(terms).mean())
    assert loss.metrics["mfm/accuracy"].item() == pytest.approx(sum(right) / len(right))
    assert loss.metrics["mfm/chance"].item() == pytest.approx(sum(chances) / len(chances))
    expected = torch.autograd.grad(torch.stack(terms).mean(), list(family.parameters()), retain_graph=True)
    found = torch.autograd.grad(loss.value, list(family.parameters()))
    torch.testing.assert_close(found, expected)  # keys learn too


def test_equal_frames_are_not_found() -> None:
    """A frame that looks like another is no better than it."""
    model, batch = model_of(scope="rank", candidates="video"), batch_of()
    seen = batch.visual["masked"]
    assert seen.targets is not None
    still = seen._replace(targets=seen.targets[:, :1].expand_as(seen.targets))
    loss = model(replace(batch, visual={"masked": still}), Moment(1)).losses["mfm"]
    assert loss.metrics["mfm/accuracy"] == 0
    assert loss.metrics["mfm/chance"] > 0.15


def test_the_tied_head_predicts_by_the_layer_that_features_enter_by() -> None:
    model, batch = model_of(head="tied", scope="rank"), batch_of()
    head: Any = model.objectives["mfm"].head
    states = torch.randn(3, WIDTH)
    made = head(states, model.family.projection.weight.T)  # type: ignore[operator, union-attr]
    inner = head.norm(F.gelu(head.dense(states)))
    torch.testing.assert_close(made, inner @ model.family.projection.weight + head.bias)  # type: ignore[operator]
    assert loss_of(model, batch) > 0
    assert "tied_regions" in model.objectives["mfm"].needs  # type: ignore[operator]


def test_frames_alone_ask_for_no_text() -> None:
    model, batch = model_of(states="visual"), batch_of()
    assert model.views() == {"visual.masked"}
    assert loss_of(model, replace(batch, text={})) > 0


@pytest.mark.parametrize("candidates", ["all", "video", "hidden_and_predicted"])
def test_padding_cannot_change_the_loss(candidates: str) -> None:
    model, batch = model_of(candidates=candidates, scope="rank"), batch_of()
    values = []
    for filling, length in ((0.0, FRAMES), (0.0, FRAMES + 3), (7.0, FRAMES + 3)):
        wide = batch.visual["masked"]
        wide = Visual(*(None if each is None else lengthened(each, length) for each in wide))  # type: ignore[arg-type]
        assert wide.mask is not None
        assert wide.targets is not None
        pad = ~wide.mask[:, :, None]
        targets = wide.targets.masked_fill(pad, filling)
        model.family.mixing.weight.data.zero_()  # type: ignore[union-attr,operator] # it would see padding
        model.family.mixing.bias.data.zero_()  # type: ignore[union-attr,operator]
        values.append(loss_of(model, replace(batch, visual={"masked": wide._replace(targets=targets)})))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    assert values[0] > 0


@pytest.mark.parametrize("candidates", ["all", "video", "hidden_and_predicted"])
def test_nothing_hidden_gives_zero_and_no_gradient(candidates: str) -> None:
    model, batch = model_of(candidates=candidates, scope="rank"), batch_of()
    seen = batch.visual["masked"]
    loss = loss_of(model, replace(batch, visual={"masked": seen._replace(picked=torch.zeros_like(seen.mask))}))  # type: ignore
    assert loss.item() == 0.0
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def test_of_a_towers_windows_the_first_frame_tells() -> None:
    family = Clips()
    family.inputs = replace(family.inputs, frames=8, window=4)
    objective = mfm.build(mfm.Config(), family)
    mask = torch.tensor([[True] * 8, [True] * 4 + [False] * 4])
    picked = torch.tensor([[False, True, True, True, True, False, False, False], [False] * 4 + [True] * 4])
    batch = Batch({}, {"masked": Visual(torch.zeros(2, 8, 3, 2, 2), mask, picked=picked)}, torch.arange(2))
    assert objective.picked(batch).tolist() == [[False, True], [False, False]]
    assert objective.count(batch) == 1


def test_refused() -> None:
    with pytest.raises(ConfigError, match=r"states are 8 wide and the keys 5; write head=untied"):
        model_of(head="none")
    with pytest.raises(ConfigError, match=r"write scope=rank"):
        model_of(candidates="hidden_and_predicted")
    with pytest.raises(ConfigError, match=r"leave padding out"):
        model_of(padding="counted")
    with pytest.raises(ConfigError, match=r"temperature should be above 0"):
        model_of(temperature=0.0)


def whole_model() -> PretrainModel:
    return model_of(scope="global")


def whole_videos() -> PretrainModel:
    return model_of(candidates="video")


@pytest.mark.parametrize(("make", "sizes"), [(whole_model, ()), (whole_videos, (3, 5))])
def test_a_step_in_micro_batches_equals_one_batch(make: Any, sizes: tuple[int, ...]) -> None:
    check_whole(make, batch_of(8, clips=2), 1, 2, sizes)


@pytest.mark.parametrize("candidates", ["all", "video", "hidden_and_predicted"])
def test_head_flops_equal_torchs_counter(candidates: str) -> None:
    model, batch = model_of(candidates=candidates, scope="rank"), batch_of()
    with FlopCounterMode(display=False) as counter:
        model(batch, Moment(1))
    with FlopCounterMode(display=False) as passes:
        family = model.family
        family.fuse(family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["masked"]))
    own = counter.get_total_flops() - passes.get_total_flops()
    assert model.objectives["mfm"].head_flops(batch) == (own, 0)  # type: ignore[operator]
