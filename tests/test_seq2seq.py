"""Masked words read from the left: by hand, in both ways, without its worst samples, and what may not change it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.distributed.spawn import run_ranks
from tests.engines import configuration
from tests.models import batch_for
from tests.states import whole_weights
from tests.whole_steps import check_whole, over_ranks, part
from vlscale import distributed
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import ConfigError
from vlscale.families import clip, vlp
from vlscale.local_engine import LocalEngine
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import mlm, seq2seq
from vlscale.optim import OptimConfig
from vlscale.types import IGNORE, Batch, Moment


def model_of(**options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = vlp.build(replace(vlp.tiny(), dropout=0.0))
    model = PretrainModel(family, {"seq2seq": seq2seq.build(seq2seq.Config(**options), family)})
    with torch.no_grad():  # far from the start, where every state is nearly the same
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(padding: int = 0, size: int = 4) -> Batch:
    config = vlp.tiny()
    return batch_for(config.inputs, config.vocab, size, padding)


def encodings(model: PretrainModel, given: Batch) -> Encodings:
    return Encodings(model.family, given, Moment(1), {})


def labels(given: Batch) -> Tensor:
    found = given.text["masked"].labels
    assert found is not None
    return found


def losses(model: PretrainModel, given: Batch, causal: bool) -> Tensor:
    """[B, L], 0 where no word is hidden."""
    family, objective = model.family, model.objectives["seq2seq"]
    states = family.fuse(
        family.encode_text(given.text["masked"]), family.encode_visual(given.visual["clean"]), causal
    ).text
    assert states is not None
    head: Any = objective.head
    hidden = head.norm(F.gelu(states @ head.dense.weight.T + head.dense.bias))
    logits = hidden @ family.word_embedding.weight.T + head.bias
    chances = logits - logits.exp().sum(dim=2, keepdim=True).log()
    wanted = labels(given)
    terms = -chances.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    out: Tensor = terms * (wanted != IGNORE)
    return out


def loss_of(model: PretrainModel, given: Batch) -> Tensor:
    value: Tensor = model(given, Moment(1)).losses["seq2seq"].value
    return value


@pytest.mark.parametrize("causal", [True, False])
def test_by_hand(causal: bool) -> None:
    model, given = model_of(bidirectional=float(not causal)), batch()
    want = losses(model, given, causal).sum() / (labels(given) != IGNORE).sum()
    made = loss_of(model, given)
    torch.testing.assert_close(made, want)
    assert made.dtype == torch.float32
    assert model.counts(given)["seq2seq"] == (labels(given) != IGNORE).sum()
    weight = model.family.word_embedding.weight
    torch.testing.assert_close(torch.autograd.grad(made, weight), torch.autograd.grad(want, weight))


def test_both_ways_are_not_one() -> None:
    left, both = (loss_of(model_of(bidirectional=share), batch()).detach() for share in (0.0, 1.0))
    assert abs(float(left - both)) > 1e-3


def test_a_word_behind_a_hidden_one_does_not_matter() -> None:
    model, given = model_of(), batch()
    wanted = labels(given).clone()
    wanted[:, 3:] = IGNORE
    text = given.text["masked"]._replace(labels=wanted)
    changed = text._replace(ids=torch.where(torch.arange(text.ids.shape[1]) >= 3, 9, text.ids))
    first, second = (loss_of(model, replace(given, text={"masked": each})).detach() for each in (text, changed))
    torch.testing.assert_close(first, second)
    both = model_of(bidirectional=1.0)
    first, second = (loss_of(both, replace(given, text={"masked": each})).detach() for each in (text, changed))
    assert abs(float(first - second)) > 1e-4


@pytest.mark.parametrize(
    "whole", [[True, False, False, True], [False, True, True, True], [True] * 4, [False] * 4], ids=str
)
def test_each_sample_is_read_in_its_way(whole: list[bool]) -> None:
    model, given = model_of(bidirectional=0.5), batch()
    objective: Any = model.objectives["seq2seq"]
    objective.whole_text = lambda enc: torch.tensor(whole)
    both, left = losses(model, given, causal=False), losses(model, given, causal=True)
    terms = torch.where(torch.tensor(whole)[:, None], both, left)
    want = terms.sum() / (labels(given) != IGNORE).sum()
    made = loss_of(model, given)
    torch.testing.assert_close(made, want)
    weight = model.family.word_embedding.weight
    torch.testing.assert_close(torch.autograd.grad(made, weight), torch.autograd.grad(want, weight))


def test_the_share_read_both_ways() -> None:
    model = model_of(bidirectional=0.25)
    objective: Any = model.objectives["seq2seq"]
    given = replace(batch(), pair_id=torch.arange(4000))
    drawn = objective.whole_text(encodings(model, given))
    assert drawn.shape == (4000,)
    assert drawn.float().mean().item() == pytest.approx(0.25, abs=0.03)
    other = Encodings(model.family, given, Moment(2), {})
    assert not torch.equal(drawn, objective.whole_text(other))


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.75])
def test_worst_samples_do_not_count(ratio: float) -> None:
    model, given = model_of(drop_worst=ratio, scope="rank"), batch()
    terms = losses(model, given, causal=True).detach()
    kept = sorted(range(4), key=lambda row: float(terms[row].sum()))[: int(4 * (1 - ratio))]
    want = terms[kept].sum() / (labels(given)[kept] != IGNORE).sum()
    torch.testing.assert_close(loss_of(model, given), want)
    assert model.counts(given) == {}


@pytest.mark.parametrize("options", [{}, {"bidirectional": 0.5}, {"drop_worst": 0.5, "scope": "rank"}], ids=str)
def test_no_hidden_word_gives_zero(options: dict[str, Any]) -> None:
    model, given = model_of(**options), batch()
    text = given.text["masked"]._replace(labels=torch.full_like(given.text["masked"].ids, IGNORE))
    loss = loss_of(model, replace(given, text={"masked": text}))
    assert loss.item() == 0.0
    torch.autograd.backward(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_padding_cannot_change_the_loss(share: float) -> None:
    model = model_of(bidirectional=share)
    torch.testing.assert_close(*[loss_of(model, batch(padding)) for padding in (0, 2)])


def test_accuracy() -> None:
    model, given = model_of(), batch()
    objective: Any = model.objectives["seq2seq"]
    hidden = objective.states(encodings(model, given))
    best = objective.head(hidden, model.family.word_embedding.weight).argmax(dim=2)
    picked = labels(given) != IGNORE
    wanted = torch.where(picked & (torch.arange(picked.shape[1]) % 2 == 1), best, labels(given))
    text = given.text["masked"]._replace(labels=wanted)
    found = model(replace(given, text={"masked": text}), Moment(1)).losses["seq2seq"].metrics["seq2seq/accuracy"]
    torch.testing.assert_close(found, (best == wanted)[picked].float().mean())


def test_flops_and_passes() -> None:
    given = batch()
    hidden = int((labels(given) != IGNORE).sum())
    for share, fuse in ((0.0, "fuse"), (0.25, "fuse"), (1.0, "fuse:masked:clean")):
        objective: Any = model_of(bidirectional=share).objectives["seq2seq"]
        assert objective.passes() == dict.fromkeys(["encode_text:masked", "encode_visual:clean", fuse], 1.0)
        assert objective.head_flops(given) == (hidden * 2 * 16 * (16 + 64), 0)


@pytest.mark.parametrize("objective", [seq2seq.build(seq2seq.Config(), vlp.build(vlp.tiny()))])
def test_the_head_has_the_familys_epsilon(objective: seq2seq.Seq2Seq) -> None:
    assert objective.head.norm.eps == 1e-5
    assert mlm.build(mlm.Config(soften=0.0), vlp.build(vlp.tiny())).head.norm.eps == 1e-5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": 1.5}, r"\[0, 1\]"),
        ({"bidirectional": -0.1}, r"\[0, 1\]"),
        ({"drop_worst": 1.0, "scope": "rank"}, r"\[0, 1\)"),
        ({"drop_worst": 0.2}, "scope=rank"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(**options)


def test_a_family_that_cannot_read_from_the_left_is_refused() -> None:
    family = clip.build(clip.tiny())
    family.dims = replace(family.dims, fused=16)
    with pytest.raises(ConfigError, match="causal"):
        PretrainModel(family, {"seq2seq": seq2seq.build(seq2seq.Config(), family)})


def half_both_ways() -> PretrainModel:
    return model_of(bidirectional=0.5)


@pytest.mark.parametrize(("world", "number"), [(1, 4), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int) -> None:
    check_whole(half_both_ways, batch(size=8), world, number)


def series(zero3: bool) -> dict[str, list[float]]:
    """Losses and gradient norms of some steps with four samples, then the norms of the family's weights."""
    optim, ranks = OptimConfig(clip=5.0), distributed.world_size()
    if zero3:
        config = configuration("zero3", 4, 4 // ranks, optim.clip)
        engine: Any = DeepSpeedEngine(half_both_ways(), config, optim, distributed.init())
    else:
        engine = LocalEngine(half_both_ways(), optim, torch.device("cpu"))
    losses, norms, both = [], [], []
    for step in range(1, 6):
        size = 4 // ranks
        own = part(batch(), slice(distributed.rank() * size, (distributed.rank() + 1) * size)).to(engine.device)
        counts = engine.model.counts(own)
        whole = distributed.sum_over_ranks(counts)
        shares = {name: (count * ranks / whole[name]).float() for name, count in counts.items()}
        at = Moment(step, 7)
        loss = engine.model.total(engine.forward(own, at).losses, shares)
        engine.backward(loss, last=True)
        losses.append(float(over_ranks(loss)))
        norms.append(engine.step(1e-2).grad_norm)
        objective = engine.model.objectives["seq2seq"]
        both.append(int(objective.whole_text(Encodings(engine.model.family, own, at, {})).sum()))
    weights = sorted((name, float(weight.float().norm())) for name, weight in whole_weights(engine).items())
    kept = [norm for name, norm in weights if "key.bias" not in name]  # whose gradient is 0 but for rounding
    return {"losses": losses, "norms": norms, "weights": kept, "both": both}


def test_ranks_under_zero_3_equal_plain_pytorch() -> None:
    """Ranks meet as often, also where one of them has no sample to read in one of the two ways."""
    expected, found = series(zero3=False), run_ranks(series, 2, True)
    assert any({0, 2} & {each["both"][step] for each in found} for step in range(5)), "no such rank was drawn"
    assert [sum(both) for both in zip(*(each["both"] for each in found), strict=True)] == expected["both"]
    for each in found:
        for key in ("losses", "norms", "weights"):
            assert each[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
