"""A family small enough to judge its twin number by number, and runs of it under every engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import engines
from tests.states import whole_weights
from vlscale import distributed
from vlscale.engine import DeepSpeedEngine, Engine
from vlscale.families.base import Family
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.nn import momentum
from vlscale.nn.transformer import Stack
from vlscale.objectives.base import Objective
from vlscale.optim import OptimConfig
from vlscale.types import Batch, Dims, Inputs, Loss, Moment, Stream, Visual

OPTIM = OptimConfig(weight_decay=0.1, eps=1e-4, clip=1.0)
RATE = 1e-2
SAMPLES = 8  # of a step, over all ranks and micro-batches


@dataclass(frozen=True)
class Options:
    """What a toy has."""

    width: int = 7  # odd, so that no parameter ends where a rank's part ends
    layers: int = 2
    norm: bool = False  # BatchNorm behind the entry
    frozen: bool = False  # the entry does not learn
    copies_buffers: bool = True
    drop: float = 0.0  # chance of a layer of the twin to be skipped


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Toy(Family):
    """entry -> norm -> stack -> exit; the exit's weight is the entry's."""

    offers = frozenset({"visual"})

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.dims = Dims(0, options.width, 0)
        self.inputs = Inputs(0, 0, False)
        self.entry = nn.Linear(options.width, options.width)
        self.norm = nn.BatchNorm1d(options.width) if options.norm else nn.Identity()
        self.stack = Stack(Layer(options.width) for _ in range(options.layers))
        self.exit = nn.Linear(options.width, options.width)
        self.exit.weight = self.entry.weight
        if options.frozen:
            self.entry.requires_grad_(False)

    def encode_visual(self, visual: Visual) -> Stream:
        """feats [B, F] -> [B, D]."""
        hidden = self.norm(self.entry(visual.feats.to(self.entry.bias.dtype)))
        return Stream(self.exit(self.stack(hidden)), None)


class Agree(Objective):
    """A head [D] -> [D] (it has no twin) that meets a target and, below it, the twin."""

    needs = frozenset({"visual"})
    momentum = True
    views = frozenset({"visual.clean"})

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, width)

    def forward(self, enc: Any, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        own, twin = enc.visual("clean").hidden, enc.momentum.visual("clean").hidden
        target = batch.visual["clean"].feats.to(own.dtype).flip(1)
        value = F.mse_loss(self.head(own).float(), target.float()) + 0.1 * F.mse_loss(own.float(), twin.float())
        return Loss(value, {})


def model_of(options: Options) -> PretrainModel:
    torch.manual_seed(0)
    model = PretrainModel(Toy(options), {"agree": Agree(options.width)})
    model.copies_buffers = options.copies_buffers
    return model


def batch_of(options: Options, step: int, part: int = 0, parts: int = 1) -> Batch:
    """One of the equal parts of a step's samples."""
    feats = torch.randn(SAMPLES, options.width, generator=torch.Generator().manual_seed(step))
    own = feats.chunk(parts)[part]
    return Batch({}, {"clean": Visual(own)}, torch.arange(len(own)))


def configuration(name: str, precision: str, accumulation: int = 1) -> dict[str, Any]:
    micro_batch = SAMPLES // accumulation // distributed.world_size()
    return engines.configuration(name, SAMPLES, micro_batch, OPTIM.clip, precision)


def engine_of(options: Options, name: str, precision: str = "fp32", accumulation: int = 1) -> DeepSpeedEngine:
    """The toy on this rank, under the ds_config `name`."""
    config = configuration(name, precision, accumulation)
    zero = config["zero_optimization"]
    if zero["stage"] == 3:  # biases are kept whole on every rank, matrices are not
        config["zero_optimization"] = {**zero, "stage3_param_persistence_threshold": 4 * options.width}
    return DeepSpeedEngine(model_of(options), config, OPTIM, distributed.init())


def train(
    engine: Engine, options: Options, steps: range, coefficient: float = 0.9, accumulation: int = 1, ranks: int = 1
) -> None:
    """Optimizer steps on this rank's part of the samples."""
    for step in steps:
        if options.drop:
            momentum.drop_layers(engine.model.twin, options.drop, 5, step)  # type: ignore[arg-type]
        for number in range(accumulation):
            batch = batch_of(options, step, number * ranks + distributed.rank(), accumulation * ranks)
            made = engine.forward(batch, Moment(step, 0, number, accumulation))
            engine.backward(engine.model.total(made.losses, {}), last=number == accumulation - 1)
        assert engine.step(RATE).applied
        engine.after_step(coefficient)


def weights_after(
    options: Options, name: str, steps: int, precision: str = "fp32", accumulation: int = 1
) -> dict[str, Tensor]:
    """Whole weights after some steps under DeepSpeed; for `run_ranks`."""
    engine = engine_of(options, name, precision, accumulation)
    train(engine, options, range(1, steps + 1), accumulation=accumulation, ranks=distributed.world_size())
    return whole_weights(engine)


def local_weights_after(options: Options, steps: int, accumulation: int = 1) -> dict[str, Tensor]:
    """The same by plain PyTorch on the joined batch."""
    engine = LocalEngine(model_of(options), OPTIM, torch.device("cpu"), accumulation)
    train(engine, options, range(1, steps + 1), accumulation=accumulation)
    return whole_weights(engine)


def twin(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The twin's own, by the names of the family."""
    return {name.removeprefix("twin."): tensor for name, tensor in weights.items() if name.startswith("twin.")}
