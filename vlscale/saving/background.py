"""Saving while training goes on: the run waits for a copy in host memory, and a thread per rank writes it.

No thread asks anything of the other ranks. A save has two halves, which each rank ends for itself: its file is
written, and (rank 0 alone has work there) the checkpoint is committed. How many halves are behind it goes into the
vote that ranks hold at each step anyway; once the least of these numbers has moved, all of them go on to the next half
at the same step. `Saver.finish` does the same by waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vlscale import distributed
from vlscale.errors import CheckpointError, TrainingError
from vlscale.options import CheckpointConfig
from vlscale.saving import pieces
from vlscale.saving.host_memory import HostMemory
from vlscale.saving.pieces import Piece, Writable
from vlscale.saving.targets import Listed, Target

POLL = 1.0  # seconds between two looks at a save that the run waits for
PATIENCE = 3.0  # seconds for a thread to notice that it is given up


@dataclass(frozen=True)
class Saved:
    """How a save went."""

    step: int
    bytes: int  # of all ranks' files
    stall_seconds: float  # for which the run waited, on rank 0
    seconds: float  # until it counted
    failure: str  # empty = it is there


@dataclass
class _Save:
    """The one under way."""

    step: int
    state: Mapping[str, Any]
    began: float
    job: Future[Any]  # this half's work on this rank
    stall: float = 0.0
    seconds: float = 0.0  # until it was over, on rank 0
    written: bool = False  # by all ranks: the second half
    bytes: int = 0
    remark: str = ""  # for a warning, on rank 0


class Saver:
    """Writes a run's checkpoints, one at a time. All ranks call the same methods at the same steps."""

    def __init__(
        self,
        target: Target,
        options: CheckpointConfig,
        tell: Callable[[Saved], None] = lambda saved: None,
        warn: Callable[[str], None] = lambda message: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`tell` hears of each save when it is over, `warn` of those that failed; both on rank 0 only,
        but for what is amiss with a rank's memory.

        `beat` is called while the run waits for a save that makes headway.
        """
        self._target, self._options, self._tell, self._warn, self._beat = target, options, tell, warn, beat
        self._written = 0  # bytes of the file under way
        self._rank = distributed.rank()
        self._memory = HostMemory(warn)
        self._given_up = threading.Event()
        self._save: _Save | None = None
        self._halves = 0  # that are behind all ranks
        self._failures = 0  # in a row
        self.newest: int | None = None  # step of the last one that is there

    @property
    def halves(self) -> int:
        """How many this rank has behind it; `go_on` wants the least of all ranks'."""
        return self._halves + bool(self._save and self._save.job.done())

    @property
    def busy(self) -> bool:
        """Whether a save is under way: the same on all ranks."""
        return self._save is not None

    def reserve(self, live: Sequence[Piece]) -> None:
        """Take the memory for the copies before the first is due, so that a lack of it shows at the start.

        Raises:
            ConfigError: there is too little.
        """
        if self._options.background:
            self._memory.reserve(live)

    def start(self, step: int, live: Sequence[Piece], state: Mapping[str, Any], began: float | None = None) -> None:
        """Save these pieces (this rank's) and `state` (rank 0's counts) as the checkpoint of `step`.

        They may change as soon as this returns. A save that is still under way is waited for. The run has waited since
        `began` (time.perf_counter; None = now).

        Raises:
            TrainingError: `checkpoint.failures` saves in a row have failed.
        """
        began = time.perf_counter() if began is None else began
        self.finish()
        background = self._options.background
        held = self._memory.hold(live) if background else live
        self._save = _Save(step, state, began, self._work(lambda: self._write(step, held)))
        self._save.stall = time.perf_counter() - began
        if not background:
            self.finish()

    def go_on(self, halves: int) -> None:
        """At a step boundary: `halves` are behind every rank.

        Raises:
            TrainingError: `checkpoint.failures` saves in a row have failed.
        """
        while self._save is not None and self._halves < halves:
            self._next()

    def finish(self, last: bool = False) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            TrainingError: `checkpoint.failures` saves in a row have failed.
            CheckpointError: it is the run's `last`, and it failed.
        """
        began = time.perf_counter()
        while self._save is not None:
            self._wait(self._save.job)
            if last and self._save.written:
                self._save.stall += time.perf_counter() - began
            self._next(last)

    def close(self) -> None:
        """Give up the save under way, if there is one: nothing of it is to be seen. Asks nothing of other ranks."""
        save, self._save = self._save, None
        if save is None:
            return
        self._given_up.set()
        with suppress(Exception):
            save.job.result(PATIENCE)
        if self._rank == 0 and not save.written:
            self._target.discard(save.step)

    def _work(self, work: Callable[[], Any]) -> Future[Any]:
        job: Future[Any] = Future()

        def run() -> None:
            try:
                job.set_result(work())
            except BaseException as error:
                job.set_exception(error)

        if self._options.background:
            threading.Thread(target=run, name="checkpoint", daemon=True).start()
        else:
            run()
        return job

    def _wait(self, job: Future[Any]) -> None:
        """Until it is done; `_next` then hears of its errors."""
        seen = -1
        while not wait([job], POLL).done:
            if self._written != seen:
                seen = self._written
                self._beat()

    def _headway(self, count: int) -> None:
        self._written += count
        if self._given_up.is_set():
            raise InterruptedError("given up")

    def _next(self, last: bool = False) -> None:
        """All ranks: this half is over, or is waited for."""
        save = self._save
        assert save is not None
        result = save.job.result()
        self._halves += 1
        if not save.written:
            everyone: list[Any] = distributed.gather_objects(result)
            failure = next((each for each in everyone if isinstance(each, str)), "")
            save.written = True
            save.bytes = 0 if failure else sum(size for size, _ in everyone)
            save.job = self._work(lambda: self._commit(save, everyone, failure) if self._rank == 0 else "")
        else:
            self._save = None
            self._over(save, distributed.from_rank_0(result), last)

    def _write(self, step: int, held: Sequence[Piece]) -> Listed | str:
        """This rank's file: its size and digest, or why there is none."""
        try:
            if self._rank == 0:
                self._target.clear(step)
            with self._target.create(step, pieces.file_of(self._rank)) as file:
                return pieces.write(_Watched(file, self._headway), held)
        except OSError as error:
            return f"rank {self._rank}: {error}"

    def _commit(self, save: _Save, everyone: Sequence[Listed], failure: str) -> str:
        """On rank 0: why there is no checkpoint, empty = there is."""
        files = {pieces.file_of(rank): listed for rank, listed in enumerate(everyone)}
        seconds = time.perf_counter() - save.began
        writing = {"bytes": save.bytes, "stall_seconds": save.stall, "seconds": seconds}
        if not failure:
            try:
                self._target.commit(save.step, files, {**save.state, "writing": writing})
            except OSError as error:
                failure = str(error)
        save.seconds = time.perf_counter() - save.began
        if failure:
            room = self._target.room()
            self._target.discard(save.step)
            return f"{failure}; {room}"
        try:
            self._target.name_latest(save.step)
        except OSError as error:
            save.remark = f"`latest` in {self._target.place} could not be made to name step {save.step} ({error})"
            return ""
        with suppress(OSError):  # what cannot be removed harms nobody
            self._target.prune(save.step, self._options.keep, self._options.keep_every)
        return ""

    def _over(self, save: _Save, failure: str, last: bool) -> None:
        self._failures = self._failures + 1 if failure else 0
        if self._rank == 0:
            self._tell(Saved(save.step, save.bytes, save.stall, save.seconds, failure))
        if not failure:
            self.newest = save.step
            if save.remark:
                self._warn(f"{save.remark}; a run goes on from it all the same, and the next save tries again")
            return
        what = f"the checkpoint of step {save.step} could not be written to {self._target.place} ({failure})"
        stays = f"the newest is that of step {self.newest}" if self.newest else "this run has written none yet"
        if last:
            raise CheckpointError(f"{what}; {stays}; mend that and start the same command again")
        if self._failures >= self._options.failures:
            raise TrainingError(
                f"{what}, for the {self._failures}. time in a row; {stays}; mend that and start the same command "
                "again, or raise checkpoint.failures"
            )
        if self._rank == 0:
            left = f"{self._failures} of checkpoint.failures={self._options.failures} in a row"
            self._warn(f"{what}; {stays}; the run goes on ({left})")


class _Watched:
    """A file whose writer tells how many bytes it is about to take."""

    def __init__(self, file: Writable, tell: Callable[[int], None]) -> None:
        self._file, self._tell = file, tell

    def write(self, data: memoryview, /) -> Any:
        self._tell(len(data))
        return self._file.write(data)
