"""The process of a job that starts the ranks, waits for their end, and sees to what comes then.

submitit starts it once, in the batch script on the job's first node; `slurm/submit.py --local N` calls it here.
The ranks are plain `launchers/pretrain.py`, and are told by Slurm itself when the time is nearly over or the job is
preempted. So nothing of a run hangs on this process, whose end is theirs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

from vlscale.cluster import records
from vlscale.cluster.records import Job
from vlscale.cluster.verdict import Ended, Ending, Left, Verdict, judge, meaning
from vlscale.errors import STOPPED, ConfigError, TrainingError

POLL = 1.0  # seconds
ALONE = 20.0  # seconds for the others to notice that a rank has failed
LAST_LINES = 20  # of the rank that failed first


@dataclass(frozen=True)
class Start:
    """One start of all ranks."""

    nodes: tuple[str, ...]
    ranks_per_node: int
    attempt: int  # in this job, from 0; a new one has a new port
    logs: Path  # a folder for what each rank prints: rank_00000.txt
    command: tuple[str, ...]  # python and its words


@dataclass(frozen=True)
class First:
    """The rank that failed first."""

    rank: int
    said: str  # how it ended, in words


class Running(Protocol):
    """Ranks that have been started."""

    def wait(self, timeout: float) -> int:
        """The greatest of their exit codes once all have ended; subprocess.TimeoutExpired if some have not."""
        ...


class Machines(Protocol):
    """Where ranks run."""

    restart: int  # how often this job was put back into the queue

    def nodes(self) -> tuple[str, ...]:
        """Their names."""
        ...

    def begin(self, start: Start) -> Running:
        """Start the ranks."""
        ...

    def first(self, start: Start) -> First | None:
        """Which rank failed first, if that can be told."""
        ...

    def cancelled(self, start: Start) -> bool:
        """Whether the scheduler has ended the ranks, none of which had failed before, and not the job."""
        ...

    def lost(self, nodes: Sequence[str], ask: bool) -> tuple[str, ...]:
        """Which of them are gone: by what Slurm knows, and if `ask` is given by asking each."""
        ...

    def tell(self, number: int) -> None:
        """The conductor was sent this signal."""
        ...

    def ending(self) -> Ending:
        """Whether the scheduler is ending the job, and why."""
        ...

    def keep(self, nodes: Sequence[str], queued: bool) -> None:
        """Give up the job's other nodes; with `queued`, it waits in the queue: ask for so many from now on.

        Raises OSError or subprocess.SubprocessError.
        """
        ...

    def give_up(self) -> None:
        """Take the job out of the queue, into which Slurm has put it back. As `keep`."""
        ...

    def requeue(self, lost: Sequence[str]) -> bool:
        """Put the job back into the queue, without these nodes; True = there is no queue: start again at once.

        Raises OSError or subprocess.SubprocessError.
        """
        ...


def run(job: Job, machines: Machines) -> int:
    """Start the ranks, again where that is the thing to do; returns the exit code."""
    conductor, shrinks = _Conductor(job, machines), job.options.on_node_loss == "shrink"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, conductor.on_signal)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit logs it
    if machines.restart > job.options.requeue:
        conductor.say(f"this job was put back into the queue {machines.restart} times, --requeue allows fewer: stopped")
        return STOPPED
    if machines.restart and job.options.on_node_loss == "end" and conductor.lost_a_node():
        conductor.say("Slurm has put this job back after it lost a node, and --on_node_loss end was given: stopped")
        return TrainingError.exit_code
    attempt, nodes = 0, machines.nodes()
    nodes = nodes[: job.fewer(len(nodes))] if shrinks else nodes
    if not nodes:
        conductor.say("Slurm has given fewer nodes than data.batch divides over: `slurm/submit.py requeue` asks anew")
        return ConfigError.exit_code
    while True:
        code, verdict, lost, left = conductor.start(attempt, nodes)
        again = verdict.then == "again"
        try:
            if again or (shrinks and lost and verdict.then == "stopped"):
                machines.keep(left, queued=not again)
            if verdict.then == "failed" and lost:
                machines.give_up()
            if verdict.then == "requeue":
                again = machines.requeue(lost)
        except (OSError, subprocess.SubprocessError) as error:
            conductor.say(f"Slurm does not take that ({_said(error)}); `slurm/submit.py requeue {job.out}` goes on")
            return code
        if not again:
            return code
        attempt, nodes = attempt + 1, left


class Outcome(NamedTuple):
    """How a start ended, and what is left to start again on."""

    code: int
    verdict: Verdict
    lost: tuple[str, ...]
    usable: tuple[str, ...]  # as many as the batch divides over


class _Conductor:
    def __init__(self, job: Job, machines: Machines) -> None:
        self._job, self._machines = job, machines
        self._signalled = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """A note for later; the ranks have their own signals."""
        self._signalled = self._signalled or number in (signal.SIGTERM, signal.SIGINT)
        self._machines.tell(number)

    def say(self, sentence: str) -> None:
        """Into the job's log."""
        print(f"{time.strftime('%H:%M:%S')} {sentence}", flush=True)

    def lost_a_node(self) -> bool:
        """Whether the start before this one did, as far as is known."""
        last = next(iter(records.starts(self._job.home)[-1:]), {})
        return bool(
            last.get("lost") or (last.get("event") == "began" and self._machines.lost(last["nodes"], ask=False))
        )

    def start(self, attempt: int, nodes: tuple[str, ...]) -> Outcome:
        """Start the ranks on these nodes and wait for their end."""
        job, machines = self._job, self._machines
        began = f"{job.number or 'local'}_{machines.restart}_{attempt}"
        start = Start(
            nodes,
            job.options.ranks_per_node,
            attempt,
            job.home / records.LOGS / began,
            job.command(again=attempt > 0 or machines.restart > 0),
        )
        start.logs.mkdir(parents=True, exist_ok=True)
        values = {"start": began, "job": job.number, "restart": machines.restart, "attempt": attempt}
        before = records.last_checkpoint(Path(job.out))
        records.append(job.home, "began", {**values, "nodes": list(nodes), "checkpoint": before})
        self.say(f"start {began}: {len(nodes) * start.ranks_per_node} rank(s) on {', '.join(nodes)}")
        since = time.monotonic()
        code, ending = self._wait(machines.begin(start))
        lost = () if code in (0, STOPPED) and not ending else machines.lost(nodes, ask=not ending)
        after = records.last_checkpoint(Path(job.out))
        cancelled = code not in (0, STOPPED) and not ending and machines.cancelled(start)
        ended = Ended(code, lost, ending, cancelled, self._headway(before, after))
        left = tuple(node for node in nodes if node not in lost)
        usable = left[: job.fewer(len(left))]
        verdict = judge(ended, Left(job.options.requeue - machines.restart, len(usable), job.options.on_node_loss))
        first = machines.first(start) if code not in (0, STOPPED) and not (lost or cancelled) else None
        if first is not None:
            self._show(first, start)
        self.say(f"start {began} ended with {code} after {time.monotonic() - since:.0f} s: {verdict.why}")
        outcome = {"code": code, "then": verdict.then, "why": verdict.why, "lost": list(lost), "checkpoint": after}
        told = {"rank": first.rank, "said": first.said} if first is not None else {}
        records.append(job.home, "ended", {**values, **outcome, **told})
        return Outcome(code, verdict, lost, usable)

    def _wait(self, ranks: Running) -> tuple[int, Ending]:
        """The exit code of the ranks, and whether it was the scheduler that ended them."""
        ending: Ending = ""
        code: int | None = None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = meaning(exit_code(ranks.wait(POLL)))
            if self._signalled and not ending:
                ending = self._machines.ending()
                self._signalled = bool(ending)  # else the job goes on: somebody has told us alone
        return code, ending

    def _headway(self, before: str, after: str) -> bool:
        """Whether this start or the one before it made a checkpoint; taken for granted where they go to a store."""
        lines = (line for line in records.starts(self._job.home) if line["event"] == "began")
        earlier = [line["checkpoint"] for line in lines if line["job"] == self._job.number]
        store = records.configuration(Path(self._job.out)).get("checkpoint", {}).get("to")
        return after != before or earlier[-2:].count(before) < 2 or bool(store)

    def _show(self, first: First, start: Start) -> None:
        """The last words of the rank that failed first."""
        path = start.logs / f"rank_{first.rank:05d}.txt"
        self.say(f"rank {first.rank} failed first ({first.said}); its last lines, of {path}:")
        for line in last_lines(path):
            print(f"    {line}", flush=True)


def _said(error: Exception) -> str:
    """What a command has answered."""
    said = getattr(error, "stderr", None) or b""
    return " ".join((said.decode(errors="replace") if isinstance(said, bytes) else said).split()) or str(error)


def exit_code(code: int) -> int:
    """Of a child process, as a shell has it: 128 + the signal that ended it."""
    return 128 - code if code < 0 else code


def last_lines(path: Path, count: int = LAST_LINES) -> list[str]:
    """The end of a text file; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2**16))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
