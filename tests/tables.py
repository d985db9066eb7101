"""A family whose embeddings are rows of a table, so that tests see the gradient of every single one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vlscale import distributed, two_pass
from vlscale.families.base import Family
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.nn.temperature import Temperature
from vlscale.objectives.base import Objective
from vlscale.optim import OptimConfig
from vlscale.types import Batch, Dims, Inputs, Moment, Stream, Text, Visual

Gradients = dict[str, Tensor]


class Tables(Family):
    """Pictures and texts name rows of two tables [n, E]; not normalised."""

    offers = frozenset({"text", "visual", "embed", "temperature"})

    def __init__(self, image: Tensor, text: Tensor, temperature: float = 0.5) -> None:
        super().__init__()
        width = image.shape[1]
        self.dims = Dims(width, width, width, embed=width)
        self.inputs = Inputs(0, 1, False)
        self.temperature = Temperature(temperature, 0.01, 2.0)
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)

    def encode_text(self, text: Text) -> Stream:
        embed = self.text[text.ids[:, 0]]
        return Stream(embed[:, None], text.mask, embed)

    def encode_visual(self, visual: Visual) -> Stream:
        embed = self.image[visual.feats[:, 0]]
        return Stream(embed[:, None], None, embed)


def tables(number: int, width: int = 6, candidates: int = 1, seed: int = 0) -> Tables:
    """Random rows for `number` pictures and `candidates` texts of each."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(number, width, generator=generator)
    return Tables(image, torch.randn(number * candidates, width, generator=generator))


def rows(first: int, number: int, candidates: int = 1) -> Batch:
    """The micro-batch of pictures first, first + 1, ... and their texts."""
    pictures = torch.arange(first, first + number)
    texts = torch.arange(first * candidates, (first + number) * candidates)[:, None]
    return Batch(
        text={"clean": Text(texts, torch.ones_like(texts, dtype=torch.bool))},
        visual={"clean": Visual(pictures[:, None])},
        pair_id=pictures,
    )


def step(
    build: Callable[[Tables], Mapping[str, Objective]], family: Tables, size: int, of: int, candidates: int = 1
) -> tuple[Tensor, Gradients]:
    """This rank's part of one step on ALL of the family's rows, in `of` micro-batches of `size` pictures per rank:
    the mean loss of its micro-batches, and its gradients before the mean over ranks."""
    model = PretrainModel(family, build(family))
    machine = LocalEngine(model, OptimConfig(no_decay=()), torch.device("cpu"), accumulation=of)
    firsts = [(number * distributed.world_size() + distributed.rank()) * size for number in range(of)]
    batches = [rows(first, size, candidates) for first in firsts]
    moments = [Moment(1, 0, number, of) for number in range(of)]
    if of > 1:
        passes = two_pass.passes(model, machine, batches, moments, [{}] * of)
    else:
        passes = [machine.forward(batches[0], moments[0])]
        machine.backward(model.total(passes[0].losses, {}), last=True)
    loss = torch.stack([model.total(each.losses, {}).detach() for each in passes]).mean()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return loss, gradients


def mean(results: list[tuple[Tensor, Gradients]]) -> tuple[Tensor, Gradients]:
    """What engines make of the ranks' results."""
    losses, gradients = zip(*results, strict=True)
    return torch.stack(losses).mean(), {
        name: torch.stack([each[name] for each in gradients]).mean(dim=0) for name in gradients[0]
    }
