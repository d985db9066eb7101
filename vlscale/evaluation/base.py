"""The contract of an evaluation task: its file holds `measure(HeldOut) -> Found`; the folder is the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vlscale.nn.transformer import Stack

if TYPE_CHECKING:
    from vlscale.data.micro_batches import Preprocessing
    from vlscale.data.shards import Shards
    from vlscale.data.text import Tokenizer
    from vlscale.families.base import Family
    from vlscale.model import PretrainModel

T = TypeVar("T")


@dataclass(frozen=True)
class HeldOut:
    """A model, and the samples that it is measured on; the same on every rank but for `device`."""

    model: PretrainModel
    device: torch.device
    shards: Shards
    tokenizer: Tokenizer
    preprocessing: Preprocessing  # what training makes of samples
    batch: int  # samples of a rank at a time
    limit: int  # samples at most; 0 = all
    windows: int = 1  # of a clip, whose embeddings are averaged
    beat: Callable[[], object] = bool  # called for every batch: a sign of life

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with a sign of life before each."""
        for batch in batches:
            self.beat()
            yield batch


class Example(NamedTuple):
    """A picture, one of its captions, and the picture's place when the caption asks for it."""

    picture: Tensor  # [3, H, W], as the family was given it; of a clip some of its frames beside one another
    caption: str
    rank: int


class Found(NamedTuple):
    """What an evaluation found, the same on every rank but for `examples`, which rank 0 has."""

    metrics: dict[str, float]  # `eval/<task>/<metric>`
    examples: list[Example]


def usual_task(family: Family) -> str:
    """What a family is measured by where nobody says: retrieval if it embeds, else its own objectives."""
    return "retrieval" if "embed" in family.offers else "pretext"


@contextmanager
def evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside: no gradient, no dropout, all layers of the twin, random numbers of its own. Outside nothing changes."""
    modes = {part: part.training for part in module.modules()}
    kept = {part: part.kept for part in module.modules() if isinstance(part, Stack)}
    module.eval()
    for stack in kept:
        stack.kept = None
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        for stack, which in kept.items():
            stack.kept = which
