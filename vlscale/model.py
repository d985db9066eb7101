"""The one module that DeepSpeed wraps: a family, the objectives that ask it, and its momentum twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from vlscale.errors import ConfigError
from vlscale.types import Batch, Fused, Loss, Stream

if TYPE_CHECKING:
    from vlscale.families.base import Family
    from vlscale.objectives.base import Objective

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What one optimizer step trains; `share` is its chance against the other tasks."""

    objectives: tuple[str, ...]
    share: float = 1.0


class Encodings:
    """The passes of one micro-batch, each made when first asked for and then kept; it dies with the step."""

    def __init__(self, family: Family, batch: Batch, step: int, momentum: Encodings | None = None) -> None:
        self.family = family
        self.step = step
        self._batch = batch
        self._momentum = momentum
        self._kept: dict[tuple[str, ...], Any] = {}

    @property
    def momentum(self) -> Encodings:
        """The twin's encodings of the same batch, without gradient."""
        assert self._momentum is not None, "an objective that asks the twin sets `momentum = True`"
        return self._momentum

    def text(self, view: str) -> Stream:
        """Text alone, [B, L, D]."""
        return self._once(("text", view), lambda: self.family.encode_text(self._batch.text[view]))

    def visual(self, view: str) -> Stream:
        """Pictures alone, [B, R, D]."""
        return self._once(("visual", view), lambda: self.family.encode_visual(self._batch.visual[view]))

    def fused(self, text_view: str, visual_view: str, causal: bool = False) -> Fused:
        """Both together."""
        return self._once(
            ("fused", text_view, visual_view, str(causal)),
            lambda: self.family.fuse(self.text(text_view), self.visual(visual_view), causal),
        )

    def _once(self, key: tuple[str, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept


class MomentumEncodings(Encodings):
    """Encodings of the twin: no pass of it records a gradient."""

    def _once(self, key: tuple[str, ...], make: Callable[[], T]) -> T:
        with torch.no_grad():
            return super()._once(key, make)


class PretrainModel(nn.Module):
    """family + objectives + momentum twin.

    The twin starts as a copy of the family, never receives a gradient, and moves in `engine.after_step`, once
    per optimizer step. Nothing here changes state in `forward`.

    Raises:
        ConfigError: an objective asks for something that the family does not offer, or a task names an
            objective that is not configured.
    """

    def __init__(
        self, family: Family, objectives: Mapping[str, Objective], tasks: Mapping[str, Task] | None = None
    ) -> None:
        super().__init__()
        for name, objective in objectives.items():
            check_served(name, objective.needs, family)
        self.family = family
        self.objectives = nn.ModuleDict(objectives)
        self.tasks = dict(tasks) if tasks else {"all": Task(tuple(objectives))}
        _check_tasks(self.tasks, objectives)
        self.twin: Family | None = None
        if any(objective.momentum for objective in objectives.values()):
            self.twin = copy.deepcopy(family).requires_grad_(False)
        for parameter in self.parameters():
            assert parameter.ndim > 0, "DeepSpeed cannot broadcast zero-dimensional parameters; use shape [1]"

    def views(self) -> frozenset[str]:
        """Every view that some objective reads, e.g. `text.masked`."""
        return frozenset().union(*(objective.views for _, objective in self.asked()))

    def asked(self, task: str | None = None) -> Iterator[tuple[str, Objective]]:
        """(name, objective) of one task, or of all of them."""
        names: Sequence[str] = tuple(self.objectives) if task is None else self.tasks[task].objectives
        for name in names:
            yield name, self.objectives[name]  # type: ignore[misc]

    def forward(self, batch: Batch, step: int) -> dict[str, Loss]:
        """{objective: loss} of one micro-batch for the batch's task; `step` counts from 1."""
        momentum = MomentumEncodings(self.twin, batch, step) if self.twin is not None else None
        enc = Encodings(self.family, batch, step, momentum)
        return {name: objective(enc, batch) for name, objective in self.asked(batch.task)}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """{objective: terms in this micro-batch} for objectives whose mean ranges over the whole step."""
        counted = {name: objective.count(batch) for name, objective in self.asked(batch.task)}
        return {name: count for name, count in counted.items() if count is not None}

    def total(self, losses: Mapping[str, Loss], shares: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum that backward starts from, [] fp32.

        `shares[name]` is this micro-batch's count over the mean count of all micro-batches of the step on all
        ranks: averaging over ranks and micro-batches then gives one mean over the whole step's terms.
        """
        parts = []
        for name, loss in losses.items():
            weight = getattr(self.objectives[name], "weight", 1.0)
            parts.append(loss.value * weight * shares[name] if name in shares else loss.value * weight)
        return torch.stack([part.reshape(()) for part in parts]).sum()

    def commit(self, task: str) -> None:
        """Move what the task's objectives keep; after backward, once per micro-batch."""
        for _, objective in self.asked(task):
            objective.commit()

    def momentum_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(online, twin) parameters that the momentum update moves; a tied weight stands once."""
        modules: list[tuple[nn.Module, nn.Module]] = []
        if self.twin is not None:
            modules.append((self.family, self.twin))
        for _, objective in self.asked():
            modules.extend(objective.twins())
        pairs: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for online, twin in modules:
            targets = dict(twin.named_parameters())
            for name, parameter in online.named_parameters():
                pairs[id(targets[name])] = (parameter, targets[name])
        return list(pairs.values())

    def momentum_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """(online, twin) buffers that the twin copies as they are (BatchNorm statistics)."""
        if self.twin is None:
            return []
        targets = dict(self.twin.named_buffers())
        return [(buffer, targets[name]) for name, buffer in self.family.named_buffers()]


def check_served(name: str, needs: frozenset[str], family: Family) -> None:
    """ConfigError if an objective needs something that the family does not offer."""
    missing = needs - family.offers
    if missing:
        raise ConfigError(
            f"objective '{name}' needs {sorted(needs)}, but family "
            f"'{type(family).__name__}' offers {sorted(family.offers)}; "
            f"take it out of objectives or choose a family that offers {sorted(missing)}"
        )


def _check_tasks(tasks: Mapping[str, Task], objectives: Mapping[str, Objective]) -> None:
    for task_name, task in tasks.items():
        for name in task.objectives:
            if name not in objectives:
                raise ConfigError(
                    f"tasks.{task_name}.objectives names '{name}', which is not under objectives "
                    f"({', '.join(objectives)})"
                )
