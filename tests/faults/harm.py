"""What happens inside a rank: deaths in the middle of a step, a clock that jumps, a slow rank, a poisoned step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.faults.disk import Disk, die
from tests.faults.fault import EVERYONE, Fault

SLOW = 0.5  # seconds that a slow rank takes longer in a step
STEP = 3  # place among the numbers that a rank tells
JUMP = 10**7  # seconds, four months
BALLAST = "ballast"  # a file that fills the disk


class Harm:
    """Everything that goes wrong in one rank of one start; `install` it before the run begins."""

    def __init__(self, rank: int, out: Path, faults: Sequence[Fault], poisoned: Sequence[int], counts: Any) -> None:
        self._rank = rank
        self._ballast = out.parent / BALLAST
        self._faults = [fault for fault in faults if fault.rank in (rank, EVERYONE)]
        self._poisoned = poisoned
        self._counts = counts
        self._disk = Disk(out, counts, self._faults)
        self._step = 0

    def install(self) -> None:
        """Put it between the run and what it calls."""
        from vlscale import distributed, model, record, train
        from vlscale.engine import DeepSpeedEngine

        self._disk.install()
        seed_step = train.seed_step

        def begun(seed: int, step: int, *rest: Any) -> None:
            self._step = self._counts[STEP] = step
            seed_step(seed, step, *rest)
            self._at("data")
            self._begin(step)

        train.seed_step = begun  # type: ignore[assignment]
        owners = {
            **dict.fromkeys(("forward", "backward", "step", "after_step"), DeepSpeedEngine),
            "commit": model.PretrainModel,
            "record": record.Record,
            "vote": distributed.StopVote,
        }
        for phase, owner in owners.items():
            name = {"record": "step", "vote": "agreed"}.get(phase, phase)
            setattr(owner, name, self._before(phase, getattr(owner, name)))

    def _before(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(owner: Any, *rest: Any, **named: Any) -> Any:
            self._at(phase)
            if phase == "backward" and self._step in self._poisoned:
                rest = (rest[0] * float("nan"), *rest[1:])
            return function(owner, *rest, **named)

        return wrapped

    def _at(self, phase: str) -> None:
        for fault in self._faults:
            if fault.kind == "kill" and fault.where == phase and self._step >= fault.number:
                die(fault)

    def _begin(self, step: int) -> None:
        for fault in self._faults:
            due, over = step == int(fault.number), step == int(fault.number) + fault.count
            if due and fault.kind == "slow":
                time.sleep(SLOW)
            if due and fault.kind == "clock":
                self._jump(JUMP if fault.how == "on" else -JUMP)
            if due and fault.kind == "worker":
                _kill_a_worker()
            if due and fault.kind == "full":
                self._fill()
            if over and fault.kind == "full":
                self._ballast.unlink(missing_ok=True)

    def _jump(self, seconds: float) -> None:
        now = time.time
        time.time = lambda: now() + seconds

    def _fill(self) -> None:
        """Leave no byte on the file system that holds the run."""
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size) == size:
                        pass


def _kill_a_worker() -> None:
    """The youngest process under this one that does work for it."""
    for process in reversed(psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # a zombie
            if not any("resource_tracker" in word for word in process.cmdline()):
                process.kill()
                return
