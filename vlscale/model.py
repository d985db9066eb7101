"""The one module that DeepSpeed wraps: a family, the objectives that ask it, its momentum twin and its key queues."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.nn import moving
from vlscale.nn.queue import KeyQueue, QueueOptions
from vlscale.nn.single_stream import real
from vlscale.served import check_served, check_tasks
from vlscale.types import DTYPES, Batch, Fused, Keys, Loss, Moment, Pass, Stream, Text, Visual, lengthened

if TYPE_CHECKING:
    from vlscale.families.base import Family
    from vlscale.objectives.base import Objective

T = TypeVar("T")
CELL, KEPT = 3, 4  # salts of the draws of what is hidden in a picture
Shared = Mapping[str, tuple[Tensor, ...]]  # by objective: what the whole step's batch gave in `share`


@dataclass(frozen=True)
class Task:
    """What one optimizer step trains; `share` is its chance against the other tasks."""

    objectives: tuple[str, ...]
    share: float = 1.0
    modality: Literal["both", "text", "visual"] = "both"  # what its passes read: of `alone` the other is left out


class Encodings:
    """The passes of one micro-batch, each made when first asked for and then kept; it dies with the step."""

    def __init__(
        self,
        family: Family,
        batch: Batch,
        at: Moment,
        queues: Mapping[str, KeyQueue],
        momentum: Encodings | None = None,
    ) -> None:
        self.family = family
        self.at = at
        self.step = at.step
        self.first = (at.number * distributed.world_size() + distributed.rank()) * len(batch)
        self.alone = at.of == 1
        self._batch = batch
        self._queues = queues
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
        return self._once(("visual", view), lambda: self.family.encode_visual(self._pictures(view)))

    def fused(self, text_view: str, visual_view: str, causal: bool = False) -> Fused:
        """Both together; or one alone, where the other's view is empty, or the batch's task does not read it."""
        text_view, visual_view = text_view if self._batch.text else "", visual_view if self._batch.visual else ""
        text = self.text(text_view) if text_view else None
        visual = self.visual(visual_view) if visual_view else None
        key = ("fused", text_view, visual_view, str(causal))
        return self._once(key, lambda: self.family.fuse(text, visual, causal))

    def decoded(self, target_view: str, text_view: str, visual_view: str, length: int = 0) -> Tensor:
        """States [B, L, D] of a text read from left to right, beside both; padded to `length`, if that is more."""
        fused = self.fused(text_view, visual_view)
        target = self._batch.text[target_view]
        if length > target.ids.shape[1]:
            target = Text(lengthened(target.ids, length), lengthened(target.mask, length))
        mask = torch.cat([real(self.text(text_view)), real(self.visual(visual_view))], dim=1)
        return self.family.decode(target, fused, mask)

    def rows(self, kind: str, view: str, chosen: Tensor) -> Stream:
        """Chosen rows [n] of the step's whole batch, [n, L or R, D]; only they travel."""
        source = self._everyone(kind, view)
        hidden, mask = source.hidden, source.mask
        if mask is not None and distributed.world_size() > 1:  # padded to one length everywhere
            length = distributed.greatest(mask.shape[1])
            hidden, mask = lengthened(hidden, length), lengthened(mask, length)
        size, ranks = len(hidden) // self.at.of, distributed.world_size()  # rows of a micro-batch
        block, row = chosen // size, chosen % size
        owner, place = block % ranks, block // ranks * size + row
        return Stream(
            distributed.fetch_rows(hidden, owner, place),
            None if mask is None else distributed.fetch_rows(mask, owner, place),
        )

    def uniforms(self, salt: int) -> Tensor:
        """[B] fp64 in [0, 1), the same for a sample on whatever rank and in whatever micro-batch it is."""
        everyone = self._draws(salt, self.first + len(self._batch))
        return everyone[self.first :].to(self._batch.pair_id.device)

    def chance(self, salt: int) -> float:
        """In [0, 1), the same on every rank and in every micro-batch of the step."""
        return float(self._draws(salt, 1))

    def queue(self, name: str) -> KeyQueue:
        """One of the model's key queues."""
        return self._queues[name]

    def _draws(self, salt: int, number: int) -> Tensor:
        """[number] fp64 in [0, 1), of this step."""
        generator = torch.Generator().manual_seed((self.at.seed * 1_000_003 + self.at.step) * 101 + salt)
        return torch.rand(number, generator=generator, dtype=torch.float64)

    def _pictures(self, view: str) -> Visual:
        """A view; what to hide of `masked` pictures a family with codes picks, where the data did not."""
        visual = self._batch.visual[view]
        if view != "masked" or visual.picked is not None or "codes" not in self.family.offers:
            return visual
        return visual._replace(picked=self.family.pick(visual, self.uniforms(CELL), self.uniforms(KEPT)))

    def _everyone(self, kind: str, view: str) -> Stream:
        """The stream of all micro-batches of this rank: here there is one."""
        return self.text(view) if kind == "text" else self.visual(view)

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


class Phase(Protocol):
    """One of the passes of a step that encodes all its micro-batches before any loss is made (`two_pass`)."""

    def run(self, model: PretrainModel, batch: Batch, at: Moment) -> Pass:
        """What `PretrainModel.forward` does in this pass."""
        ...


class PretrainModel(nn.Module):
    """family + objectives + momentum twin + key queues.

    The twin starts as a copy of the family, never receives a gradient, and moves in `engine.after_step`, once
    per optimizer step. Queues move in `commit`. Nothing here changes state in `forward`.

    Raises:
        ConfigError: an objective asks for something that the family does not offer, a task names an
            objective that is not configured, or two objectives want one queue in two ways.
    """

    copies_buffers: bool = True  # the twin's BatchNorm statistics: the online ones after each step, or its own

    def __init__(
        self, family: Family, objectives: Mapping[str, Objective], tasks: Mapping[str, Task] | None = None
    ) -> None:
        super().__init__()
        for name, objective in objectives.items():
            check_served(name, objective.needs, family)
        self.family = family
        self.objectives = nn.ModuleDict(objectives)
        self.tasks = dict(tasks) if tasks else {"all": Task(tuple(objectives))}
        check_tasks(self.tasks, objectives, family)
        self.queues = nn.ModuleDict(_build_queues(objectives))
        self.twin: Family | None = None
        if any(objective.momentum for objective in objectives.values()):
            self.twin = copy.deepcopy(family).requires_grad_(False)
        for parameter in self.parameters():
            assert parameter.ndim > 0, "DeepSpeed cannot broadcast zero-dimensional parameters; use shape [1]"

    def views(self, task: str | None = None) -> frozenset[str]:
        """Every view that some objective (of one task) reads, e.g. `text.masked`."""
        if task is None:
            return frozenset().union(*map(self.views, self.tasks))
        left = {"both": "", "text": "visual.", "visual": "text."}[self.tasks[task].modality]
        read = frozenset().union(*(objective.views for _, objective in self.asked(task)))
        return frozenset(view for view in read if not left or not view.startswith(left))

    def fields(self) -> frozenset[str]:
        """What someone reads of what a detector said of its regions (fields of `Visual`)."""
        return self.family.inputs.fields.union(*(objective.fields for _, objective in self.asked()))

    def asked(self, task: str | None = None) -> Iterator[tuple[str, Objective]]:
        """(name, objective) of one task, or of all of them."""
        names: Sequence[str] = tuple(self.objectives) if task is None else self.tasks[task].objectives
        for name in names:
            yield name, self.objectives[name]  # type: ignore[misc]

    def whole(self, task: str) -> bool:
        """Whether some objective of the task looks at the step's whole batch."""
        return any(objective.whole for _, objective in self.asked(task))

    def even(self, task: str | None = None) -> str | None:
        """What (of one task) needs as many samples in every micro-batch: an objective, or None."""
        for name, objective in self.asked(task):
            if not objective.uneven or "codes" in self.family.offers:  # a family with codes draws what is hidden
                return name
        return None

    def forward(self, batch: Batch, at: Moment, phase: Phase | None = None) -> Pass:
        """Losses and new keys of one micro-batch for the batch's task."""
        if phase is not None:
            return phase.run(self, batch, at)
        enc = Encodings(self.family, batch, at, self.key_queues(), self.momentum_encodings(batch, at))
        asked = dict(self.asked(batch.task))
        shares = {name: objective.share(enc, batch) for name, objective in asked.items() if objective.whole}
        return self.ask(asked, enc, batch, everyones(shares))

    def ask(self, asked: Mapping[str, Objective], enc: Encodings, batch: Batch, shared: Shared) -> Pass:
        """The losses and keys of some objectives."""
        losses: dict[str, Loss] = {}
        keys: dict[str, Keys] = {}
        for name, objective in asked.items():
            given = shared.get(name, ())
            losses[name] = objective(enc, batch, given)
            for queue, new in objective.keys(enc, batch, given).items():
                if queue not in keys or keys[queue].ids is None:  # who needs the ids gives them
                    keys[queue] = new
        return Pass(losses, keys)

    def momentum_encodings(self, batch: Batch, at: Moment) -> MomentumEncodings | None:
        """The twin's encodings of a micro-batch; none without a twin."""
        return MomentumEncodings(self.twin, batch, at, self.key_queues()) if self.twin is not None else None

    def key_queues(self) -> dict[str, KeyQueue]:
        """The queues by name."""
        return dict(self.queues.items())  # type: ignore[arg-type]

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

    @torch.no_grad()
    def commit(self, made: Sequence[Mapping[str, Keys]], step: int, when: Literal["step", "micro_batch"]) -> None:
        """Let new keys into the queues, in global order; what is not yet everywhere travels in ONE all-gather.

        Once a step the family's running figures move too (`nn.moving`).

        Args:
            made: `Pass.keys` of the micro-batches of this rank that enter together, of the same task.
            step: the optimizer step being made.
            when: only queues whose `queue_push` says so take their keys now.
        """
        if when == "step":
            moving.move(self.family)
            for queue in self.key_queues().values():
                queue.settle(applied=True)
        names = [name for name in made[0] if self.key_queues()[name].options.queue_push == when]
        dtypes = {name: DTYPES[self.key_queues()[name].options.queue_dtype] for name in names}
        local = [name for name in names if not made[0][name].whole]
        keys = {name: torch.cat([each[name].keys for each in made]).to(dtypes[name]) for name in local}
        ids: dict[int, Tensor] = {}  # queues that take keys of the same samples share their ids
        for name in local:
            first = made[0][name].ids
            if first is not None and id(first) not in ids:
                ids[id(first)] = torch.cat([part for each in made if (part := each[name].ids) is not None])
        message = [*keys.values(), *ids.values()]
        arrived = [global_order(part, len(made)) for part in distributed.gather(message)] if local else []
        known = dict(zip(ids, arrived[len(keys) :], strict=True))
        for name, part in zip(keys, arrived, strict=False):
            self.key_queues()[name].push(part, known.get(id(made[0][name].ids)), step)
        for name in names:
            if made[0][name].whole:  # each micro-batch holds all of them
                self.key_queues()[name].push(made[0][name].keys, made[0][name].ids, step)

    @torch.no_grad()
    def forget(self) -> None:
        """In place of the step's last `commit`: the step was skipped, and leaves no trace."""
        moving.forget(self.family)
        for queue in self.key_queues().values():
            queue.settle(applied=False)

    def queue_metrics(self, step: int) -> dict[str, Tensor]:
        """`queue/<name>/filled` and `queue/<name>/age_steps`, [] fp32 each."""
        return {
            f"queue/{name}/{figure}": value
            for name, queue in self.key_queues().items()
            for figure, value in queue.metrics(step).items()
        }

    def queue_digests(self) -> dict[str, str]:
        """{queue: digest} of what every rank must hold alike, for `agreement.same_settings`."""
        return {f"the {name} queue": queue.digest() for name, queue in self.key_queues().items()}

    def sharded_buffers(self) -> dict[str, Tensor]:
        """{name: buffer} of this rank's parts of sharded queues; all other buffers are alike on all ranks."""
        return {
            f"queues.{name}.{key}": buffer
            for name, queue in self.key_queues().items()
            for key, buffer in queue.parts().items()
        }

    def momentum_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(online, twin) parameters that the momentum update moves; a tied weight stands once."""
        pairs: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for online, twin in self._twins():
            targets = dict(twin.named_parameters())
            for name, parameter in online.named_parameters():
                pairs[id(targets[name])] = (parameter, targets[name])
        return list(pairs.values())

    def momentum_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """(online, twin) buffers that the twin copies after each step; none where it keeps its own statistics."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for online, twin in self._twins() if self.copies_buffers else []:
            targets = dict(twin.named_buffers())
            pairs.update((id(targets[name]), (buffer, targets[name])) for name, buffer in online.named_buffers())
        return list(pairs.values())

    def _twins(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        if self.twin is not None:
            yield self.family, self.twin
        for _, objective in self.asked():
            yield from objective.twins()


def everyones(shares: Mapping[str, tuple[Tensor, ...]]) -> Shared:
    """What each objective shares, of all ranks in rank order, in one message."""
    flat = [tensor for share in shares.values() for tensor in share]
    whole = iter(distributed.gather(flat) if flat else [])
    return {name: tuple(next(whole) for _ in share) for name, share in shares.items()}


def global_order(everyone: Tensor, number: int) -> Tensor:
    """Rows rank by rank, in each `number` micro-batches -> micro-batch by micro-batch, in each rank by rank."""
    blocks = everyone.view(distributed.world_size(), number, -1, *everyone.shape[1:])
    return blocks.transpose(0, 1).reshape(everyone.shape)


def _build_queues(objectives: Mapping[str, Objective]) -> dict[str, KeyQueue]:
    """One queue per name; its options are the same wherever it is named."""
    found: dict[str, tuple[str, QueueOptions, int]] = {}
    for objective_name, objective in objectives.items():
        for name, (options, width) in objective.queues().items():
            first, known, _ = found.setdefault(name, (objective_name, options, width))
            for each in fields(QueueOptions):
                one, other = getattr(known, each.name), getattr(options, each.name)
                if one != other:
                    raise ConfigError(
                        f"objectives.{first}.{each.name} is {one} and objectives.{objective_name}.{each.name} is "
                        f"{other}, but both use the {name} queue; give both the same"
                    )
    queues = {}
    for seed, (name, (objective_name, options, width)) in enumerate(sorted(found.items())):
        try:
            queues[name] = KeyQueue(options, width, seed)
        except ValueError as error:
            raise ConfigError(f"objectives.{objective_name}.{error}") from None
    return queues
