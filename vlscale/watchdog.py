"""A rank that gives no sign of life says where it stands, and the whole run ends.

Every rank has a thread that looks at the clock. Too long after the last sign of life (a step, a batch of an
evaluation, a collective that began or came back) it writes the stack of every thread, the last collectives and what
the loader's workers are at to `hangs/rank_00000.txt` in the run folder. The other ranks see the folder, write theirs,
and the lowest of those that wrote says who is behind; then all end with the exit code of a `TrainingError`.

Time is counted in looks of the thread itself: while a machine sleeps or a scheduler has suspended the job nobody
looks, and jumps of the clock are not seen.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO

import vlscale
from vlscale import distributed, stop
from vlscale.collectives import Collectives
from vlscale.data.options import DataConfig
from vlscale.errors import TrainingError
from vlscale.options import WatchdogConfig
from vlscale.run_folder import HANGS, LOG

GRACE = 5.0  # seconds for the other ranks' reports
MARGIN = 60.0  # seconds: the data plane, which knows the store, speaks first
VERDICT = "verdict.txt"
LOOKS = 20  # in the time that is allowed
SLOW = ("checkpoint", "going back")  # phases that may take as long as a start
HERE = Path(vlscale.__file__).parent


@dataclass(frozen=True)
class Report:
    """Where a rank stands; the first line of its file, as JSON."""

    rank: int
    host: str
    process: int
    phase: str  # "step", "data", "evaluation", ...
    step: int  # 0 before the first
    quiet: float  # seconds since the last sign of life
    begun: int  # collectives
    waiting: str  # the collective that it is in
    place: str  # the line of ours that the main thread is at
    workers: tuple[str, ...]  # what the loader's are at

    def behind(self) -> tuple[int, bool]:
        """Ranks that are behind have less of it."""
        return self.begun, bool(self.waiting)

    def describe(self) -> str:
        """In words."""
        where = f"step {self.step}, {self.phase}" if self.step else self.phase
        inside = f", waiting in {self.waiting}" if self.waiting else ""
        workers = "".join(f"; {each}" for each in self.workers) if self.phase == "data" else ""
        return f"rank {self.rank} ({self.host}, process {self.process}) at {where}, in {self.place}{inside}{workers}"


def limits(run: WatchdogConfig, data: DataConfig) -> WatchdogConfig:
    """Those of a run: a step may wait for a store that is away as long as the data plane waits for it."""
    if run.step and data.remote():
        step = max(run.step, data.store_patience + 2 * data.store_timeout + MARGIN)
        return replace(run, step=step, start=run.start and max(run.start, step))
    return run


def patience(limits: WatchdogConfig) -> timedelta:
    """How long a collective may take: always longer than the watchdog waits, which has more to say."""
    return max(distributed.TIMEOUT, timedelta(seconds=max(limits.start, limits.step) + 300))


class Watchdog:
    """Watches this process from now on; make it in the main thread, before the process group is joined.

    Call `at` wherever the run goes on to something else, `beat` inside what takes long. `collectives` counts what the
    ranks do together. `workers` tells what the loader's workers are at, once there is a loader.
    """

    def __init__(self, limits: WatchdogConfig, out: Path | None) -> None:
        """`out`: the run folder, if it is known yet."""
        self.collectives = Collectives()
        self.workers: Callable[[], Sequence[str]] = tuple
        self._unrecord = distributed.record(self.collectives, patience(limits))
        self._limits = limits
        self._folder = out / HANGS if out is not None else None
        self._told = threading.Event()  # by another rank's report
        self._rank, self._world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._main = threading.get_ident()
        self._since = time.time()
        self._first = self._step = 0
        self._phase = "start"
        self._beats = 0
        self._quiet = 0.0
        self._closed = threading.Event()
        self._ending = False
        shortest = min((each for each in (limits.start, limits.step) if each), default=0.0)
        self._pause = min(2.0, max(0.05, shortest / LOOKS))
        if shortest:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, phase: str, step: int = 0) -> None:
        """This rank goes on to something else: a sign of life."""
        self._phase, self._step = phase, step
        if phase == "step":
            self._first = self._first or step
        self._beats += 1

    def beat(self) -> None:
        """A sign of life."""
        self._beats += 1

    def listen(self, out: Path) -> None:
        """From now on look for reports of other ranks: `out` is the run folder, without those of earlier runs."""
        self._folder = out / HANGS
        if self._limits.start or self._limits.step:
            threading.Thread(target=self._listen, args=(self._folder,), name="watchdog-ear", daemon=True).start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching and counting."""
        self._closed.set()
        if self._ending:  # what broke off here is a consequence: another rank has ended already
            time.sleep(2 * GRACE)
        self._unrecord()
        faulthandler.cancel_dump_traceback_later()

    def _limit(self) -> float:
        """Long as well where a rank waits for another's disk, of whose headway it does not hear."""
        start, step = self._limits.start, self._limits.step
        if not 0 < self._first < self._step:
            return start
        return max(start, step) if step and self._phase in SLOW else step

    def _listen(self, folder: Path) -> None:
        """A thread of its own: what hangs may be the file system that the folder is on."""
        while not self._closed.wait(self._pause):
            if self._quiet and len(_read(folder, self._since)) > 0:
                self._told.set()
                return

    def _watch(self) -> None:
        seen, quiet, looked = (-1, -1.0), 0.0, time.monotonic()
        while not self._closed.wait(self._pause):
            now = time.monotonic()
            sign = self._beats, self.collectives.moved
            # a look that comes late says that nobody could look, not that nothing was done
            quiet = 0.0 if sign != seen else quiet + min(now - looked, 2 * self._pause)
            seen, looked, limit, self._quiet = sign, now, self._limit(), quiet
            if (limit and quiet >= limit) or (quiet and self._told.is_set()):
                self._end(quiet)
            if limit:
                self._dump_in_any_case(limit)

    def _dump_in_any_case(self, limit: float) -> None:
        """If not even this thread gets its turn, because the main thread keeps Python's lock: stacks on stderr."""
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            faulthandler.dump_traceback_later(limit + 2 * GRACE, file=sys.__stderr__ or 2)

    def _end(self, quiet: float) -> None:
        """Say what there is to say, and end this process, whatever becomes of that."""
        self._ending = True
        if self._closed.is_set():
            return
        try:
            if not stop.within(2 * GRACE, lambda: self._tell(quiet)):
                stop.within(1.0, lambda: self._describe(self._report(quiet), sys.stderr.buffer))
        finally:
            stop.end(TrainingError.exit_code)

    def _tell(self, quiet: float) -> None:
        """Report, wait for the other ranks' reports, and say who is behind."""
        report = self._report(quiet)
        self._write(report)
        reports = self._others(report)
        if min(reports) == self._rank:
            self._say(verdict(list(reports.values()), self._world, self._folder))
        else:
            self._wait(lambda: self._folder is None or (self._folder / VERDICT).exists(), GRACE / 2)

    def _report(self, quiet: float) -> Report:
        return Report(
            rank=self._rank,
            host=socket.gethostname(),
            process=os.getpid(),
            phase=self._phase,
            step=self._step,
            quiet=round(quiet, 1),
            begun=self.collectives.begun,
            waiting=self.collectives.waiting(),
            place=_place(sys._current_frames().get(self._main)),
            workers=self._ask_workers(),
        )

    def _ask_workers(self) -> tuple[str, ...]:
        """Not for long: what they hang on may hold us too."""
        told: list[str] = []
        stop.within(GRACE / 4, lambda: told.extend(self.workers()))
        return tuple(told)

    def _write(self, report: Report) -> None:
        try:
            if self._folder is None:
                raise OSError("there is no run folder yet")
            self._folder.mkdir(parents=True, exist_ok=True)
            whole = self._folder / f"rank_{self._rank:05d}.txt"
            part = whole.with_suffix(".part")
            with part.open("wb") as file:
                self._describe(report, file)
            part.replace(whole)
        except OSError:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # nowhere to write to at all
                self._describe(report, sys.stderr.buffer)

    def _describe(self, report: Report, file: IO[bytes]) -> None:
        now = time.monotonic()
        collectives = "\n".join(each.describe(now) for each in self.collectives.last())
        text = (
            f"{json.dumps(asdict(report))}\n\n{report.describe()}; no sign of life for {report.quiet:g} s\n\n"
            f"collectives of {self._world} ranks, the newest last ({report.begun} in all):\n{collectives}\n\n"
            f"loader: {'; '.join(report.workers) or 'nothing known'}\n\n"
            f"threads, of which {self._main:#018x} is the main one:\n"
        )
        file.write(text.encode(errors="replace"))
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.flush()

    def _others(self, own: Report) -> dict[int, Report]:
        """The reports of all ranks that write one within the time of grace."""
        found = {own.rank: own}

        def complete() -> bool:
            found.update(_read(self._folder, self._since) if self._folder is not None else {})
            return len(found) == self._world

        self._wait(complete, GRACE if self._folder is not None else 0.0)
        return found

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not done() and time.monotonic() < until:
            time.sleep(0.1)

    def _say(self, sentence: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr, flush=True)
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            if (self._folder.parent / LOG).exists():
                with (self._folder.parent / LOG).open("a", encoding="utf-8", errors="replace") as log:
                    log.write(f"{sentence}\n")
            (self._folder / VERDICT).write_text(f"{sentence}\n", encoding="utf-8", errors="replace")


def verdict(reports: Sequence[Report], world: int, folder: Path | None) -> str:
    """Who is behind, in one sentence."""
    quiet = max(report.quiet for report in reports)
    silent = sorted(set(range(world)) - {report.rank for report in reports})
    least = min(report.behind() for report in reports)
    behind = [report for report in reports if report.behind() == least]
    said = []
    if silent:
        ranks = f"{'ranks' if len(silent) > 1 else 'rank'} {', '.join(map(str, silent))} of {world}"
        said.append(f"{ranks} left no word within {GRACE:g} s (stopped, dead or cut off)")
    if len(behind) < len(reports):
        most = max(report.begun for report in reports)
        said.append(f"behind is {_few(behind)}, with {least[0]} collectives begun where others have {most}")
    if not said:
        said.append(f"none of {world} rank(s) is behind the others; {_few(behind)}")
    stacks = f"; every thread's stack is in {folder}" if folder is not None else ""
    return f"no sign of life for {quiet:.0f} s, so this run ends: {'; '.join(said)}{stacks}"


def _few(reports: Sequence[Report]) -> str:
    more = f" and {len(reports) - 4} more" if len(reports) > 4 else ""
    return "; ".join(report.describe() for report in sorted(reports, key=lambda each: each.rank)[:4]) + more


def _read(folder: Path, since: float) -> dict[int, Report]:
    """By rank, those written after `since`, by the clock of this machine: a folder may hold those of an earlier run."""
    found = {}
    for path in sorted(folder.glob("rank_*.txt")):
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            if path.stat().st_mtime >= since - 1:
                with path.open(encoding="utf-8", errors="replace") as file:
                    values = json.loads(file.readline())
                report = Report(**{**values, "workers": tuple(values["workers"])})
                found[report.rank] = report
    return found


def _place(frame: FrameType | None) -> str:
    """The innermost line of ours, e.g. `vlscale/data/loader.py:250 (__next__)`."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(HERE):
            return f"{HERE.name}/{path.relative_to(HERE)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "a library"
