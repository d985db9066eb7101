"""One step of several micro-batches on any number of ranks, to hold against one batch in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tests.distributed.spawn import run_ranks
from tests.states import whole_buffers
from vlscale import distributed, two_pass
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.optim import OptimConfig
from vlscale.types import Batch, Moment, Text, Visual

Found = dict[str, Any]  # losses by objective, gradients by parameter, buffers by name


def part(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch, with all rows of each."""

    def cut(value: Any) -> Any:
        return None if value is None else value.unflatten(0, (len(batch), -1))[rows].flatten(0, 1)

    return replace(
        batch,
        text={view: Text(*map(cut, fields)) for view, fields in batch.text.items()},
        visual={view: Visual(*map(cut, fields)) for view, fields in batch.visual.items()},
        pair_id=batch.pair_id[rows],
        matched=cut(batch.matched),
        tags_swapped=cut(batch.tags_swapped),
        answers=cut(batch.answers),
    )


def make_step(make: Callable[[], PretrainModel], batch: Batch, number: int, sizes: Sequence[int] = ()) -> Found:
    """This rank's part of a step, in `number` micro-batches; all ranks find the same.

    `sizes` are those of all micro-batches of all ranks, one rank after the other; none = alike.
    """
    model, ranks = make(), distributed.world_size()
    machine = LocalEngine(model, OptimConfig(clip=0.0), torch.device("cpu"), accumulation=number)
    ends = list(accumulate(sizes or [len(batch) // number // ranks] * number * ranks, initial=0))
    places = [each * ranks + distributed.rank() for each in range(number)]
    batches = [part(batch, slice(ends[place], ends[place + 1])) for place in places]
    moments = [Moment(3, 7, each, number) for each in range(number)]
    counts = [model.counts(each) for each in batches]
    whole = distributed.sum_over_ranks({name: torch.stack([c[name] for c in counts]).sum() for name in counts[0]})
    shares = [{name: (n * number * ranks / whole[name]).float() for name, n in count.items()} for count in counts]
    if number > 1 and model.whole(batch.task):
        made = two_pass.passes(model, machine, batches, moments, shares)
    else:
        made = []
        for each, at, share in zip(batches, moments, shares, strict=True):
            made.append(machine.forward(each, at))
            machine.backward(model.total(made[-1].losses, share), last=at.number == number - 1)
    model.commit([each.keys for each in made], 3, "step")
    pairs = list(zip(made, shares, strict=True))
    losses = {
        name: sum(each.losses[name].value.detach() * share.get(name, 1.0) for each, share in pairs) / number
        for name in made[0].losses
    }
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {
        "losses": {name: over_ranks(torch.as_tensor(value)) for name, value in losses.items()},
        "gradients": {name: over_ranks(gradient) for name, gradient in gradients.items()},
        "buffers": whole_buffers(model),
    }


def over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks."""
    return distributed.gather([tensor.detach()[None]])[0].mean(dim=0)


def check_whole(
    make: Callable[[], PretrainModel], batch: Batch, world: int, number: int, sizes: Sequence[int] = ()
) -> None:
    """`world` ranks with `number` micro-batches each equal one process with one batch."""
    expected = make_step(make, batch, 1)
    cut = (make, batch, number, sizes)
    ranks = [make_step(*cut)] if world == 1 else run_ranks(make_step, world, *cut)
    for found in ranks:
        torch.testing.assert_close(found["losses"], expected["losses"])
        torch.testing.assert_close(found["buffers"], expected["buffers"])
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            difference = float((found["gradients"][name] - gradient).norm())
            # a key's bias has no gradient but for rounding, and the temperature's is a difference of large sums
            assert difference <= 1e-5 * float(gradient.norm()) + 2e-6, name
