"""A step of micro-batches whose objectives look at the whole batch is as exact as one large batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import albef_batch
from tests.whole_steps import check_whole, part
from vlscale import two_pass
from vlscale.families import albef
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.objectives import itc, itm, mlm
from vlscale.optim import OptimConfig
from vlscale.types import Batch, Moment

DEVICE = torch.device("cpu")


def build(dropout: float = 0.0, queue: int = 0) -> PretrainModel:
    torch.manual_seed(0)
    family = albef.build(replace(albef.tiny(), dropout=dropout))
    objectives = {
        "itc": itc.build(itc.Config(queue=queue, soften=0.4 if queue else 0.0, scope="global"), family),
        "itm": itm.build(itm.Config(keys="momentum" if queue else "online", scope="global"), family),
        "mlm": mlm.build(mlm.Config(soften=0.4 if queue else 0.0), family),
    }
    return PretrainModel(family, objectives)


def step(model: PretrainModel, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of one step."""
    number = len(batches)
    engine = LocalEngine(model, OptimConfig(), DEVICE, accumulation=number)
    counts = [model.counts(batch)["mlm"] for batch in batches]
    shares = [{"mlm": (count * number / torch.stack(counts).sum()).float()} for count in counts]
    moments = [Moment(2, 7, each, number) for each in range(number)]
    if number == 1:
        made = [engine.forward(batches[0], moments[0])]
        engine.backward(model.total(made[0].losses, shares[0]), last=True)
    else:
        made = two_pass.passes(model, engine, batches, moments, shares)
    loss = sum(float(model.total(each.losses, share).detach()) for each, share in zip(made, shares, strict=True))
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss / number, found


@pytest.mark.parametrize("queue", [0, 40])
def test_eight_micro_batches_of_eight_equal_one_batch_of_64(queue: int) -> None:
    check_whole(lambda: build(queue=queue), albef_batch(size=64), world=1, number=8)


def test_captions_of_other_lengths_in_each_micro_batch() -> None:
    whole = albef_batch(size=8)
    _, expected = step(build(), [whole])
    parts = [part(whole, slice(0, 4)), part(whole, slice(4, 8))]
    longer = {view: text._replace(**_padded(text)) for view, text in parts[1].text.items()}
    _, found = step(build(), [parts[0], replace(parts[1], text=longer)])
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-7, name


def _padded(text: Any) -> dict[str, Tensor]:
    pad = {"ids": 0, "mask": False, "labels": -100}
    fields = {name: getattr(text, name) for name in pad}
    return {
        name: torch.nn.functional.pad(value, (0, 3), value=pad[name])
        for name, value in fields.items()
        if value is not None
    }


def test_dropout_falls_as_it_fell_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dropout=0.3)
    plain, seen = model.family.encode_text, []

    def watched(text: Any) -> Any:
        out = plain(text)
        if text.labels is None:  # the clean view; the masked one is encoded once
            seen.append(out.hidden.detach().clone())
        return out

    monkeypatch.setattr(model.family, "encode_text", watched)
    whole = albef_batch(size=8)
    step(model, [part(whole, slice(0, 4)), part(whole, slice(4, 8))])
    first, second, again, again_second = seen
    assert torch.equal(first, again)
    assert torch.equal(second, again_second)
    assert not torch.equal(first, second)
    free = plain(part(whole, slice(0, 4)).text["clean"]).hidden
    assert not torch.equal(first, free)  # dropout is on


def test_a_stream_that_share_did_not_ask_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(itm.Itm, "share", lambda self, enc, batch: (batch.pair_id,))
    monkeypatch.setattr(itc.Itc, "share", lambda self, enc, batch: (batch.pair_id,))
    whole = albef_batch(size=8)
    with pytest.raises(AssertionError, match="`share` asks for the visual stream 'clean'"):
        step(model, [part(whole, slice(0, 4)), part(whole, slice(4, 8))])
