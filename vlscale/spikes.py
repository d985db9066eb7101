"""Loss spikes: a logged loss far above those of the last lines, by median and median absolute deviation.

One goes back to a checkpoint before the spike and on past the data that led to it as Chowdhery et al. 2022 (PaLM,
section 5.1) did by hand: from about 100 steps before, leaving out 200 to 500 batches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from vlscale.options import SpikeConfig

FEWEST = 20  # lines of a task before any is judged; `spikes.window` where that is less
NORMAL = 1.4826  # MAD to standard deviation where noise is normal
LEAST = 0.01  # of the median, the least deviation: a loss that hardly moves has none of its own


class Spikes:
    """What the logged losses of each task were of late. A pure function of the lines that it was given."""

    def __init__(self, config: SpikeConfig, state: Mapping[str, Any] | None = None) -> None:
        """Go on from the `state` of a run that was stopped."""
        kept = state or {"losses": {}, "since": {}, "fine": 0}
        self._config = config
        self._losses: dict[str, list[float]] = {task: list(losses) for task, losses in kept["losses"].items()}
        self._since: dict[str, int] = dict(kept["since"])  # by task: the step at which a spike began that goes on
        self.fine: int = kept["fine"]  # the last logged step whose loss was no spike

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON, and a copy."""
        losses = {task: list(each) for task, each in self._losses.items()}
        return {"losses": losses, "since": dict(self._since), "fine": self.fine}

    def judge(self, step: int, task: str, loss: float) -> str:
        """Take in the loss of a logged step; a sentence where a spike begins, or "".

        Every loss enters the window, so a level that stays for half of it is a spike no more. One that is not finite
        is left out: its step was skipped (`vlscale.non_finite`).
        """
        if not math.isfinite(loss):
            return ""
        losses = self._losses.setdefault(task, [])
        limit = self._limit(losses)
        losses.append(loss)
        del losses[: -self._config.window]
        if not loss > limit:
            self._since.pop(task, None)
            self.fine = step
            return ""
        if self._since.setdefault(task, step) < step:
            return ""
        return (
            f"the loss of task '{task}' spikes at step {step}: {loss:.4g}, where {limit:.4g} is the most that the last "
            f"{len(losses) - 1} lines lead one to expect (spikes.factor={self._config.factor:g})"
        )

    def _limit(self, losses: list[float]) -> float:
        if len(losses) < min(FEWEST, self._config.window):
            return math.inf
        median = statistics.median(losses)
        deviation = NORMAL * statistics.median(abs(loss - median) for loss in losses)
        return median + self._config.factor * max(deviation, LEAST * abs(median))
