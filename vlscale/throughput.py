"""How fast a run is, measured between two log lines without making the device wait at any other time."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from vlscale import distributed
from vlscale.types import Batch

T = TypeVar("T")
NOTABLE = 0.05  # seconds; nobody minds who is late in a shorter step
SLOW, IN_A_ROW = 1.5, 5  # times the median, logged steps: a rank that is worth a warning


class StepClock:
    """Wall time, waiting for data, and what was done meanwhile, since the last `read`.

    `inside` tells the seconds that this rank has spent inside collectives so far. The rest of a step is its own: the
    rank with the most keeps the others waiting. On a GPU, where a collective is only queued, that is the time of its
    processor and its data.
    """

    def __init__(self, device: torch.device, inside: Callable[[], float] = float) -> None:
        self._device = device
        self._inside = inside
        self._inside_before = inside()
        self._shared = 0.0  # seconds inside collectives
        self._last = time.perf_counter()
        self._seconds = 0.0
        self._waited = 0.0
        self._steps = 0
        self._samples = 0
        self._tokens: int | Tensor = 0  # stays on the device until it is read
        self._filled: int | Tensor = 0  # words and regions of the last step, and the places for them
        self._places = 0
        self._lost: list[int] = []  # words of each text of the last step for which there was no room

    def waiting(self, steps: Iterable[T]) -> Iterator[T]:
        """The same steps; the time that the loop waits for each is counted as waiting for data."""
        iterator = iter(steps)
        while True:
            began = time.perf_counter()
            try:
                step = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield step

    def step(self, batches: Sequence[Batch]) -> None:
        """Note one optimizer step and the micro-batches that this rank gave to it."""
        self._seconds += self._lap()
        self._shared += self._inside() - self._inside_before
        self._inside_before = self._inside()
        self._steps += 1
        self._samples += sum(map(len, batches))
        masks = [mask for batch in batches for mask in batch.masks()]
        self._places = sum(mask.numel() for mask in masks)
        self._filled = _filled(masks)
        self._tokens = self._tokens + _filled([text.mask for batch in batches for text in batch.text.values()])
        self._lost = [lost for batch in batches for lost in batch.lost_words]

    def skip(self) -> None:
        """Leave out the time since the last step: it went into a checkpoint or an evaluation."""
        self._synchronize()
        self._lap()
        self._inside_before = self._inside()

    def read(self, *, ranks: int, flops: float, peak: float | None) -> dict[str, float | int | None]:
        """The means since the last `read`, over all ranks; every rank calls this at the same step.

        `flops` is what the model needs for one step on one rank, `peak` what one device could do per second
        (None = unknown). Text tokens are counted in every view, memory is this rank's. `padding_fraction` (of the
        places for words and regions), the share of texts that are cut (`truncated_fraction`) and the words that these
        lose (`truncated_words`) are the last step's alone, so that they do not depend on where a run was stopped.
        """
        self._synchronize()
        self._seconds += self._lap()
        slowest = straggler((self._seconds - self._shared) / self._steps, self._device) if ranks > 1 else {}
        sums = self._sums()
        seconds = sums["seconds"] / sums["steps"]  # of one step
        done = ranks * flops / seconds
        values: dict[str, float | int | None] = {
            "seconds_per_step": seconds,
            "data_wait_fraction": sums["waited"] / sums["seconds"],
            "samples_per_second": sums["samples"] * ranks / sums["seconds"],
            "tokens_per_second": sums["tokens"] * ranks / sums["seconds"],
            "padding_fraction": 1 - sums["filled"] / sums["places"] if sums["places"] else 0.0,
            "truncated_fraction": sums["cut"] / sums["texts"] if sums["texts"] else 0.0,
            "truncated_words": int(sums["lost"]),
            "model_tflops_per_second": done / 1e12,
            "mfu": done / (ranks * peak) if peak else None,
            **memory(self._device),
            **slowest,
        }
        self._restart()
        return values

    def _sums(self) -> dict[str, float]:
        own = {
            "seconds": self._seconds,
            "waited": self._waited,
            "steps": self._steps,
            "samples": self._samples,
            "tokens": self._tokens,
            "filled": self._filled,
            "places": self._places,
            "texts": len(self._lost),
            "cut": sum(lost > 0 for lost in self._lost),
            "lost": sum(self._lost),
        }
        tensors = {
            name: torch.as_tensor(value, dtype=torch.float64, device=self._device) for name, value in own.items()
        }
        return {name: float(value) for name, value in distributed.sum_over_ranks(tensors).items()}

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._last = now - self._last, now
        return lap

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _restart(self) -> None:
        self._seconds = self._waited = self._shared = 0.0
        self._inside_before = self._inside()
        self._steps = self._samples = self._places = self._tokens = self._filled = 0
        self._lost = []


def straggler(seconds: float, device: torch.device) -> dict[str, float | int | None]:
    """The rank that took the longest for its own part of a step, and its time over the median; all give `seconds`."""
    (gathered,) = distributed.gather([torch.tensor([seconds], dtype=torch.float64, device=device)])  # [W]
    everyone = gathered.tolist()
    median = max(statistics.median_low(everyone), 1e-9)
    rank = max(range(len(everyone)), key=everyone.__getitem__)
    return {"straggler/rank": rank, "straggler/max_over_median": everyone[rank] / median}


class Stragglers:
    """Notices a rank that keeps the others waiting line after line."""

    def __init__(self) -> None:
        self._rank, self._lines = -1, 0

    def judge(self, values: Mapping[str, Any]) -> str:
        """What to say of a logged line; mostly nothing."""
        over, rank = values["straggler/max_over_median"], values["straggler/rank"]
        slow = over > SLOW and values["seconds_per_step"] > NOTABLE
        self._lines = slow * (1 + self._lines * (rank == self._rank))
        self._rank = rank
        if self._lines != IN_A_ROW:
            return ""
        return (
            f"rank {rank} keeps the others waiting: in {IN_A_ROW} logged steps in a row its own part took more than "
            f"{SLOW} times the median of all ranks, now {over:.1f} times; look at its machine and its data"
        )


def _filled(masks: Sequence[Tensor]) -> int | Tensor:
    """How many places are: [], on their device."""
    return torch.stack([mask.sum() for mask in masks]).sum() if masks else 0


def memory(device: torch.device) -> dict[str, float | int | None]:
    """Bytes in use by this process and the most there were: on a GPU of its tensors, else resident."""
    if device.type == "cuda":
        peak, allocated = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    else:
        allocated = psutil.Process().memory_info().rss
        peak = max(allocated, _most_resident())
    return {"memory_peak_bytes": peak, "memory_allocated_bytes": allocated}


def _most_resident() -> int:
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
