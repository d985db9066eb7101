"""How well a model does what it is trained for: its own objectives, all tasks, on held-out samples.

What a figure means without another to hold it against is hard to say, so each share of right answers stands
beside `majority`, the share that the commonest answer among the same samples would get.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.data.held_out import HeldOutBatches
from vlscale.evaluation.base import Found, HeldOut, evaluating
from vlscale.types import Batch, Loss, Moment

PREFIX = "eval/pretext/"
# Draws and soft targets are those of a step after every warm-up, always the same, so that evaluations compare.
STEP = 10**9


def measure(held: HeldOut) -> Found:
    """Losses, the objectives' own figures and baselines over the samples of all ranks; every rank calls this.

    A mean over tokens, regions or pairs is one mean over those of all samples, wherever the objective says how many
    it ranges over. Objectives that look at other samples see those of the same pass. What the samples hold no case
    of is left out. `skipped` counts the samples that cannot be used and in whose places others stand.

    Raises:
        DataError: there are too few samples, or they cannot be used.
    """
    model, rank, world = held.model, distributed.rank(), distributed.world_size()
    inputs = model.family.inputs
    batches = HeldOutBatches(
        held.shards, held.tokenizer, inputs, held.preprocessing, batch=held.batch, limit=held.limit
    )
    tally = Tally()
    with evaluating(model, held.device):
        for task in model.tasks:
            for number, host_batch in enumerate(held.watched(batches(task, rank, world))):
                torch.manual_seed(number * world + rank)
                batch = host_batch.to(held.device)
                made = model(batch, Moment(STEP, seed=number))
                tally.add(made.losses, model.counts(batch), batch)
    everyone: list[Any] = distributed.gather_objects(batches.skipped)
    figures = {**tally.figures(), "skipped": len(set().union(*everyone))}
    return Found({PREFIX + name: value for name, value in figures.items()}, [])


class Tally:
    """Sums of figures and of what they range over, on this rank."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._labels: dict[str, Counter[int]] = {}

    def add(self, losses: Mapping[str, Loss], counts: Mapping[str, Tensor], batch: Batch) -> None:
        """Note what one micro-batch gave; `counts` of `PretrainModel.counts`."""
        samples = torch.tensor(len(batch), device=batch.pair_id.device)
        for objective, loss in losses.items():
            terms = counts.get(objective, samples)
            labels = loss.labels or {}
            self._note(f"loss/{objective}", loss.value, terms)
            for name, value in loss.metrics.items():
                if name.startswith(f"{objective}/"):  # others, like the temperature, tell nothing of the samples
                    self._note(name, value, torch.tensor(len(labels[name])) if name in labels else terms)
            for name, each in labels.items():
                self._labels.setdefault(name, Counter()).update(each.tolist())

    def _note(self, name: str, value: Tensor, terms: Tensor) -> None:
        terms = terms.detach().double().to(value.device)
        self._sums[name] = self._sums.get(name, 0.0) + value.detach().double().reshape(()) * terms
        self._terms[name] = self._terms.get(name, 0.0) + terms

    def figures(self) -> dict[str, float]:
        """The means over all ranks, and the baselines; all ranks take part."""
        sums, terms = distributed.sum_over_ranks(self._sums), distributed.sum_over_ranks(self._terms)
        everyone: list[Any] = distributed.gather_objects(self._labels)
        found: dict[str, float] = {}
        for name in (name for name in sums if terms[name] > 0):
            found[name] = float(sums[name] / terms[name])
            times = sum((labels.get(name, Counter()) for labels in everyone), Counter[int]())
            if times:
                found[name.replace("accuracy", "majority")] = max(times.values()) / times.total()
        return found
