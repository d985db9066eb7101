"""Steps whose gradients were not finite: what they were made of, and how many of them a run stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from vlscale import distributed, lines
from vlscale.data.samples import BrokenSampleError
from vlscale.evaluation.base import evaluating
from vlscale.model import Encodings, PretrainModel
from vlscale.options import NonFiniteConfig
from vlscale.types import Batch, Loss, Moment

if TYPE_CHECKING:
    from vlscale.engine import StepReport

FILE = "bad_steps.jsonl"
FAR = 65504.0  # greatest number of fp16: no feature, box or normalised pixel is near it
NAMED = 4  # suspects that the console names

Places = Callable[[Batch], list[str]]  # the shard of each sample of a micro-batch


class Window:
    """The steps that were skipped of late; `budget` of them within `window` steps end the run."""

    def __init__(self, config: NonFiniteConfig, steps: Iterable[int] = ()) -> None:
        """Go on with the skipped `steps` of a run that was stopped (`state`)."""
        self._config = config
        self._steps = list(steps)

    def add(self, step: int) -> None:
        """`step` was skipped."""
        self._steps = [each for each in self._steps if each > step - self._config.window] + [step]

    def spent(self) -> bool:
        """Whether the run should end, after a step that was skipped."""
        return len(self._steps) >= self._config.budget

    def state(self) -> list[int]:
        """What a checkpoint keeps."""
        return self._steps

    def refusal(self, file: Path) -> str:
        """The sentence that ends the run."""
        return (
            f"{len(self._steps)} of the last {self._config.window} steps had gradients that are not finite, and "
            f"non_finite.budget={self._config.budget} allows fewer; the last was step {self._steps[-1]}; {file} names "
            "the samples of each: leave out those that return, or lower optim.lr, or write a larger non_finite.budget, "
            "and go on with the same command"
        )


class Suspect(NamedTuple):
    """A sample that may have broken a step."""

    key: str
    shard: str
    reason: str


def findings(
    model: PretrainModel,
    places: Places,
    batches: Sequence[Batch],
    moments: Sequence[Moment],
    losses: Sequence[Mapping[str, Loss]],
) -> list[dict[str, Any]]:
    """What every rank's micro-batches of a step hold, one rank after the other. All ranks take part.

    Args:
        model: as it was in the step.
        places: tells the shard of each sample.
        batches: of this rank, on the device.
        moments: of each.
        losses: of each, by objective.

    Returns:
        Of each: rank, micro-batch, keys, shards, positions, losses by objective (None = not finite), suspects.
    """
    own = []
    for batch, at, found in zip(batches, moments, losses, strict=True):
        shards, reasons = places(batch), suspicions(model, batch, at)
        own.append(
            {
                "rank": distributed.rank(),
                "micro_batch": at.number,
                "keys": list(batch.keys),
                "shards": shards,
                "positions": list(batch.positions),
                "losses": {name: _number(loss.value) for name, loss in found.items()},
                "suspects": [
                    Suspect(batch.keys[row], shards[row], reason)._asdict() for row, reason in sorted(reasons.items())
                ],
            }
        )
    everyone: list[Any] = distributed.gather_objects(own)
    return [each for rank in everyone for each in rank]


def suspicions(model: PretrainModel, batch: Batch, at: Moment) -> dict[int, str]:
    """{sample of the micro-batch: what is odd about it}. All ranks take part, for the encoders run once more.

    First what it was fed: numbers that are not finite, or beyond those of fp16. Then what the encoders make of it
    alone: samples meet only later, in the objectives.
    """
    found = {row: f"what it is fed holds {greatest:g}" for row, greatest in _inputs(batch).items()}
    with evaluating(model, batch.pair_id.device):
        enc = Encodings(model.family, batch, at, model.key_queues())
        for name in sorted(model.views(batch.task)):
            kind, _, view = name.partition(".")
            if kind not in ("text", "visual"):
                continue
            hidden = (enc.text(view) if kind == "text" else enc.visual(view)).hidden
            finite = hidden.isfinite().flatten(1).all(dim=1).view(len(batch), -1).all(dim=1)  # its captions together
            for row in (~finite).nonzero()[:, 0].tolist():
                found.setdefault(row, f"the encoder makes of its {name} what is not finite")
    return found


def _inputs(batch: Batch) -> dict[int, float]:
    """{sample: its greatest number} where that is beyond what a sample may hold."""
    out: dict[int, float] = {}
    for visual in batch.visual.values():
        for tensor in visual:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                greatest = tensor.float().abs().flatten(1).amax(dim=1)  # NaN if there is one
                for row in (~(greatest <= FAR)).nonzero()[:, 0].tolist():
                    out.setdefault(row * len(batch) // len(tensor), float(greatest[row]))  # a sample's clips together
    return out


def is_bad(report: StepReport, losses: Sequence[Mapping[str, Loss]]) -> bool:
    """Whether a step was skipped for what it was made of. All ranks take part.

    A smaller loss scale (fp16) answers an overflow of gradients, but no loss that is not finite, on whichever rank.
    """
    if report.applied or not report.answered:
        return not report.applied
    broken = any(_number(loss.value) is None for each in losses for loss in each.values())
    return distributed.greatest(int(broken)) > 0


def message(step: int, found: Sequence[Mapping[str, Any]]) -> str:
    """What the console says of a step that was skipped."""
    suspects = [each for micro_batch in found for each in micro_batch["suspects"]]
    listed = "; ".join(map(named, suspects[:NAMED]))
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    broken = [each for each in found if None in each["losses"].values()]
    where = ", ".join(f"{each['micro_batch']} of rank {each['rank']}" for each in broken[:NAMED])
    if suspects:
        why = f"suspected: {listed}{more}"
    else:
        why = (
            f"no sample stands out, but losses of micro-batch {where} are not finite"
            if broken
            else "all losses are finite"
        )
    return f"step {step} is skipped: its gradients are not finite; {why}; {FILE} has the details"


def named(suspect: Mapping[str, str]) -> str:
    """A suspect in words."""
    return str(BrokenSampleError(**suspect))


def last_roll_back(out: Path, step: int) -> dict[str, Any] | None:
    """The line of bad_steps.jsonl about the last roll-back to `step` or before."""
    told = [line for line in lines.read(out / FILE) if "rolled_back" in line and line["step"] <= step]
    return told[-1] if told else None


def _number(value: Tensor) -> float | None:
    number = float(value.detach())
    return number if math.isfinite(number) else None
