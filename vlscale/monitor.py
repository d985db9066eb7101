"""What a run says about itself: metrics.jsonl, TensorBoard, log.txt and the console."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from torch import Tensor
from tqdm import tqdm

from vlscale.lines import Lines, read
from vlscale.run_folder import LOG, METRICS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD = "tensorboard"
PACE = 5.0  # seconds between two plain lines
FIRST_LINES = 3  # steps that are always shown

Value = float | int | str | None | list[str]


class PictureLike(Protocol):
    """A validation picture with one of its captions, and the picture's place when asked for by it."""

    @property
    def picture(self) -> Tensor:
        """uint8 [3, H, W]."""
        ...

    @property
    def caption(self) -> str:
        """In words."""
        ...

    @property
    def rank(self) -> int:
        """From 1."""
        ...


class Monitor:
    """Rank 0 writes all of it; the other ranks only their warnings.

    A run that goes on from step `start` first takes out of `metrics.jsonl` what a killed run wrote after that
    step, so that the file ends up like that of a run in one go; TensorBoard is told the same.
    """

    def __init__(
        self,
        out: Path,
        *,
        steps: int,
        start: int,
        rank: int,
        tensorboard: bool = True,
        console: TextIO | None = None,
    ) -> None:
        self._out = out
        self._rank = rank
        self._steps = steps
        self._console = console or sys.stdout
        self._shown = 0
        self._shown_at = -math.inf
        self._bar: tqdm[Any] | None = None
        self._metrics: Lines | None = None
        self._in_trouble = False
        self._writer: SummaryWriter | None = None
        out.mkdir(parents=True, exist_ok=True)
        self._log = Lines(out / LOG)
        if rank == 0:
            self._metrics = Lines(out / METRICS)
            if tensorboard:
                with self._tensorboard():
                    self._writer = _writer(out / TENSORBOARD, start + 1)
            if self._console.isatty():
                self._bar = tqdm(total=steps, initial=start, file=self._console, unit="step", dynamic_ncols=True)
            self._forget_after(start)

    def scalars(self, step: int, values: Mapping[str, Value]) -> None:
        """One line of metrics.jsonl, the same in TensorBoard, and a progress line where there is a `loss`."""
        if self._metrics is None:
            return
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        problem = self._metrics.add(json.dumps(line, allow_nan=False) + "\n")
        if problem and not self._in_trouble:
            self.warn(problem)
        self._in_trouble = bool(problem)
        with self._tensorboard() as writer:
            for name, value in values.items():
                if writer is not None and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, step)
        if "loss" in values:
            self._progress(step, values)
        else:
            self.say(f"step {step}/{self._steps}  " + "  ".join(_short(*item) for item in values.items()))

    def pictures(self, step: int, examples: Sequence[PictureLike]) -> None:
        """Pictures, their captions, and the place of each among all when asked for by its caption."""
        with self._tensorboard() as writer:
            for number, example in enumerate(examples if writer is not None else ()):
                assert writer is not None
                writer.add_image(f"retrieval/{number}", example.picture, step)
                writer.add_text(f"retrieval/{number}", f"rank {example.rank}: {example.caption}", step)

    def say(self, message: str) -> None:
        """To the console and log.txt, from rank 0."""
        if self._rank == 0:
            self._write(message)

    def warn(self, message: str) -> None:
        """To the console and log.txt, from whichever rank finds something odd."""
        self._write(f"warning (rank {self._rank}): {message}")

    def go_back(self, step: int) -> None:
        """Take out the figures of later steps: the run goes on from `step` once more."""
        self._forget_after(step)
        with self._tensorboard() as writer:
            if writer is not None:
                writer.close()
                self._writer = _writer(self._out / TENSORBOARD, step + 1)

    def close(self) -> None:
        """Write out what is still on its way."""
        if self._bar is not None:
            self._bar.close()
        with self._tensorboard() as writer:
            if writer is not None:
                writer.close()
        if self._metrics is not None:
            self._metrics.close()
        self._log.close()

    def _forget_after(self, step: int) -> None:
        if self._metrics is not None and (problem := self._metrics.forget_after(step)):
            self.warn(problem)

    def _write(self, message: str) -> None:
        if self._bar is not None:
            self._bar.write(message, file=self._console)
        else:
            with suppress(OSError):  # its output may go to the disk that is full
                print(message, file=self._console, flush=True)
        self._log.add(message + "\n")

    @contextmanager
    def _tensorboard(self) -> Iterator[SummaryWriter | None]:
        """Its file, while it can be written; nothing else of a run depends on that."""
        try:
            yield self._writer
        except OSError as error:
            self._writer = None
            self.warn(f"TensorBoard's file cannot be written ({error.strerror}) and ends here; {METRICS} goes on")

    def _progress(self, step: int, values: Mapping[str, Value]) -> None:
        line = self._line(step, values)
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(_short("loss", values["loss"]))
            self._log.add(line + "\n")
            return
        now = time.monotonic()
        if self._shown < FIRST_LINES or step == self._steps or now - self._shown_at >= PACE:
            self._shown += 1
            self._shown_at = now
            self._write(line)

    def _line(self, step: int, values: Mapping[str, Value]) -> str:
        parts = [f"step {step}/{self._steps}", _short("loss", values["loss"])]
        rate, seconds = values.get("samples_per_second"), values.get("seconds_per_step")
        if isinstance(rate, (int, float)):
            parts.append(f"{rate:.1f} samples/s")
        if isinstance(seconds, (int, float)) and math.isfinite(seconds):
            parts.append(f"ETA {timedelta(seconds=round(seconds * (self._steps - step)))}")
        return "  ".join(parts)


def evaluated(out: Path, step: int) -> bool:
    """Whether metrics.jsonl has the figures of an evaluation at this step."""
    lines = read(out / METRICS)
    return any(name.startswith("eval/") for line in lines if line["step"] == step for name in line)


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(name: str, value: Value) -> str:
    name = name.split("/", 2)[2] if name.startswith("eval/") else name  # what follows eval/<task>/
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _writer(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)
